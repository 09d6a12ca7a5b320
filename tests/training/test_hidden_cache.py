"""Hidden states kept in memory and on disk: found again, within a budget, and never half written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmc_server.errors import ConfigError
from cmc_server.training.hidden_cache import HiddenCache, states_key
from cmc_server.training.template import FrozenTemplate

SEQUENCES = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
STARTS = [2, 0, 3]
#: (3 + 2 + 1) states of 16 float32.
SIZE_GIB = 6 * 16 * 4 / 2**30


def assert_same(left: list[torch.Tensor] | None, right: list[torch.Tensor] | None) -> None:
    assert left is not None and right is not None
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


def test_disk_gives_what_memory_gives_and_is_found_again(template: FrozenTemplate, tmp_path: Path) -> None:
    kept = HiddenCache("memory", 1.0).states(template, SEQUENCES, STARTS)
    assert_same(HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS), kept)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{states_key(template, SEQUENCES, STARTS)}.safetensors"
    assert load_file(path)["hidden"].shape == (6, 16)
    inode = path.stat().st_ino
    assert_same(HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS), kept)
    assert [one.stat().st_ino for one in tmp_path.iterdir()] == [inode]


def test_none_keeps_nothing(template: FrozenTemplate) -> None:
    assert HiddenCache("none", 1e-12).states(template, SEQUENCES, STARTS) is None


def test_the_key_follows_all_that_decides_the_states(template: FrozenTemplate, template_folder: Path) -> None:
    key = states_key(template, SEQUENCES, STARTS)
    assert key == states_key(FrozenTemplate.load(str(template_folder)), SEQUENCES, STARTS)
    assert key != states_key(template, [[3, 4, 5, 6, 8], *SEQUENCES[1:]], STARTS)
    assert key != states_key(template, SEQUENCES, [1, 0, 3])
    other = FrozenTemplate.load(str(template_folder))
    other.model.bfloat16()
    assert key != states_key(other, SEQUENCES, STARTS)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_over_budget_is_an_error_that_says_what_to_do(template: FrozenTemplate, tmp_path: Path, mode: str) -> None:
    cache = HiddenCache(mode, 1.5 * SIZE_GIB, tmp_path)  # type: ignore[arg-type]
    cache.states(template, SEQUENCES, STARTS)
    with pytest.raises(ConfigError, match=r"cache_budget_gib = 5.36e-07; raise it.*none"):
        cache.states(template, SEQUENCES, STARTS)


def test_files_of_earlier_runs_make_room_the_least_recently_used_first(
    template: FrozenTemplate, tmp_path: Path
) -> None:
    names = []
    for age, first in ((300, 20), (200, 21), (100, 22)):
        sequences = [[first, *SEQUENCES[0][1:]], *SEQUENCES[1:]]
        HiddenCache("disk", 1.0, tmp_path).states(template, sequences, STARTS)
        path = tmp_path / f"{states_key(template, sequences, STARTS)}.safetensors"
        os.utime(path, (time.time() - age, time.time() - age))
        names.append(path.name)
    sizes = sum(path.stat().st_size for path in tmp_path.iterdir())
    HiddenCache("disk", (sizes + 10) / 2**30, tmp_path).states(template, SEQUENCES, STARTS)
    left = {path.name for path in tmp_path.iterdir()}
    assert names[0] not in left and set(names[1:]) < left and len(left) == 3


def test_a_full_disk_leaves_no_broken_cache(template: FrozenTemplate, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
    kept = HiddenCache("memory", 1.0).states(template, SEQUENCES, STARTS)
    assert_same(HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS), kept)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


KILLED = """
import sys
from pathlib import Path
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.template import FrozenTemplate

template = FrozenTemplate.load(sys.argv[1])
plain = template.hidden_states
def stuck(sequences, starts):
    states = plain(sequences, starts)
    yield next(states)
    print("half", flush=True)
    sys.stdin.read()
template.hidden_states = stuck
HiddenCache("disk", 1.0, Path(sys.argv[2])).states(template, [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]], [2, 0, 3])
"""


@pytest.mark.slow
def test_a_kill_leaves_no_broken_cache(template: FrozenTemplate, template_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(template_folder), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    kept = HiddenCache("memory", 1.0).states(template, SEQUENCES, STARTS)
    assert_same(HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS), kept)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("broken", ["cut", "empty", "other", "short"])
def test_a_broken_file_is_computed_again(template: FrozenTemplate, tmp_path: Path, broken: str) -> None:
    kept = HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()  # not written in place: what is read above is mapped
    if broken == "other":
        save_file({"hidden": torch.zeros(5, 16)}, path)
    else:
        path.write_bytes({"cut": whole[:-8], "empty": b"", "short": b"{}"}[broken])
    with pytest.warns(UserWarning, match=r"are broken .* and computed again"):
        assert_same(HiddenCache("disk", 1.0, tmp_path).states(template, SEQUENCES, STARTS), kept)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(template: FrozenTemplate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigError, match=r"data\.cache_folder"):
        HiddenCache("disk", 1.0, tmp_path / "file" / "folder").states(template, SEQUENCES, STARTS)
