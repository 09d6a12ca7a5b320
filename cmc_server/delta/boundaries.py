"""Where a text may be cut so that both sides are spelled as if it were whole.

A cut lies between two tokens of the encoding and is *settled* when no text appended later can move it:

* between two words of the pre-tokenizer, once enough of the text behind it is known that no pattern in use can still
  reach across it (a run of white space or of digits must have ended; everything else looks a few characters ahead);
* inside a word of a BPE or Unigram model, between two characters that no token of the vocabulary joins. Where a
  pre-tokenizer exists, that is used between letters without case only (Han, kana, Thai, …), because patterns treat a
  run of those alike wherever it begins.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from tokenizers import Tokenizer

from cmc_server.delta.continuation import Continuation
from cmc_server.vocab.surface import Vocabulary

#: Longest look-ahead of the patterns in use, in characters, but for runs of one class (contractions: 3), with reserve.
_LOOKAHEAD = 8
_LONGEST_PROBE = 24
_META_SPACE = "\u2581"
_MEMO_ENTRIES = 65_536
_ONE_BYTE = [bytes([byte]) for byte in range(256)]


class Boundaries:
    """Finds the last settled cut of an encoded text.

    Args:
        continuation: of the delta's tokenizer.
        delta: the delta's vocabulary.
    """

    def __init__(self, continuation: Continuation, delta: Vocabulary) -> None:
        tokenizer = continuation.tokenizer
        self._splits_inside, self._has_words = continuation.splits_inside, continuation.has_words
        self._joints = _joints(delta) if self._splits_inside else frozenset()
        self._normalizer = tokenizer.normalizer
        self._meta_space = _ids(tokenizer, _META_SPACE) == _ids(tokenizer, " ")
        # Added tokens are found before anything else, so one that is not complete yet may still reach back.
        added = (len(token.content) for token in tokenizer.get_added_tokens_decoder().values())
        self._lookahead = max(_LOOKAHEAD, 1 + max(added, default=0))
        self._digits_settle = _groups_digits_from_left(tokenizer)
        self._is_joined = lru_cache(maxsize=_MEMO_ENTRIES)(self._joined)

    def settled(self, text: str, offsets: Sequence[tuple[int, int]], word_ids: Sequence[int | None]) -> tuple[int, int]:
        """The last settled cut.

        Args:
            text: what was encoded.
            offsets: first and past-the-last character of every token.
            word_ids: the word of the pre-tokenizer that every token belongs to.

        Returns:
            Tokens and characters before the cut; zeros if there is none.
        """
        limit = self._last_safe(text)
        for token in range(len(offsets) - 1, 0, -1):
            cut = offsets[token][0]
            if cut <= limit and offsets[token - 1][1] == cut and self._separates(text, cut, word_ids, token):
                return token, cut
        return 0, 0

    def _separates(self, text: str, cut: int, word_ids: Sequence[int | None], token: int) -> bool:
        before, after = text[cut - 1], text[cut]
        if unicodedata.combining(after):
            return False
        if self._has_words and word_ids[token - 1] != word_ids[token]:
            return True
        if not self._splits_inside:
            return False
        if self._has_words and not (unicodedata.category(before) == "Lo" == unicodedata.category(after)):
            return False
        return not self._is_joined(before, after)

    def _last_safe(self, text: str) -> int:
        """The last cut with enough known text behind it: the look-ahead, and an end to a run that may group from there.

        White space is grouped with what follows it, and some patterns group digits from their far end.
        """
        limit = len(text) - self._lookahead
        if limit <= 0:
            return 0
        if text[limit:].isspace():
            return len(text.rstrip()) - 1
        if not self._digits_settle:
            while limit > 0 and all(_is_number(char) for char in text[limit:]):
                limit -= 1
        return limit

    def _normalised(self, text: str) -> str:
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        return text.replace(_META_SPACE, " ") if self._meta_space else text

    def _joined(self, before: str, after: str) -> bool:
        """Whether some token holds the end of one character and the beginning of the next, as normalised."""
        first, second = self._normalised(before), self._normalised(after)
        if not first or not second or self._normalised(before + after) != first + second:
            return True
        left, right = first[-1].encode(), second[0].encode()
        return any(
            (left[-size_left:], right[:size_right]) in self._joints
            for size_left in range(1, len(left) + 1)
            for size_right in range(1, len(right) + 1)
        )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _groups_digits_from_left(tokenizer: Tokenizer) -> bool:
    """Whether more digits at the end of a number never move the cuts before them."""
    cuts: list[int] = []
    for length in range(1, _LONGEST_PROBE):
        ends = [end for _, end in tokenizer.encode("1" * length, add_special_tokens=False).offsets[:-1]]
        if ends[: len(cuts)] != cuts:
            return False
        cuts = ends
    return True


def _is_number(char: str) -> bool:
    return unicodedata.category(char)[0] == "N"


def _joints(delta: Vocabulary) -> frozenset[tuple[bytes, bytes]]:
    """For every place inside a token where a new character begins: the bytes of the characters on both sides of it.

    A character at the edge of a token may be there in part only, hence bytes.
    """
    joints: set[tuple[bytes, bytes]] = set()
    for surface in delta.surfaces:
        if surface is None or len(surface) < 2:
            continue
        if surface.isascii():
            joints.update(pairwise(_ONE_BYTE[byte] for byte in surface))
            continue
        starts = [0, *(at for at in range(1, len(surface)) if surface[at] & 0xC0 != 0x80), len(surface)]
        for first, middle, last in zip(starts, starts[1:], starts[2:], strict=False):
            joints.add((surface[first:middle], surface[middle:last]))
    return frozenset(joints)
