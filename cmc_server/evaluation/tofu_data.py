"""TOFU's questions, read from files under TOFU's own names; a part of them ships with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cmc_server
from cmc_server.errors import ConfigError
from cmc_server.evaluation.tofu import FORGET

PACKAGED_TOFU = Path(cmc_server.__file__).parent / "demo" / "data" / "tofu"
#: Forget sets by the name that TOFU gives them.
FORGET_SPLITS = ("forget01", "forget05", "forget10")
_KEPT_FILES = {"retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}


@dataclass(frozen=True)
class TofuItem:
    """One question with its answers.

    Args:
        question: asked as a chat of one user message.
        answer: the right one.
        paraphrase: the right one in other words; the answer itself where the set has none.
        perturbed: wrong ones of the same form, at least one.
    """

    question: str
    answer: str
    paraphrase: str
    perturbed: tuple[str, ...]


def read_tofu(
    folder: Path = PACKAGED_TOFU, forget: str = "forget01", limit: int | None = None
) -> dict[str, list[TofuItem]]:
    """The four sets of an evaluation.

    Args:
        folder: with ``<forget>_perturbed.json``, ``retain_perturbed.json``, ``real_authors_perturbed.json`` and
            ``world_facts_perturbed.json``, one JSON object a line.
        forget: which forget set, one of :data:`FORGET_SPLITS`.
        limit: only so many questions of each set, the first ones; None is all.

    Returns:
        Set name to items.

    Raises:
        ConfigError: a file is missing or a record broken; the message names file and line.
    """
    stems = {FORGET: forget} | _KEPT_FILES
    return {name: _read_file(folder / f"{stem}_perturbed.json", limit) for name, stem in stems.items()}


def _read_file(path: Path, limit: int | None) -> list[TofuItem]:
    try:
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"TOFU's file {path} does not exist; give a folder with TOFU's own files.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"TOFU's file {path} cannot be read: {error}.") from None
    items = [_read_item(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ConfigError(f"TOFU's file {path} holds no questions.")
    return items[:limit]


def _read_item(path: Path, number: int, line: str) -> TofuItem:
    try:
        record: Mapping[str, Any] = json.loads(line)
        answer = record["answer"]
        item = TofuItem(
            record["question"], answer, record.get("paraphrased_answer", answer), tuple(record["perturbed_answer"])
        )
        valid = bool(item.perturbed) and all(
            isinstance(text, str) and text.strip()
            for text in (item.question, item.answer, item.paraphrase, *item.perturbed)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{path}, line {number}: expected an object with the texts question and answer and the list "
            "perturbed_answer."
        )
    return item
