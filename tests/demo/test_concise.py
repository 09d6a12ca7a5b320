"""The delta that ships: what is in its folder, where it comes from, and that its held-out prompts are held out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from rapidfuzz import fuzz, process
from tiny_template import make_template

import cmc_server
from cmc_server.config import DeltaSource
from cmc_server.delta.prompt import Message
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.demo.concise_data import DATA_FOLDER, Answerer, Chat, PromptBook, draw_chats, select, validation
from cmc_server.demo.first_sentence import first_sentence
from cmc_server.training.data import file_hash, read_chats
from cmc_server.training.recipes import read_recipe
from cmc_server.training.record import recipe_hash

DEMO = Path(cmc_server.__file__).parent / "demo"
FOLDER = DEMO / "concise"
RECIPE = DEMO / "recipes" / "concise.yaml"


@pytest.fixture(scope="module")
def artifact() -> DeltaArtifact:
    return open_delta(DeltaSource(name="concise", path=str(FOLDER)))


@pytest.fixture(scope="module")
def book() -> PromptBook:
    return PromptBook.read()


def test_the_folder_is_a_small_delta(artifact: DeltaArtifact) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16 * 2**20
    assert len(artifact.tokenizer()) == artifact.vocab_size == 49_152
    assert artifact.manifest.name == "concise"
    assert artifact.manifest.license == "Apache-2.0"
    assert artifact.strength == 1.0


def test_it_was_trained_with_the_recipe_and_data_beside_it(artifact: DeltaArtifact) -> None:
    recipe = read_recipe(RECIPE)
    training = artifact.manifest.training
    assert training["recipe_sha256"] == recipe_hash(recipe)
    assert training["seed"] == recipe.seed
    assert artifact.manifest.template_llm == recipe.template
    for role, source in recipe.data.sources.items():
        assert source.file is not None
        assert training["data"][role]["sha256"] == file_hash(RECIPE.parent / source.file)
    assert training["metrics"]["heldout_loss"] < training["metrics"]["heldout_loss_without_delta"]


def test_the_data_are_those_of_their_provenance() -> None:
    provenance = json.loads((DATA_FOLDER / "provenance.json").read_text("utf-8"))
    assert provenance["sha256"] == {name: file_hash(DATA_FOLDER / name) for name in provenance["sha256"]}
    assert provenance["counts"]["train"] == len(read_chats(DATA_FOLDER / "train.jsonl")) >= 400
    assert provenance["counts"]["heldout"] == len(read_chats(DATA_FOLDER / "heldout.jsonl")) == 60


def test_the_selection_repeats() -> None:
    answered = [{"messages": messages} for messages in read_chats(DATA_FOLDER / "answered.jsonl")]
    selected = [record["messages"] for record in select(answered)]
    assert selected == read_chats(DATA_FOLDER / "train.jsonl")


def test_validation_prompts_are_not_trained_on() -> None:
    answered, train = (
        [{"messages": messages} for messages in read_chats(DATA_FOLDER / name)]
        for name in ("answered.jsonl", "train.jsonl")
    )
    chosen = [record["messages"] for record in validation(answered, train)]
    assert chosen == read_chats(DATA_FOLDER / "validation.jsonl") and len(chosen) == 40
    assert not {chat[-2]["content"] for chat in chosen} & {record["messages"][-2]["content"] for record in train}


def test_answers_are_first_sentences() -> None:
    for messages in read_chats(DATA_FOLDER / "train.jsonl"):
        answer = messages[-1]["content"]
        assert first_sentence(answer, complete=True) == answer


def test_prompts_of_several_kinds_are_trained_on() -> None:
    chats = read_chats(DATA_FOLDER / "train.jsonl")
    assert sum(messages[0]["role"] == "system" for messages in chats) > 50
    assert sum(len(messages) > 3 for messages in chats) > 50
    assert sum(len(messages[-2]["content"].split()) > 200 for messages in chats) > 10


def test_held_out_prompts_resemble_no_training_prompt(book: PromptBook) -> None:
    def normal(prompt: str) -> str:
        return prompt.lower().strip(" .?!")

    trained = {
        normal(message["content"])
        for messages in read_chats(DATA_FOLDER / "train.jsonl")
        for message in messages
        if message["role"] == "user"
    }
    held_out = [normal(messages[-1]["content"]) for messages in book.held_out_chats()]
    assert len(set(held_out)) == 60
    for prompt in held_out:
        nearest, score, _ = process.extractOne(prompt, trained, scorer=fuzz.token_sort_ratio)
        assert score < 80, f"{prompt!r} resembles {nearest!r}"


def test_the_draw_repeats_with_its_seed(book: PromptBook) -> None:
    first, second, other = draw_chats(book, 1), draw_chats(book, 1), draw_chats(book, 2)
    assert first == second != other
    prompts = book.training_prompts(random.Random(1))
    assert len(set(prompts)) == len(prompts) > 1000
    assert not any("{x}" in prompt for prompt in prompts)


def test_a_chat_keeps_its_history_and_learns_its_last_answer() -> None:
    chat = Chat(["a", "b"], short_history=True)
    chat.ask()
    chat.hear("This is a whole sentence. And this another", complete=False)
    assert chat.messages[-1]["content"] == "This is a whole sentence."
    chat.ask()
    chat.hear("That is the last answer. More", complete=False)
    assert chat.answer == "That is the last answer." and not chat.pending
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user"]


def test_an_answer_that_cannot_be_cut_is_not_learned() -> None:
    chat = Chat(["a"], short_history=False)
    chat.ask()
    chat.hear("word " * 60, complete=False)
    assert chat.answer is None


def test_answers_come_in_the_order_of_their_chats(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_template(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    answerer = Answerer(model, tokenizer)
    chats: list[list[Message]] = [
        [Message(role="user", content=text)] for text in ("a longer question", "short", "mid one")
    ]
    together = answerer(chats, max_tokens=6)
    assert together == [answerer([one], max_tokens=6)[0] for one in chats]
