"""Prompt files in their three forms, broken ones, and AlpacaEval's format on the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmc_server.errors import ConfigError
from cmc_server.evaluation.prompts import NEUTRAL_TEXTS, PACKAGED_PROMPTS, Task, alpaca_records, read_tasks

RECORDS = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "c?", "output": "d"},
    {"prompt": "e", "response": " f"},
    {"instruction": "g?"},
]
TASKS = [
    Task([{"role": "user", "content": "a?"}], "b"),
    Task([{"role": "user", "content": "c?"}], "d"),
    Task("e", " f"),
    Task([{"role": "user", "content": "g?"}], None),
]


def test_lines_and_lists(tmp_path: Path) -> None:
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n", "utf-8")
    whole.write_text(json.dumps(RECORDS, indent=2), "utf-8")
    assert read_tasks(lines) == read_tasks(whole) == TASKS
    assert read_tasks(lines, limit=2) == TASKS[:2]
    assert [task.instruction for task in TASKS] == ["a?", "c?", "e", "g?"]


def test_what_ships() -> None:
    assert len(read_tasks(PACKAGED_PROMPTS)) == 60
    neutral = read_tasks(NEUTRAL_TEXTS)
    assert len(neutral) == 40 and all(task.reference for task in neutral)
    assert {isinstance(task.prompt, str) for task in neutral} == {True, False}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "no prompts"),
        ("[]", "no prompts"),
        ("{", "line 1: not valid JSON"),
        ("[{]", "not valid JSON"),
        ('{"prompt": "a"}\n{"prompt": ""}', "line 2: expected"),
        ('{"prompt": "a"}\n7', "line 2: expected"),
        ('[{"instruction": 3}]', "record 1: expected"),
        ('{"messages": []}', "line 1: expected"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: expected"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=place):
        read_tasks(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")


def test_alpaca_format() -> None:
    assert alpaca_records(TASKS[:1], ["x"], "llm", "mine") == [
        {"instruction": "a?", "output": "x", "generator": "llm", "dataset": "mine"}
    ]
