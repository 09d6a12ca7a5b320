"""The Triton kernels, run by Triton's interpreter, equal the definition.

Triton decides on the interpreter when it is first imported, so these tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cmc_server.config import Unmapped
from cmc_server.fusion.rule import Shift, end_rows_, fuse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")


@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@interpreted
@pytest.mark.parametrize("unmapped", ["zero", "preserve"])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("num_columns", [900, 2500])
def test_equal_to_the_definition(unmapped: Unmapped, identity: bool, num_columns: int) -> None:
    from cmc_server.fusion.kernel import add_shift_

    draw = torch.Generator().manual_seed(num_columns)
    size = 700
    logits = 3 * torch.randn(5, num_columns, generator=draw)
    logits[torch.rand(logits.shape, generator=draw) < 0.2] = -torch.inf
    logits[3] = -torch.inf  # a row without any probability
    ids = None if identity else torch.randint(-1, size, (num_columns - 3,), generator=draw)
    delta_logits = 2 * torch.randn(3, size + 2, generator=draw)[:, 1:-1]  # rows that are not packed
    strengths = torch.tensor([0.5, -1.0, 2.0])
    rows = torch.tensor([4, 0, 3])
    expected = logits.clone()
    expected[rows] = fuse(logits[rows], [Shift(delta_logits, ids, strengths)], unmapped)
    actual = add_shift_(logits.clone(), rows, delta_logits, ids, strengths, preserve=unmapped == "preserve")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual[[1, 2]], logits[[1, 2]])


@interpreted
def test_faulty_rows_end() -> None:
    from cmc_server.fusion.kernel import end_rows_ as by_kernel

    logits = torch.randn(5, 1500)
    logits[0, 7] = torch.nan
    rows, faulty = torch.tensor([4, 0, 2]), torch.tensor([False, True, True])
    ended = by_kernel(logits.clone(), rows, faulty, 9)
    assert torch.equal(ended, end_rows_(logits.clone(), rows, faulty, 9))
    assert torch.isfinite(ended[[0, 2]]).nonzero().tolist() == [[0, 9], [1, 9]]
    assert torch.equal(ended[[1, 3, 4]], logits[[1, 3, 4]])


@interpreted
def test_nothing_to_do() -> None:
    from cmc_server.fusion.kernel import add_shift_

    logits = torch.randn(2, 10)
    after = add_shift_(logits.clone(), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None, torch.zeros(0))
    assert torch.equal(after, logits)
