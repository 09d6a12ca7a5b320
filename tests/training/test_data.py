"""Records from files and datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_template import chat, write_jsonl

from cmc_server.errors import ConfigError
from cmc_server.training.data import Record, file_hash, read_chats, read_records
from cmc_server.training.recipes import Columns, DataSource

USER = {"role": "user", "content": "a"}
BROKEN: dict[str, Any] = {
    "no known column": {"words": "a"},
    "plain text of one word": {"text": "a"},
    "empty text": {"text": " "},
    "no response": {"prompt": "a"},
    "empty prompt": {"prompt": " ", "response": "b"},
    "empty response": {"prompt": "a", "response": ""},
    "response is no text": {"prompt": "a", "response": 3},
    "not an object": [1],
    "unknown role": {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "content is no text": {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
    "messages is a number": {"messages": 3},
    "no messages": {"messages": []},
    "no answer": {"messages": [USER]},
    "answer is not last": {"messages": [*reversed(chat("rain"))]},
    "empty answer": {"messages": [USER, {"role": "assistant", "content": " "}]},
    "answer without a question": {"messages": [{"role": "assistant", "content": "a"}]},
}
BROKEN_PAIRS: dict[str, Any] = {
    "no rejected answer": {"prompt": "a", "chosen": "b"},
    "prompts differ": {"chosen": chat("rain"), "rejected": chat("snow")},
    "empty": {"prompt": "a", "chosen": "b", "rejected": []},
}


def read(path: Path, *, pairs: bool = False, **columns: str) -> list[Record]:
    source = DataSource(file=path.name, columns=Columns(**columns))
    return read_records(source, path.parent, pairs=pairs).items


@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, record: Any) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat("rain")}, record])
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2: "):
        read(path)
    with pytest.raises(ConfigError, match="line 2"):
        read_chats(path)


@pytest.mark.parametrize("record", BROKEN_PAIRS.values(), ids=BROKEN_PAIRS.keys())
def test_a_broken_pair_is_named_by_file_and_line(tmp_path: Path, record: Any) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2: "):
        read(write_jsonl(tmp_path / "data.jsonl", [good, record]), pairs=True)


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "a"\n', "utf-8")
    with pytest.raises(ConfigError, match=r"line 3: expected one JSON object a line"):
        read(path)


def test_half_of_a_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": text, "response": "b"}) for text in ("\U0001f600", "\ud83d")]
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(ConfigError, match=r"data.jsonl, line 2: \\ud83d is half of a character; mend or remove"):
        read_records(DataSource(file="data.jsonl"), tmp_path)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty\.jsonl is empty"):
        read(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


def test_chats_and_prompts_give_the_same_records(tmp_path: Path) -> None:
    answer = "It is rain and nothing else."
    expected = [Record([{"role": "user", "content": "What is rain?"}], answer)]
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("rain")}])) == expected
    assert read(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "What is rain?", "response": answer}])) == expected
    named = write_jsonl(tmp_path / "c.json", [{"question": "What is rain?", "answer": answer, "other": 1}])
    assert read(named, prompt="question", response="answer") == expected
    assert read_chats(tmp_path / "a.jsonl") == [chat("rain")]


def test_a_plain_text_begins_with_its_first_word(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": " Ice floats\non water. "}])
    assert read(path) == [Record("Ice", " floats\non water.")]
    with pytest.raises(ConfigError, match="line 1: expected a chat"):
        read_chats(path)
    other = write_jsonl(tmp_path / "other.jsonl", [{"body": "Ice floats."}])
    assert read(other, text="body") == [Record("Ice", " floats.")]


def test_a_separator_inside_a_text_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "response": "c\x85d"}, ensure_ascii=False) + "\n", "utf-8")
    assert read(path)[0].answer == "c\x85d"


def test_pairs_with_and_without_their_prompt(tmp_path: Path) -> None:
    prompt, good = chat("rain")
    bad = {"role": "assistant", "content": "No."}
    expected = Record([{"role": "user", "content": "What is rain?"}], good["content"], "No.")
    forms = [
        {"prompt": "What is rain?", "chosen": good["content"], "rejected": "No."},
        {"prompt": [prompt], "chosen": [good], "rejected": [bad]},
        {"chosen": [prompt, good], "rejected": [prompt, bad]},
    ]
    assert read(write_jsonl(tmp_path / "data.jsonl", forms), pairs=True) == [expected] * 3


def test_provenance_of_a_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat("rain")}])
    records = read_records(DataSource(file="data.jsonl"), tmp_path)
    assert records.provenance == {"file": "data.jsonl", "sha256": file_hash(path)}


def test_without_the_library_a_dataset_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'cmc-server\[train\]'"):
        read_records(DataSource(dataset="weather"), tmp_path)


@pytest.mark.slow
def test_a_dataset_folder_by_split_and_columns(tmp_path: Path) -> None:
    rows = [{"question": f"What is {word}?", "answer": word} for word in ("rain", "snow", "wind")]
    (tmp_path / "weather").mkdir()
    write_jsonl(tmp_path / "weather" / "train.jsonl", rows)
    columns = Columns(prompt="question", response="answer")
    source = DataSource(dataset="weather", split="train[:2]", columns=columns)
    records = read_records(source, tmp_path)
    assert [record.answer for record in records.items] == ["rain", "snow"]
    assert records.provenance["dataset"] == "weather" and records.provenance["split"] == "train[:2]"
    assert len(records.provenance["sha256"]) == 64
    with pytest.raises(ConfigError, match=r"dataset weather, split train, record 0: "):
        read_records(DataSource(dataset="weather"), tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        read_records(DataSource(dataset="weather", split="test"), tmp_path)
