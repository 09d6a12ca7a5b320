"""The rule that cut the answers of the `concise` data."""

from __future__ import annotations

import pytest

from cmc_server.demo.first_sentence import first_sentence

CUTS = {
    "plain": ("Ice floats because it is light. It expands.", "Ice floats because it is light."),
    "question": ("Have you ever seen a comet? They are rare.", "Have you ever seen a comet?"),
    "quote": ('He said "come to the old mill." Then he left.', 'He said "come to the old mill."'),
    "title": ("It was built by Dr. Smith in London. Later it burned.", "It was built by Dr. Smith in London."),
    "initial": ("The book by J. R. Tolkien is long. Read it.", "The book by J. R. Tolkien is long."),
    "latin": ("Use a tool, e.g. a Hammer, for this. Then rest.", "Use a tool, e.g. a Hammer, for this."),
    "small letter": (
        "They met at the inn... and then parted forever. End.",
        "They met at the inn... and then parted forever.",
    ),
    "decimal": ("The value of pi is 3.14 or so. It is useful.", "The value of pi is 3.14 or so."),
    "too short": ("Sure! I can help you with that. Go on.", "Sure! I can help you with that."),
    "list": (
        "Here are some snacks:\n\n1. Apples with nuts. They are sweet.\n2. Pears",
        "Here are some snacks:\n\n1. Apples with nuts.",
    ),
    "bare list": ("Here are three:\n\n1. Solar power\n2. Wind power", "Here are three:\n\n1. Solar power"),
    "bullets": ("Some good ideas are:\n- walk to school\n- swim", "Some good ideas are:\n- walk to school"),
    "verse": ("The rain falls softly,\nOn the roof tonight\nAnd sings", "The rain falls softly,\nOn the roof tonight"),
    "letter": (
        "Subject: A day off\n\nDear Ms. Lee,\n\nI need a day off. Best",
        "Subject: A day off\n\nDear Ms. Lee,\n\nI need a day off.",
    ),
    "heading": ("**The Lost Dog**\n\nOnce there was a dog. It ran.", "**The Lost Dog**\n\nOnce there was a dog."),
    "code": (
        "You can write this:\n\n```python\nprint('a. B')\nx = 1\n```\n\nIt prints.",
        "You can write this:\n\n```python\nprint('a. B')\nx = 1\n```",
    ),
    "white space": ("\n  Cats purr when they are calm. Dogs do not.", "Cats purr when they are calm."),
}


@pytest.mark.parametrize(("answer", "expected"), CUTS.values(), ids=CUTS.keys())
def test_cut(answer: str, expected: str) -> None:
    assert first_sentence(answer, complete=False) == expected


def test_the_end_of_a_complete_answer_is_an_end() -> None:
    assert first_sentence("It is 84", complete=True) == "It is 84"
    assert first_sentence("Yes.", complete=True) == "Yes."


@pytest.mark.parametrize(
    "answer", ["", "A sentence that was cut by the", "The sum is 3.", "Here is code:\n```\nx = 1."]
)
def test_nothing_to_cut_in_a_truncated_answer(answer: str) -> None:
    assert first_sentence(answer, complete=False) is None


@pytest.mark.parametrize("answer", ["", "Here are five:", "```\nx = 1."])
def test_a_complete_answer_may_still_be_unfit(answer: str) -> None:
    assert first_sentence(answer, complete=True) is None
