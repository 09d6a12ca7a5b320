"""Prompts for evaluation, with or without a reference answer, from JSONL files and from AlpacaEval's JSON lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cmc_server
from cmc_server.delta.prompt import Message, plain_messages
from cmc_server.errors import ConfigError
from cmc_server.evaluation.engine import chat

_DATA = Path(cmc_server.__file__).parent / "demo" / "data"
#: Everyday questions that ship with the package.
PACKAGED_PROMPTS = _DATA / "concise" / "heldout.jsonl"
#: Texts that no delta should disturb.
NEUTRAL_TEXTS = _DATA / "neutral" / "texts.jsonl"


@dataclass(frozen=True)
class Task:
    """One prompt.

    Args:
        prompt: a chat, or plain text to continue.
        reference: what should follow; None where the file does not say.
    """

    prompt: str | list[Message]
    reference: str | None

    @property
    def instruction(self) -> str:
        """The prompt for a reader: the text, or the last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """Read a file of prompts.

    Args:
        path: JSON lines, or one JSON list, of ``{"messages": [...]}`` (a last message of the assistant is the
            reference), ``{"instruction": ..., "output": ...}`` (AlpacaEval; output is optional), or
            ``{"prompt": ..., "response": ...}`` (plain text, not a chat; response is optional).
        limit: only so many, the first ones; None is all.

    Raises:
        ConfigError: the file is missing or empty, or a record is broken; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The prompts file {path} cannot be read: {error}.") from None
    tasks = [_task(path, number, record) for number, record in _records(path, text)]
    if not tasks:
        raise ConfigError(f"The prompts file {path} holds no prompts.")
    return tasks[:limit]


def _records(path: Path, text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            return [(f"record {number}", record) for number, record in enumerate(json.loads(text), start=1)]
        except ValueError as error:
            raise ConfigError(f"The prompts file {path} is not valid JSON: {error}.") from None
    records = []
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not valid JSON ({error}).") from None
    return records


def _task(path: Path, place: str, record: Any) -> Task:
    try:
        if "messages" in record:
            return _from_messages(plain_messages(record["messages"]))
        if "instruction" in record:
            return Task(chat(_text(record["instruction"])), _optional(record.get("output")))
        return Task(_text(record["prompt"]), _optional(record.get("response")))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"{path}, {place}: expected an object with messages, with instruction and output, or with prompt and "
            "response, all of them not empty."
        ) from None


def _from_messages(messages: list[Message]) -> Task:
    reference = None
    if messages[-1:] and messages[-1]["role"] == "assistant":
        reference = _text(messages[-1]["content"])
        messages = messages[:-1]
    if not messages:
        raise ValueError("a chat needs a question")
    return Task(messages, reference)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text must not be empty")
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def alpaca_records(
    tasks: Sequence[Task], answers: Sequence[str], generator: str, dataset: str
) -> list[Mapping[str, str]]:
    """Answers in the format that AlpacaEval judges: a list of instruction, output, generator and dataset."""
    return [
        {"instruction": task.instruction, "output": answer, "generator": generator, "dataset": dataset}
        for task, answer in zip(tasks, answers, strict=True)
    ]
