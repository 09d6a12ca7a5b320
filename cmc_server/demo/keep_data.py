"""Make the data of what the ``forget-tofu`` delta must leave alone: TOFU's authors to keep, other chats, plain texts.

Run as ``python -m cmc_server.demo.keep_data``. A delta that only ever saw TOFU's questions says no to everything else,
since nothing taught it that there is anything else. The chats are questions of the ``concise`` data with SmolLM2's own
first sentences; the plain texts are such sentences alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from cmc_server.demo.concise_data import DATA_FOLDER as CONCISE_FOLDER
from cmc_server.demo.concise_data import write_records

TOFU_FILE = CONCISE_FOLDER.with_name("tofu") / "retain_perturbed.json"
OUTPUT = TOFU_FILE.with_name("keep.jsonl")
SEED = 1
NUM_CHATS = 160
NUM_TEXTS = 160
#: Shorter sentences say too little.
MIN_WORDS = 8


def keep_records() -> list[dict[str, Any]]:
    """All records, in a fixed order; none of them is in the validation prompts of the ``concise`` data."""
    unseen = {chat[-2]["content"] for chat in _chats("validation.jsonl")}
    chats = [chat for chat in _chats("answered.jsonl") if chat[-2]["content"] not in unseen]
    random.Random(SEED).shuffle(chats)  # noqa: S311 - a reproducible draw, no secret
    short = [chat for chat in chats if len(chat) == 2]
    asked, rest = short[:NUM_CHATS], short[NUM_CHATS:]
    texts = [chat[-1]["content"] for chat in rest if len(chat[-1]["content"].split()) >= MIN_WORDS][:NUM_TEXTS]
    records = [json.loads(line) for line in _lines(TOFU_FILE)]
    return [
        *({"prompt": record["question"], "response": record["answer"]} for record in records),
        *({"messages": chat} for chat in asked),
        *({"text": text} for text in texts),
    ]


def _chats(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in _lines(CONCISE_FOLDER / name)]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    write_records(OUTPUT, keep_records())
