"""``cmc-server bench``: what it adds to vLLM's benchmark. That it runs is tested where a server runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cmc_server.api.bench import with_deltas
from cmc_server.cli import main


def test_deltas_go_into_the_body() -> None:
    assert with_deltas(None, (), None) is None
    assert with_deltas({"top_k": 1}, (), None) == {"top_k": 1}
    body = with_deltas({"top_k": 1}, ("concise@0.5", "forget"), "preserve")
    deltas = [{"name": "concise", "strength": 0.5}, {"name": "forget"}]
    assert body == {"top_k": 1, "cmc": {"deltas": deltas, "unmapped": "preserve"}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--delta", "a@x"), "NAME@STRENGTH"),
        (("--unmapped", "zero"), "needs a --delta"),
        (("--delta", "a", "--extra-body", '{"cmc": {}}'), "leave one of them out"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch warns of its own past while vLLM is imported
def test_mistakes_cost_one_sentence(words: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["bench", "--model", "m", *words]) == 2
    assert sentence in capsys.readouterr().err
