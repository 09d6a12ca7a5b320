"""What a delta reads: the response so far, spelled in the delta's own tokens.

With y_1..y_n the response tokens and j the last one whose match is neither exact nor special::

    delta input = prompt ids + spell(y_1..y_j) + map(y_{j+1}..y_n)

:meth:`Speller.spell` is the definition, written as one pass over everything. :class:`DeltaInput` keeps the same list up
to date token by token: only the text after the last boundary that no token can cross is encoded again.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from cmc_server.delta.boundaries import Boundaries
from cmc_server.delta.continuation import read_continuation
from cmc_server.vocab.pm_mined import MatchKind
from cmc_server.vocab.surface import Vocabulary
from cmc_server.vocab.vocab_map import VocabularyMap

_ESCAPED_BYTES = re.compile("([\udc80-\udcff]+)")
_MEMO_ENTRIES = 8192
_MEMO_TEXT = 64
_FOLLOWED = (int(MatchKind.EXACT), int(MatchKind.SPECIAL))
#: In a delta input, the place of a last token that was sampled, but has not reached the host.
UNSEEN = -1


class Speller:
    """Spells user tokens in one delta's tokens.

    Args:
        user: the user LLM's vocabulary.
        delta: the delta's vocabulary.
        vocab_map: the map from the one to the other.
        tokenizer: the delta's fast tokenizer.
    """

    def __init__(
        self, user: Vocabulary, delta: Vocabulary, vocab_map: VocabularyMap, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._surfaces = user.surfaces
        self._special = user.special_ids
        self._bos_id = user.bos_id
        self._byte_ids = byte_table(delta)
        continuation = read_continuation(tokenizer, delta)
        self._tokenizer = continuation.tokenizer
        self._boundaries = Boundaries(continuation, delta)
        self.delta_ids: list[int] = vocab_map.delta_ids.tolist()
        self.follows: list[bool] = np.isin(vocab_map.match, _FOLLOWED).tolist()
        self._encode_memo = lru_cache(maxsize=_MEMO_ENTRIES)(self._encode)

    def spell(self, user_ids: Sequence[int]) -> list[int]:
        """Spell whole tokens from the first to the last: the reference, without any state.

        Stretches of text between special tokens are joined as bytes and encoded as continuations. A special token that
        is mapped becomes its delta id; one that is not contributes nothing.
        """
        spelled: list[int] = []
        stretch = b""
        for user_id in user_ids:
            if user_id in self._special:
                spelled += self._spell_bytes(stretch)
                stretch = b""
                spelled += self.special(user_id)
            else:
                stretch += self.surface(user_id)
        return spelled + self._spell_bytes(stretch)

    def spell_prompt(self, user_ids: Sequence[int]) -> list[int]:
        """The prompt of a completion in delta tokens: a leading bos is dropped, the rest spelled."""
        drop = 1 if user_ids and user_ids[0] == self._bos_id else 0
        return self.spell(user_ids[drop:])

    def delta_input(self, prompt_ids: Sequence[int], response: Sequence[int]) -> list[int]:
        """The definition above in one call; the slow reference for :class:`DeltaInput`."""
        end = len(response)
        while end and self.is_followed(response[end - 1]):
            end -= 1
        return [*prompt_ids, *self.spell(response[:end]), *(self.delta_ids[user_id] for user_id in response[end:])]

    def is_followed(self, user_id: int) -> bool:
        """Whether the delta reads this token through the map (exact or special) without spelling anything again."""
        return user_id < len(self.follows) and self.follows[user_id]

    def is_special(self, user_id: int) -> bool:
        """Whether a user token is special."""
        return user_id in self._special

    def special(self, user_id: int) -> list[int]:
        """A special token's delta id, or nothing if it is unmapped."""
        delta_id = self.delta_ids[user_id] if user_id < len(self.delta_ids) else -1
        return [delta_id] if delta_id >= 0 else []

    def surface(self, user_id: int) -> bytes:
        """A user token's text; empty beyond the vocabulary."""
        return (self._surfaces[user_id] or b"") if user_id < len(self._surfaces) else b""

    def bytes_as_tokens(self, data: bytes) -> list[int]:
        """One byte token per byte, where the delta has them."""
        return [self._byte_ids[byte] for byte in data if byte in self._byte_ids]

    def encode(self, text: str) -> tuple[tuple[int, ...], int, int]:
        """Encode valid text as a continuation.

        Returns:
            The ids; how many of them no later text can change; how many characters those cover.
        """
        return self._encode_memo(text) if len(text) <= _MEMO_TEXT else self._encode(text)

    def _encode(self, text: str) -> tuple[tuple[int, ...], int, int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return (tuple(encoding.ids), *self._boundaries.settled(text, encoding.offsets, encoding.word_ids))

    def _spell_bytes(self, data: bytes) -> list[int]:
        spelled: list[int] = []
        for part in _ESCAPED_BYTES.split(data.decode("utf-8", "surrogateescape")):
            if _ESCAPED_BYTES.match(part):
                spelled += self.bytes_as_tokens(part.encode("utf-8", "surrogateescape"))
            elif part:
                spelled += self._tokenizer.encode(part, add_special_tokens=False).ids
        return spelled


class WholeDeltaInput:
    """The delta input of one request, spelled as a whole whenever it grows: what :class:`DeltaInput` must equal.

    Args and attributes are the same.
    """

    def __init__(self, speller: Speller, prompt_ids: Sequence[int]) -> None:
        self._speller = speller
        self._prompt_ids = list(prompt_ids)
        self._response: list[int] = []
        self.ids: list[int] = list(prompt_ids)
        self.num_respellings = 0

    @property
    def num_settled(self) -> int:
        """How many leading ids never change again."""
        return len(self._prompt_ids)

    def extend(self, user_ids: Iterable[int]) -> int:
        """Append response tokens; how many leading ids are the same as before the call."""
        before = self.ids
        fresh = list(user_ids)
        self.num_respellings += not all(map(self._speller.is_followed, fresh))
        self._response += fresh
        self.ids = self._speller.delta_input(self._prompt_ids, self._response)
        pairs = enumerate(zip(before, self.ids, strict=False))
        return next((index for index, (old, new) in pairs if old != new), min(len(before), len(self.ids)))


class DeltaInput:
    """The delta input of one request, kept up to date.

    Args:
        speller: for the pair of vocabularies.
        prompt_ids: the prompt in delta tokens.

    Attributes:
        ids: the delta input; the caller must not change it.
        num_respellings: how often the end of the response was spelled, where the map alone did not say how it goes on.
    """

    def __init__(self, speller: Speller, prompt_ids: Sequence[int]) -> None:
        self._speller = speller
        self.ids: list[int] = list(prompt_ids)
        self.num_respellings = 0
        self._settled = len(self.ids)  # ids before this index never change again
        self._text = ""  # text after the last settled boundary
        self._decoder = _decoder()
        self._unspelled: list[int] = []  # user tokens since the last spelling, so far only mapped

    @property
    def num_settled(self) -> int:
        """How many leading ids never change again."""
        return self._settled

    def extend(self, user_ids: Iterable[int]) -> int:
        """Append response tokens.

        Returns:
            How many leading ids are the same as before the call.
        """
        speller = self._speller
        keep = len(self.ids)
        pending = list(user_ids)
        last = next((at for at in range(len(pending), 0, -1) if not speller.is_followed(pending[at - 1])), 0)
        if last:
            self.num_respellings += 1
            self._unspelled += pending[:last]
            keep = min(keep, self._respell())
        mapped = pending[last:]
        self._unspelled += mapped
        self.ids += [speller.delta_ids[user_id] for user_id in mapped]
        return keep

    def extend_unseen(self) -> int:
        """:meth:`extend` by one token that is followed, whichever it is; :meth:`see` has to come before more do."""
        self.ids.append(UNSEEN)
        return len(self.ids) - 1

    def see(self, user_id: int) -> None:
        """The unseen token has arrived."""
        assert self.ids[-1] == UNSEEN, "the last token is known already"
        assert self._speller.is_followed(user_id), "this token should have been spelled"
        self.ids[-1] = self._speller.delta_ids[user_id]
        self._unspelled.append(user_id)

    def _respell(self) -> int:
        """Spell what was only mapped so far; the index of the first id that changes."""
        fresh, num_settled = self._spell_pending()
        first = self._settled
        old = self.ids
        common = 0
        for before, after in zip(old[first:], fresh, strict=False):
            if before != after:
                break
            common += 1
        old[first + common :] = fresh[common:]
        self._settled = first + num_settled
        return first + common

    def _spell_pending(self) -> tuple[list[int], int]:
        """All ids after the settled ones, and how many of them are settled now."""
        settled: list[int] = []
        stretch: list[bytes] = []
        for user_id in self._unspelled:
            if self._speller.is_special(user_id):
                settled += self._take(b"".join(stretch), final=True) + self._speller.special(user_id)
                stretch = []
            else:
                stretch.append(self._speller.surface(user_id))
        self._unspelled = []
        settled += self._take(b"".join(stretch), final=False)
        ids, count, length = self._speller.encode(self._text)
        settled += ids[:count]
        self._text = self._text[length:]
        incomplete = self._speller.bytes_as_tokens(self._decoder.getstate()[0])
        return [*settled, *ids[count:], *incomplete], len(settled)

    def _take(self, data: bytes, final: bool) -> list[int]:
        """Add bytes to the stretch under way; the ids of all that became final by it.

        Bytes that are no valid UTF-8 end the text before them; ``final`` (a special token follows) ends it anyway.
        """
        settled: list[int] = []
        parts = _ESCAPED_BYTES.split(self._decoder.decode(data, final))
        for index, part in enumerate(parts):
            if index % 2:
                settled += self._finish_text()
                settled += self._speller.bytes_as_tokens(part.encode("utf-8", "surrogateescape"))
            else:
                self._text += part
        if final:
            settled += self._finish_text()
            self._decoder.reset()
        return settled

    def _finish_text(self) -> tuple[int, ...]:
        ids = self._speller.encode(self._text)[0]
        self._text = ""
        return ids


def byte_table(delta: Vocabulary) -> dict[int, int]:
    """Byte value to the delta token that stands for just that byte: its byte tokens, else one-byte surfaces."""
    table = {
        surface[0]: delta_id
        for delta_id, surface in reversed(list(enumerate(delta.surfaces)))
        if surface is not None and len(surface) == 1
    }
    return {**table, **delta.byte_ids}


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("surrogateescape")
