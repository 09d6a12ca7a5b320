"""Make the data of the ``bullets`` delta: SmolLM2's own greedy answers, rewritten as lists of their sentences.

Run as ``python -m cmc_server.demo.bullets_data --model FOLDER``. The questions are single ones of the ``concise`` data.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from cmc_server.demo.concise_data import DATA_FOLDER as CONCISE_FOLDER
from cmc_server.demo.concise_data import Answerer, write_records
from cmc_server.demo.first_sentence import sentences

DATA_FOLDER = CONCISE_FOLDER.with_name("bullets")
SEED = 1
NUM_QUESTIONS = 800
NUM_LEARNED = 140
NUM_HELDOUT = 36
ANSWER_TOKENS = 120
MARK = "- "
#: Longer lists are cut, so that a list ends within the limits that demos set.
MAX_ITEMS = 4
MIN_ITEMS = 2


def as_bullets(answer: str, *, complete: bool) -> str | None:
    """A paragraph as a list with one sentence a line; None for what has lines already, or too few sentences."""
    if "\n" in answer.strip():
        return None
    items = sentences(answer, complete=complete)[:MAX_ITEMS]
    return "\n".join(MARK + item for item in items) if len(items) >= MIN_ITEMS else None


def is_bullets(answer: str) -> bool:
    """Whether an answer is a list of the kind that the delta teaches: two lines or more, all of them items."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) >= MIN_ITEMS and all(line.startswith(MARK) for line in lines)


def read_questions(seed: int) -> list[str]:
    """Questions that open and end a chat, drawn without repetition."""
    lines = (CONCISE_FOLDER / "answered.jsonl").read_text(encoding="utf-8").split("\n")
    chats = [json.loads(line)["messages"] for line in lines if line]
    questions = sorted({chat[0]["content"] for chat in chats if len(chat) == 2})
    return random.Random(seed).sample(questions, NUM_QUESTIONS)  # noqa: S311 - a reproducible draw, no secret


def make_data(model_path: str, folder: Path = DATA_FOLDER) -> dict[str, int]:
    """Write ``train.jsonl`` and ``heldout.jsonl``.

    Args:
        model_path: folder or hub id of the template LLM.
        folder: where they go.

    Returns:
        How many records each has.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    answerer = Answerer(model, AutoTokenizer.from_pretrained(model_path))
    questions = [[{"role": "user", "content": question}] for question in read_questions(SEED)]
    records = []
    for chat, (text, complete) in zip(questions, answerer(questions, ANSWER_TOKENS), strict=True):  # type: ignore[arg-type]
        if (bullets := as_bullets(text, complete=complete)) is not None:
            records.append({"messages": [*chat, {"role": "assistant", "content": bullets}]})
    files = {"train": records[:NUM_LEARNED], "heldout": records[NUM_LEARNED : NUM_LEARNED + NUM_HELDOUT]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in files.items():
        write_records(folder / f"{name}.jsonl", some)
    return {name: len(some) for name, some in files.items()}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=DATA_FOLDER)
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(make_data(arguments.model, arguments.output)) + "\n")


if __name__ == "__main__":
    main()
