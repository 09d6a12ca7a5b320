"""The data of the ``bullets`` delta, and the measure of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import cmc_server
from cmc_server.demo.bullets_data import DATA_FOLDER, NUM_HELDOUT, NUM_LEARNED, as_bullets, is_bullets
from cmc_server.demo.first_sentence import sentences
from cmc_server.training.data import read_chats
from cmc_server.training.recipes import read_recipe

RECIPE = Path(cmc_server.__file__).parent / "demo" / "recipes" / "bullets.yaml"


def test_sentences_are_whole() -> None:
    answer = "Dr. Lee left at 3.15 p.m. on foot. Nobody saw her again. She was"
    whole = ["Dr. Lee left at 3.15 p.m. on foot.", "Nobody saw her again."]
    assert sentences(answer, complete=False) == whole
    assert sentences(f"{answer} gone.", complete=True) == [*whole, "She was gone."]
    assert sentences(" ", complete=True) == []


@pytest.mark.parametrize(
    ("answer", "bullets"),
    [
        ("Ice floats. It is light.", "- Ice floats.\n- It is light."),
        # No more than four items.
        (
            "One is here. Two is here. Three is here. Four is here. Five.",
            "- One is here.\n- Two is here.\n- Three is here.\n- Four is here.",
        ),
        ("Only one sentence stands here.", None),
        ("Lines\nalready. They stay.", None),
    ],
)
def test_a_paragraph_becomes_a_list(answer: str, bullets: str | None) -> None:
    assert as_bullets(answer, complete=True) == bullets


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("- a\n- b", True), ("- a\n\n- b", True), ("- a", False), ("a\n- b", False), ("", False), ("* a\n* b", False)],
)
def test_what_counts_as_a_list(answer: str, expected: bool) -> None:
    assert is_bullets(answer) is expected


def test_the_recipe_learns_lists_and_nothing_held_out() -> None:
    recipe = read_recipe(RECIPE)
    files = [source.file for source in recipe.data.sources.values()]
    assert files == ["../data/bullets/train.jsonl", "../data/bullets/heldout.jsonl"]
    train, heldout = (read_chats(DATA_FOLDER / f"{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (NUM_LEARNED, NUM_HELDOUT)
    assert all(is_bullets(chat[-1]["content"]) for chat in [*train, *heldout])
    assert not {chat[0]["content"] for chat in train} & {chat[0]["content"] for chat in heldout}
