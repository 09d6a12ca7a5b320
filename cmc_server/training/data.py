"""Records from JSON lines or a dataset: chats, prompts with responses, plain texts, or pairs of answers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmc_server.delta.prompt import Message, plain_messages
from cmc_server.errors import ConfigError, one_line
from cmc_server.training.recipes import Columns, DataSource

#: A chat before its answer, or the beginning of a plain text.
Prompt = list[Message] | str

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """A prompt and its answer.

    Args:
        prompt: the chat before the answer; of a plain text its first word.
        answer: the text to learn or to forget; of a plain text all that follows; of a pair, the chosen one.
        rejected: of a pair, the other one.
    """

    prompt: Prompt
    answer: str
    rejected: str | None = None


@dataclass(frozen=True)
class Records:
    """What a source holds.

    Args:
        items: the records, at least one.
        provenance: where they come from, with a hash of their content.
    """

    items: list[Record]
    provenance: dict[str, Any] = field(default_factory=dict)


def read_records(source: DataSource, base: Path, *, pairs: bool = False) -> Records:
    """Read a source of a recipe.

    Args:
        source: a file or a dataset.
        base: folder that paths are relative to.
        pairs: whether records hold a chosen and a rejected answer.

    Raises:
        ConfigError: the source is missing or empty, or a record is broken; the message names file and record.
    """
    if source.file is not None:
        path = base / source.file
        lines = _read_lines(path)
        return Records(
            [_record(line, source.columns, pairs, f"{path}, line {number}") for number, line in lines],
            {"file": path.name, "sha256": file_hash(path)},
        )
    rows = _read_dataset(source, base)
    named = {key: value for key, value in source.model_dump().items() if key in ("dataset", "name", "split") and value}
    place = f"dataset {source.dataset}, split {source.split}"
    return Records(
        [_record(row, source.columns, pairs, f"{place}, record {number}") for number, row in enumerate(rows)],
        {**named, "sha256": _rows_hash(rows)},
    )


def read_chats(path: Path) -> list[list[Message]]:
    """Chats of a file with one ``{"messages": [{"role", "content"}, ...]}`` a line.

    Raises:
        ConfigError: the file is missing or empty, or a record is broken; the message names its line.
    """
    chats = []
    for number, line in _read_lines(path):
        record = _record(line, Columns(), False, f"{path}, line {number}")
        if isinstance(record.prompt, str):
            raise ConfigError(f"{path}, line {number}: expected a chat, not a plain text.")
        chats.append([*record.prompt, Message(role="assistant", content=record.answer)])
    return chats


def file_hash(path: Path) -> str:
    """SHA-256 of a data file, for the provenance."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_lines(path: Path) -> list[tuple[int, Any]]:
    """Number and content of each line that is not blank; what is no JSON comes back as None."""
    try:
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data file {path} cannot be read: {error}.") from None
    values = [(number, _json(line, f"{path}, line {number}")) for number, line in enumerate(lines, 1) if line.strip()]
    if not values:
        raise ConfigError(f"The data file {path} is empty; it holds no chats and no prompts.")
    return values


def _json(line: str, place: str) -> Any:
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise ConfigError(f"{place}: {half} is half of a character; mend or remove the record.") from None
    except (ValueError, RecursionError):
        return None


def _read_dataset(source: DataSource, base: Path) -> list[Any]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"data names the dataset {source.dataset}, which needs the datasets library; "
            "run: pip install 'cmc-server[train]'."
        )
    from datasets import load_dataset

    path = local_or_hub(str(source.dataset), base)
    try:
        rows = list(load_dataset(path, name=source.name, split=source.split, revision=source.revision))
    except Exception as error:  # the library raises errors of many libraries
        reason = one_line(error)[:300]
        raise ConfigError(f"The dataset {source.dataset}, split {source.split}, cannot be loaded: {reason}") from None
    if not rows:
        raise ConfigError(f"The dataset {source.dataset}, split {source.split}, is empty.")
    return rows


def local_or_hub(name: str, base: Path) -> str:
    """A folder relative to the recipe if there is one of this name, else the name as it is."""
    return str(base / name) if (base / name).is_dir() else name


def _rows_hash(rows: list[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _record(value: Any, columns: Columns, pairs: bool, place: str) -> Record:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: expected one JSON object a line, {_expected(columns, pairs)}.")
    try:
        return _pair(value, columns) if pairs else _answered(value, columns)
    except _BrokenError as error:
        raise ConfigError(f"{place}: {error}.") from None
    except (KeyError, TypeError):
        raise ConfigError(f"{place}: expected {_expected(columns, pairs)}.") from None


class _BrokenError(ValueError):
    """What is wrong with a record."""


def _expected(columns: Columns, pairs: bool) -> str:
    if pairs:
        return f'{{"{columns.prompt}": ..., "{columns.chosen}": ..., "{columns.rejected}": ...}}'
    return (
        f'{{"{columns.messages}": [{{"role": ..., "content": ...}}, ...]}} with the roles {", ".join(_ROLES)}, or '
        f'{{"{columns.prompt}": ..., "{columns.response}": ...}}, or {{"{columns.text}": ...}}; data.*.columns names '
        "other columns"
    )


def _answered(value: Mapping[str, Any], columns: Columns) -> Record:
    if columns.messages in value:
        return Record(*_split(_chat(value[columns.messages])))
    if columns.text in value and columns.prompt not in value:
        return Record(*_cut(value[columns.text]))
    return Record(_prompt(value[columns.prompt]), _text(value[columns.response]))


def _pair(value: Mapping[str, Any], columns: Columns) -> Record:
    chosen, rejected = value[columns.chosen], value[columns.rejected]
    if columns.prompt in value:
        prompt = _prompt(value[columns.prompt])
        return Record(prompt, _last(chosen), _last(rejected))
    (prompt, answer), (other, worse) = _split(_chat(chosen)), _split(_chat(rejected))
    if prompt != other:
        raise _BrokenError("the chosen and the rejected chat must differ in their last message alone")
    return Record(prompt, answer, worse)


def _last(value: Any) -> str:
    """An answer as text or as a chat of one message."""
    return _text(value if isinstance(value, str) else _chat(value)[-1]["content"])


def _prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return _chat(value)
    if not value.strip():
        raise _BrokenError("the prompt is empty")
    return [Message(role="user", content=value)]


def _chat(value: Any) -> list[Message]:
    messages = list(_checked(value))
    if not messages:
        raise _BrokenError("the chat is empty")
    return messages


def _checked(value: Any) -> Iterator[Message]:
    for message in value:
        if message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise TypeError
    yield from plain_messages(value)


def _split(chat: list[Message]) -> tuple[list[Message], str]:
    if len(chat) < 2 or chat[-1]["role"] != "assistant" or not chat[-1]["content"].strip():
        raise _BrokenError("the last message must be the assistant's answer to learn")
    return chat[:-1], chat[-1]["content"]


def _cut(value: Any) -> tuple[str, str]:
    """A plain text as its first word and the rest."""
    text = _text(value).strip()
    start = re.search(r"\s", text)
    if start is None:
        raise _BrokenError("a plain text needs more than one word")
    return text[: start.start()], text[start.start() :]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise _BrokenError("the answer is empty")
    return value
