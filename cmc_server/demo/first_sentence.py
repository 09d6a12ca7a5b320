"""Cut an answer into sentences: the rule that made the data of the deltas ``concise`` and ``bullets``."""

from __future__ import annotations

import itertools
import re

#: A piece with fewer words says too little ("Sure!", "Yes."); the next sentence then belongs to it.
MIN_WORDS = 5
#: A full stop after one of these ends no sentence. Lower case, without the last full stop.
ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "jr",
        "sr",
        "gen",
        "gov",
        "ph.d",
        "inc",
        "ltd",
        "co",
        "dept",
        "vs",
        "etc",
        "e.g",
        "i.e",
        "no",
        "approx",
        "ca",
        "cf",
        "fig",
        "u.s",
        "u.k",
        "a.m",
        "p.m",
    ]
)

_STOP = re.compile(r"(?P<mark>[.!?]+)[\"'”’)\]*_]*(?=\s|$)")
_BREAK = re.compile(r"\n")
_FENCE = re.compile(r"^\s*```", re.MULTILINE)
_LIST_NUMBER = re.compile(r"(^|\n)[ \t>*_(]*(\d+|[A-Za-z])$")
_HEADING = re.compile(r"^(#+ .*|\*\*[^*]*\*\*:?|[A-Z][\w ]{0,20}: [^.!?]*)$")


def first_sentence(answer: str, *, complete: bool) -> str | None:
    """The answer up to the end of its first sentence.

    A sentence ends with ``.``, ``!`` or ``?`` before white space, or with its line (an item of a list, a verse). No end
    are: abbreviations and initials, decimals, the number of a list item, a mark before a small letter, a line that ends
    with a colon or a comma, a heading, and anything inside a code block, which ends with its fence. An introduction
    such as "Here are five ideas:" therefore runs to the end of the first item.

    Args:
        answer: the text of an answer.
        complete: False if the answer was cut off by a limit, so that its very end is no end of a sentence.

    Returns:
        The piece without white space around it, or None if the answer holds no such end.
    """
    text = answer.strip()
    for end in _ends(text, complete):
        piece = text[:end].rstrip()
        if len(piece.split()) >= MIN_WORDS and not piece.endswith(":"):
            return piece
    return text if complete and text and not text.endswith(":") and not _inside_fence(text) else None


def sentences(answer: str, *, complete: bool) -> list[str]:
    """All whole sentences of an answer; what is no end of a sentence is as in :func:`first_sentence`.

    Args:
        answer: the text of an answer.
        complete: False if the answer was cut off by a limit; what follows the last end is then left out.
    """
    text = answer.strip()
    starts = [0, *_ends(text, complete)]
    pieces = [text[start:end].strip() for start, end in itertools.pairwise(starts)]
    return [piece for piece in pieces if piece]


def _ends(text: str, complete: bool) -> list[int]:
    stops = [match.end() for match in _STOP.finditer(text) if _is_stop(text, match, complete)]
    breaks = [match.start() for match in _BREAK.finditer(text) if _is_line_end(text[: match.start()])]
    return sorted(end for end in {*stops, *breaks} if not _inside_fence(text[:end]))


def _is_stop(text: str, match: re.Match[str], complete: bool) -> bool:
    rest = text[match.end() :].lstrip()
    if not rest:
        return complete
    if rest[0].islower():
        return False
    if match["mark"] != ".":
        return True
    before = text[: match.start()]
    word = before.rsplit(maxsplit=1)[-1].lstrip("(\"'“‘*_").lower() if before.split() else ""
    is_initial = len(word) == 1 and word.isalpha()
    return word not in ABBREVIATIONS and not is_initial and _LIST_NUMBER.search(before) is None


def _is_line_end(before: str) -> bool:
    line = before.rsplit("\n", 1)[-1].strip()
    return bool(line) and not line.endswith((":", ",")) and _HEADING.match(line) is None


def _inside_fence(before: str) -> bool:
    return len(_FENCE.findall(before)) % 2 == 1
