"""The token that tells the server that a delta failed: one that an answer never needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from cmc_server.errors import MapError

if TYPE_CHECKING:
    from cmc_server.vocab.surface import Vocabulary

#: ``<unused7>``, ``[unused7]``, ``<|reserved_special_token_7|>``; an ordinary word such as ``reserved`` is not meant.
_PLACEHOLDER = re.compile(r"[<\[]\S*(?:unused|reserved)\S*[>\]]", re.IGNORECASE)


def pick_reserved_token(vocabulary: Vocabulary, num_logits: int, avoid: Set[int] = frozenset()) -> int:
    """Choose the user token that a failed delta forces; in steered rows it is masked otherwise.

    In this order: an id that has logits but no token, a placeholder (unused, reserved), pad where pad ends nothing,
    another special token without a role, and bos, which opens a prompt and is never part of an answer.

    Args:
        vocabulary: tokens of the user LLM.
        num_logits: columns of the user LLM's logits.
        avoid: ids that an answer may need, such as the special tokens of the chat template; bos is taken all the same.

    Raises:
        MapError: no token qualifies.
    """
    choice = next(_candidates(vocabulary, num_logits, avoid), None)
    if choice is None:
        raise MapError(
            "The user LLM's vocabulary has no token to spare for reporting a failed delta "
            "(none unused, no pad apart from eos, no special token without a role, no bos)."
        )
    return choice


def _candidates(vocabulary: Vocabulary, num_logits: int, avoid: Set[int]) -> Iterator[int]:
    contents = vocabulary.contents
    known = range(min(vocabulary.size, num_logits))
    roles = {vocabulary.bos_id, vocabulary.unk_id, vocabulary.pad_id, *vocabulary.eos_ids}

    def free(token: int | None) -> bool:
        return token is not None and token < num_logits and token not in avoid and token not in vocabulary.eos_ids

    yield from filter(free, range(vocabulary.size, num_logits))
    yield from (token for token in known if contents[token] is None and free(token))
    yield from (token for token in known if _is_placeholder(contents[token]) and token not in roles and free(token))
    pad = vocabulary.pad_id
    if pad is not None and pad not in (vocabulary.bos_id, vocabulary.unk_id) and free(pad):
        yield pad
    yield from (token for token in sorted(vocabulary.special_ids - roles) if free(token))
    bos = vocabulary.bos_id
    if bos is not None and bos < num_logits and bos not in vocabulary.eos_ids:
        yield bos


def _is_placeholder(content: str | None) -> bool:
    return content is not None and _PLACEHOLDER.fullmatch(content) is not None
