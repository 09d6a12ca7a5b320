"""The delta's tokenizer as it spells a text in the middle of a document.

Differences from the tokenizer as it is shipped: no bos or eos, no space put before the text, no white space stripped
from it, and special tokens inside the text are text. Non-special added tokens stay what they are.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from cmc_server.errors import MapError
from cmc_server.vocab.surface import Vocabulary

# No text holds this (a noncharacter and what nobody can guess), so a special token renamed with it is found in none.
_UNSPEAKABLE = "\U0010ffff" + secrets.token_hex(16)
_EDGE_NORMALIZERS = {"Prepend", "Strip"}


@dataclass(frozen=True)
class Continuation:
    """A tokenizer in its continuation form, and what the spelling needs to know about where its tokens may end.

    Args:
        tokenizer: its ids are those of the tokenizer as it is shipped.
        splits_inside: whether the model splits a word without looking at its edges; BPE and Unigram do, WordPiece does
            not.
        has_words: whether a pre-tokenizer splits text into words at all.
    """

    tokenizer: Tokenizer
    splits_inside: bool
    has_words: bool


def read_continuation(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Continuation:
    """Build the continuation form of a fast tokenizer.

    Args:
        tokenizer: a fast tokenizer; it is not changed.
        vocabulary: its vocabulary, which says what is special.

    Raises:
        MapError: an added token has another id when the tokenizer is built from what it says of itself.
    """
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {str(vocabulary.contents[token_id]) for token_id in vocabulary.special_ids}
    # Renamed and not left out: those behind them would get other ids.
    for token in spec["added_tokens"]:
        token["content"] = _hidden(token["content"], special)
    spec["normalizer"] = _without_edges(spec.get("normalizer"), "normalizers")
    spec["pre_tokenizer"] = _without_edges(spec.get("pre_tokenizer"), "pretokenizers")
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    model = spec["model"]
    _hide_special(model, special)
    edges = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    built = Tokenizer.from_str(json.dumps(spec))
    moved = [token for token in spec["added_tokens"] if built.token_to_id(token["content"]) != token["id"]]
    if moved:
        content = moved[0]["content"].removeprefix(_UNSPEAKABLE)
        raise MapError(
            f"The tokenizer {tokenizer.name_or_path} does not keep the id {moved[0]['id']} of its added token "
            f"{content!r} when it is built again, so that texts cannot be spelled in it; save it with its own library."
        )
    return Continuation(
        built,
        splits_inside=model["type"] in ("BPE", "Unigram") and not edges,
        has_words=spec["pre_tokenizer"] is not None,
    )


def _without_edges(part: dict[str, Any] | None, members: str) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it does to the beginning and the end of a text."""
    if part is None or part["type"] in _EDGE_NORMALIZERS:
        return None
    part = dict(part)
    if part["type"] == "Sequence":
        kept = [_without_edges(member, members) for member in part[members]]
        part[members] = [member for member in kept if member is not None]
        return part if part[members] else None
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
    elif part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part


def _hide_special(model: dict[str, Any], special: set[str]) -> None:
    """Rename the special tokens in the model's vocabulary, so that no text is ever taken for one."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {_hidden(content, special): index for content, index in vocabulary.items()}
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = _hidden(model["unk_token"], special)
    elif isinstance(vocabulary, list):
        model["vocab"] = [[_hidden(content, special), score] for content, score in vocabulary]


def _hidden(content: str, special: set[str]) -> str:
    return _UNSPEAKABLE + content if content in special else content
