"""Make the data of the ``concise`` delta: SmolLM2's own greedy answers, cut after the first sentence.

Run as ``python -m cmc_server.demo.concise_data --model FOLDER``. The prompts are in ``data/concise/prompts.yaml``; the
results lie beside them: one object a line, with ``messages`` whose last one is the answer. ``answered.jsonl`` holds all
of them, ``train.jsonl`` those to learn from, ``validation.jsonl`` some of the rest to choose settings by, and
``provenance.json`` says how they were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmc_server.demo.first_sentence import first_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cmc_server.delta.prompt import Message

DATA_FOLDER = Path(__file__).parent / "data" / "concise"
FILES = ("prompts.yaml", "answered.jsonl", "train.jsonl", "validation.jsonl", "heldout.jsonl")
SEED = 20261121
#: Enough for a first sentence; answers that serve as history, as a passage to read or as reference run on longer.
ANSWER_TOKENS = 64
HISTORY_TOKENS = 128
#: Longer first sentences are left out, so that brevity is learned from brief sentences only.
MAX_WORDS = 40
#: What is learned in the end: sentences of few words (lists have lines of their own), and few that begin alike, or a
#: strong delta begins every answer in the same way.
MAX_LEARNED_WORDS = 18
MAX_SAME_OPENING = 4
OPENING_WORDS = 3
#: Chats to choose settings by: few, and short, so that a look at them takes a minute.
NUM_VALIDATION = 40
MAX_VALIDATION_CHARACTERS = 1500
BATCH_TOKENS = 8192
SYSTEM_SHARE = 0.15
NUM_CHATS = 200
TURNS = (2, 2, 2, 3, 3, 4, 5, 7)
NUM_PASSAGES = 60
PASSAGE_TASKS = (
    "Summarise the following text.\n\n{passage}",
    "{passage}\n\nWhat is the main point of this text?",
    "Read this and tell me what you think:\n\n{passage}",
    "Which question does this text answer first?\n\n{passage}",
)


@dataclass(frozen=True)
class PromptBook:
    """The content of ``prompts.yaml``.

    Args:
        forms_per_subject: how many of its group's forms each subject is drawn with.
        groups: by name, ``forms`` with ``{x}`` and the ``subjects`` that take its place.
        systems: system prompts.
        follow_ups: what a user may say next in any chat.
        held_out: a prompt, or a mapping with ``system`` and ``prompt``, or with ``turns`` that begin with the user's.
    """

    forms_per_subject: int
    groups: dict[str, dict[str, list[str]]]
    systems: list[str]
    follow_ups: list[str]
    held_out: list[str | dict[str, Any]]

    @classmethod
    def read(cls, path: Path = DATA_FOLDER / "prompts.yaml") -> PromptBook:
        """Read the file."""
        import yaml

        return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))

    def training_prompts(self, rng: random.Random) -> list[str]:
        """Every subject with some of its group's forms, in random order, without repetition."""
        prompts: dict[str, None] = {}
        for group in self.groups.values():
            for subject in group["subjects"]:
                forms = rng.sample(group["forms"], min(self.forms_per_subject, len(group["forms"])))
                prompts.update((form.replace("{x}", subject), None) for form in forms)
        ordered = [prompt[0].upper() + prompt[1:] for prompt in prompts]
        rng.shuffle(ordered)
        return ordered

    def held_out_chats(self) -> list[list[Message]]:
        """The held-out prompts as messages."""
        return [_held_out_messages({"prompt": entry} if isinstance(entry, str) else entry) for entry in self.held_out]


def _held_out_messages(entry: dict[str, Any]) -> list[Message]:
    turns = entry["turns"] if "turns" in entry else [entry["prompt"]]
    messages = [_message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)]
    return [_message("system", entry["system"]), *messages] if "system" in entry else messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@dataclass
class Chat:
    """A training conversation while its answers are being made.

    Args:
        pending: user turns that have no answer yet.
        short_history: whether earlier answers are cut as well, as they are when the delta itself gave them.
        messages: what has been said so far.
        answer: the last answer, cut; None while there is none, or if it could not be cut.
    """

    pending: list[str]
    short_history: bool
    messages: list[Message] = field(default_factory=list)
    answer: str | None = None

    def ask(self) -> None:
        """Move the next user turn into the messages."""
        self.messages.append(_message("user", self.pending.pop(0)))

    def hear(self, text: str, complete: bool) -> None:
        """Take an answer: as history if more turns follow, else as the answer to learn."""
        cut = first_sentence(text, complete=complete)
        if not self.pending:
            self.answer = cut if cut is not None and len(cut.split()) <= MAX_WORDS else None
            return
        history = cut if self.short_history and cut else text.strip()
        self.messages.append(_message("assistant", history))


def draw_chats(book: PromptBook, seed: int) -> list[Chat]:
    """Single prompts, some of them under a system prompt, and chats of several turns."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    prompts = book.training_prompts(rng)
    chats = [Chat([prompt], short_history=False) for prompt in prompts]
    for _ in range(NUM_CHATS):
        turns = [rng.choice(prompts)]
        for _ in range(rng.choice(TURNS) - 1):
            turns.append(rng.choice(book.follow_ups if rng.random() < 0.6 else prompts))
        chats.append(Chat(turns, short_history=rng.random() < 0.5))
    for chat in chats:
        if rng.random() < SYSTEM_SHARE:
            chat.messages.append(_message("system", rng.choice(book.systems)))
    return chats


def passage_chats(texts: Sequence[str], seed: int) -> list[Chat]:
    """Long prompts, put together from answers given before, about 100 to 800 words each."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    chats = []
    for _ in range(NUM_PASSAGES):
        passage = "\n\n".join(rng.sample(list(texts), rng.choice((2, 3, 4, 6, 8, 10))))
        chats.append(Chat([rng.choice(PASSAGE_TASKS).replace("{passage}", passage)], short_history=False))
    return chats


class Answerer:
    """Greedy answers of a chat model, in batches of similar length.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        tokenizer.padding_side = "left"

    def __call__(self, chats: Sequence[Sequence[Message]], max_tokens: int = ANSWER_TOKENS) -> list[tuple[str, bool]]:
        """The answers, each with whether the model ended it by itself."""
        from tqdm import tqdm

        prompts = [self._encode(chat) for chat in chats]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: dict[int, tuple[str, bool]] = {}
        with tqdm(total=len(order), desc="answers", file=sys.stderr) as progress:
            while order:
                size = max(1, min(64, BATCH_TOKENS // len(prompts[order[min(63, len(order) - 1)]])))
                batch, order = order[:size], order[size:]
                answers.update(zip(batch, self._generate([prompts[index] for index in batch], max_tokens), strict=True))
                progress.update(len(batch))
        return [answers[index] for index in range(len(prompts))]

    def _encode(self, chat: Sequence[Message]) -> list[int]:
        text = self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[tuple[str, bool]]:
        import torch

        padded = self._tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(**padded, max_new_tokens=max_tokens, do_sample=False)
        eos = self._tokenizer.eos_token_id
        rows = output[:, padded["input_ids"].shape[1] :].tolist()
        return [
            (self._tokenizer.decode(row[: row.index(eos)] if eos in row else row, skip_special_tokens=True), eos in row)
            for row in rows
        ]


def make_data(model_path: str, folder: Path = DATA_FOLDER, seed: int = SEED) -> dict[str, Any]:
    """Write the data files and ``provenance.json`` into a folder.

    Args:
        model_path: folder or hub id of the template LLM.
        folder: where ``prompts.yaml`` lies and the results go.
        seed: of the draw; the answers themselves are greedy.

    Returns:
        The provenance.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    book = PromptBook.read(folder / "prompts.yaml")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    answerer = Answerer(model, AutoTokenizer.from_pretrained(model_path))
    chats = draw_chats(book, seed)
    texts = _converse(answerer, chats)
    passages = passage_chats(texts, seed)
    _converse(answerer, passages)
    answered = [_record(chat.messages, chat.answer) for chat in [*chats, *passages] if chat.answer]
    records = select(answered)
    held_out = book.held_out_chats()
    # Where nothing can be cut, the reference is the answer as far as it goes; a prompt is not dropped for its answer.
    references = [
        first_sentence(text, complete=complete) or text.strip() for text, complete in answerer(held_out, HISTORY_TOKENS)
    ]
    counts = {"drawn": len(chats) + len(passages), "answered": len(answered)}
    unseen = validation(answered, records)
    counts |= {"train": len(records), "heldout": len(held_out), "validation": len(unseen)}
    write_records(folder / "answered.jsonl", answered)
    write_records(folder / "train.jsonl", records)
    write_records(folder / "validation.jsonl", unseen)
    write_records(folder / "heldout.jsonl", [_record(*pair) for pair in zip(held_out, references, strict=True)])
    provenance = {
        "answers_of": "SmolLM2-135M-Instruct (greedy, bfloat16)",
        "model_source": _model_source(Path(model_path)),
        "made_by": "python -m cmc_server.demo.concise_data",
        "seed": seed,
        "answer_tokens": {"train": ANSWER_TOKENS, "other": HISTORY_TOKENS},
        "counts": counts,
        "sha256": {name: _sha256(folder / name) for name in FILES},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def select(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records to learn from, in their order: brief answers, and of those that begin alike only the first few."""
    openings: Counter[str] = Counter()
    selected = []
    for record in records:
        answer: str = record["messages"][-1]["content"]
        words = answer.split()
        opening = " ".join(words[:OPENING_WORDS])
        if (len(words) <= MAX_LEARNED_WORDS or "\n" in answer) and openings[opening] < MAX_SAME_OPENING:
            selected.append(record)
            openings[opening] += 1
    return selected


def validation(answered: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the records whose question no training record asks last: unseen, though of the same forms."""
    asked = {record["messages"][-2]["content"] for record in train}
    rest = [
        record
        for record in answered
        if record["messages"][-2]["content"] not in asked
        and sum(len(message["content"]) for message in record["messages"]) < MAX_VALIDATION_CHARACTERS
    ]
    random.Random(0).shuffle(rest)  # noqa: S311 - a reproducible draw, no secret
    return rest[:NUM_VALIDATION]


def _model_source(folder: Path) -> Any:
    """Package and hash of a model that ``cmc_server.demo.models`` made; None for any other."""
    path = folder / "source.json"
    return json.loads(path.read_text(encoding="utf-8"))["source"] if path.is_file() else None


def _converse(answerer: Answerer, chats: Sequence[Chat]) -> list[str]:
    """Answer every turn of every chat; returns the answers that were history."""
    texts = []
    while waiting := [chat for chat in chats if chat.pending]:
        for chat in waiting:
            chat.ask()
        for last, max_tokens in ((True, ANSWER_TOKENS), (False, HISTORY_TOKENS)):
            asked = [chat for chat in waiting if last is not bool(chat.pending)]
            answers = answerer([chat.messages for chat in asked], max_tokens)
            for chat, (text, complete) in zip(asked, answers, strict=True):
                chat.hear(text, complete)
                if not last:
                    texts.append(text.strip())
    return [text for text in texts if text]


def _record(messages: Sequence[Message], answer: str) -> dict[str, Any]:
    return {"messages": [*messages, _message("assistant", answer)]}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=DATA_FOLDER, help="folder with prompts.yaml; results go there")
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(make_data(arguments.model, arguments.output), indent=2) + "\n")


if __name__ == "__main__":
    main()
