"""The writing system of a token, from the names of its characters in the Unicode database."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from cmc_server.vocab.pm_mined import characters

#: Tokens without letters, by what they hold instead.
DIGITS, WHITESPACE, SYMBOLS = "Digits", "Whitespace", "Punctuation and symbols"
#: Tokens that hold only parts of characters, and letters of scripts that are not told apart.
PARTIAL, OTHER = "Partial characters", "Other letters"

# First or later word of a character's name, and the script that it tells.
# fmt: off
_SCRIPTS = (
    "Latin", "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Syriac", "Thaana", "Devanagari", "Bengali",
    "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Tibetan",
    "Myanmar", "Georgian", "Hangul", "Ethiopic", "Cherokee", "Khmer", "Mongolian", "Hiragana", "Katakana",
    "Bopomofo", "Canadian", "Coptic", "Tifinagh", "Javanese", "Balinese", "Tagalog", "Runic", "Gothic", "Braille",
    "Yi",
)
# fmt: on
_SCRIPT_BY_WORD = {script.upper(): script for script in _SCRIPTS} | {"CJK": "Han", "IDEOGRAPHIC": "Han"}


def script_of(surface: bytes) -> str:
    """The script of a token's first letter, or what kind of token without letters it is.

    Returns:
        A script such as ``Latin``, ``Han`` or ``Cyrillic``, or one of this module's constants.
    """
    fallback = WHITESPACE
    for char in characters(surface):
        kind = _kind(char)
        if kind not in (DIGITS, WHITESPACE, SYMBOLS, PARTIAL):
            return kind
        if fallback == WHITESPACE or kind == PARTIAL:
            fallback = kind
    return fallback


@lru_cache(maxsize=65_536)
def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category[0] in "LM":
        words = unicodedata.name(char, "").replace("-", " ").split()
        return next((_SCRIPT_BY_WORD[word] for word in words if word in _SCRIPT_BY_WORD), OTHER)
    if category == "Cs":
        return PARTIAL
    if char.isspace():
        return WHITESPACE
    return DIGITS if category[0] == "N" else SYMBOLS
