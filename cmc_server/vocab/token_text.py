"""What text a token stands for, read from a fast tokenizer's own components.

Byte-level BPE writes bytes as printable characters (``Ġthe``), SentencePiece writes a space as ``▁`` and rare bytes as
``<0xNN>``, WordPiece marks the inside of a word with ``##``. The rules here undo each of these, one token at a time.

WordPiece does not keep spaces at all, so its rule is a choice: a piece that begins a word carries the space before it,
as the pieces of all other tokenizers do (``the`` is `` the``), a ``##`` piece carries none, and neither does a single
punctuation mark or CJK character, which such tokenizers split off wherever it stands. WordLevel tokens follow suit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cmc_server.errors import MapError

TextRule = Callable[[str], bytes]
Component = Mapping[str, Any]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DROPS_SPACES = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
_HARMLESS_DECODERS = {"Fuse", "Strip", "ByteFallback", "ByteLevel"}
# The blocks that BERT's normalizer surrounds with spaces.
_CJK_BLOCKS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True)
class TokenizerParts:
    """The components of a fast tokenizer that decide how its tokens spell text.

    Args:
        model_type: ``BPE``, ``Unigram``, ``WordPiece`` or ``WordLevel``.
        byte_fallback: whether the model writes unknown characters as ``<0xNN>`` tokens.
        continuing_prefix: what marks a piece inside a word, such as ``##``; empty if nothing does.
        word_suffix: what marks the last piece of a word, such as ``</w>``; empty if nothing does.
        normalizers: the normalizer's components in order, with sequences flattened; likewise the next two.
        pre_tokenizers: the pre-tokenizer's components.
        decoders: the decoder's components.
    """

    model_type: str
    byte_fallback: bool
    continuing_prefix: str
    word_suffix: str
    normalizers: tuple[Component, ...]
    pre_tokenizers: tuple[Component, ...]
    decoders: tuple[Component, ...]

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are written in the byte-level alphabet."""
        return _has(self.decoders, "ByteLevel") or _has(self.pre_tokenizers + self.normalizers, "ByteLevel")

    @property
    def has_byte_tokens(self) -> bool:
        """Whether ``<0xNN>`` tokens stand for single bytes."""
        return self.byte_fallback or _has(self.decoders, "ByteFallback")


def byte_value(content: str) -> int | None:
    """The byte of a ``<0xNN>`` token, or None for any other content."""
    match = _BYTE_TOKEN.fullmatch(content)
    return int(match[1], 16) if match else None


def token_text_rule(parts: TokenizerParts) -> TextRule:
    """The function from a model token's content to the bytes of its text (byte tokens aside).

    Raises:
        MapError: the tokenizer's components do not tell what text its tokens stand for.
    """
    if parts.is_byte_level:
        return _byte_level_rule(parts.word_suffix)
    is_word_model = parts.model_type in ("WordPiece", "WordLevel") or bool(parts.continuing_prefix)
    if is_word_model and not _space_marks(parts):
        return _word_rule(parts.continuing_prefix)
    replacements = _replacements(parts)
    if not replacements and any(part["type"] in _DROPS_SPACES for part in parts.pre_tokenizers):
        raise MapError(
            "The tokenizer drops spaces and its tokens do not mark where they were, so the text of its tokens is "
            "unknown; use a byte-level, SentencePiece or WordPiece tokenizer."
        )
    return _replacing_rule(replacements)


def byte_level_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level BPE and the bytes they stand for.

    Printable Latin-1 bytes stand for themselves; the others are numbered upwards from U+0100.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


def _byte_level_rule(word_suffix: str) -> TextRule:
    alphabet = byte_level_alphabet()
    # Characters outside the alphabet stay above U+00FF, so that the encoding below fails for them. Those of the
    # alphabet's own range that it leaves out (the real space, for one) must be moved there.
    table = dict.fromkeys(range(0x180), 0x10FFFF) | {ord(char): byte for char, byte in alphabet.items()}

    def text(content: str) -> bytes:
        if word_suffix and content.endswith(word_suffix):
            content = content.removesuffix(word_suffix) + "Ġ"
        try:
            return content.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            # As the ByteLevel decoder does: a token with one foreign character is literal text.
            return content.encode("utf-8")

    return text


def _word_rule(continuing_prefix: str) -> TextRule:
    def text(content: str) -> bytes:
        if continuing_prefix and content.startswith(continuing_prefix) and content != continuing_prefix:
            return content.removeprefix(continuing_prefix).encode("utf-8")
        return (content if _stands_alone(content) else " " + content).encode("utf-8")

    return text


def _stands_alone(content: str) -> bool:
    if len(content) != 1:
        return not content
    code = ord(content)
    if content.isascii():
        return not content.isalnum()
    return unicodedata.category(content).startswith("P") or any(low <= code <= high for low, high in _CJK_BLOCKS)


def _replacing_rule(replacements: list[tuple[str, str]]) -> TextRule:
    def text(content: str) -> bytes:
        for old, new in replacements:
            content = content.replace(old, new)
        return content.encode("utf-8")

    return text


def _replacements(parts: TokenizerParts) -> list[tuple[str, str]]:
    """What the decoder replaces in every token, in order; where it says nothing of spaces, what encoding marked."""
    found: list[tuple[str, str]] = []
    for decoder in parts.decoders:
        kind = decoder["type"]
        if kind == "Replace":
            found.append((_literal_pattern(decoder), decoder["content"]))
        elif kind == "Metaspace":
            found.append((decoder["replacement"], " "))
        elif kind == "BPEDecoder":
            found.append((decoder["suffix"], " "))
        elif kind not in _HARMLESS_DECODERS and kind != "WordPiece":
            raise MapError(f"The tokenizer has a decoder of type {kind}, whose effect on single tokens is unknown.")
    marked = {old for old, new in found if new == " "}
    return found + [(mark, " ") for mark in _space_marks(parts) if mark not in marked]


def _space_marks(parts: TokenizerParts) -> list[str]:
    marks = [part["replacement"] for part in parts.pre_tokenizers if part["type"] == "Metaspace"]
    for part in parts.normalizers:
        if part["type"] == "Replace" and part["pattern"].get("String") == " " and part["content"]:
            marks.append(part["content"])
    if parts.word_suffix:
        marks.append(parts.word_suffix)
    return marks


def _literal_pattern(decoder: Component) -> str:
    pattern = decoder["pattern"].get("String")
    if not pattern:
        raise MapError("The tokenizer's decoder replaces by a regular expression, which is not supported.")
    return str(pattern)


def _has(components: Iterable[Component], kind: str) -> bool:
    return any(component["type"] == kind for component in components)
