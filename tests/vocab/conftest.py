"""Vocabularies made by hand, and those of the demo models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tiny_tokenizers import BYTE_TOKENS

from cmc_server.vocab.surface import Vocabulary, load_vocabulary


@pytest.fixture(scope="session")
def make_vocabulary() -> Callable[..., Vocabulary]:
    """Builds a vocabulary by hand: ``make(contents, special={...}, bos="<s>", ...)``; ``<0xNN>`` are byte tokens."""

    def make(
        contents: Sequence[str | None],
        *,
        special: Sequence[str] = (),
        bos: str | None = None,
        eos: Sequence[str] = (),
        unk: str | None = None,
        pad: str | None = None,
        fingerprint: str | None = None,
    ) -> Vocabulary:
        ids = {content: token for token, content in enumerate(contents)}
        byte_ids = {int(content[3:5], 16): ids[content] for content in contents if content in BYTE_TOKENS}
        roles = [role for role in (bos, *eos, unk, pad) if role is not None]
        special_ids = frozenset(ids[content] for content in (*special, *roles))
        surfaces = [None if c is None or ids[c] in special_ids else c.encode() for c in contents]
        for value, token in byte_ids.items():
            surfaces[token] = bytes([value])
        return Vocabulary(
            contents=tuple(contents),
            surfaces=tuple(surfaces),
            special_ids=special_ids,
            byte_ids=byte_ids,
            bos_id=None if bos is None else ids[bos],
            eos_ids=tuple(ids[content] for content in eos),
            unk_id=None if unk is None else ids[unk],
            pad_id=None if pad is None else ids[pad],
            fingerprint=fingerprint or repr((contents, special, bos, eos, unk, pad)),
        )

    return make


@pytest.fixture(scope="session")
def demo_vocabularies(demo_models: Any) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies of Gemma 3 and SmolLM2."""
    return load_vocabulary(str(demo_models.gemma3)), load_vocabulary(str(demo_models.smollm2))
