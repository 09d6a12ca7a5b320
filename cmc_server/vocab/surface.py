"""A tokenizer's vocabulary, free of its spelling: which text, as bytes, each token stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmc_server.errors import MapError, one_line
from cmc_server.vocab.special import find_roles
from cmc_server.vocab.token_text import Component, TokenizerParts, byte_value, token_text_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALL_BYTES = 256


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        contents: each token as its tokenizer writes it, by id; None for a hole.
        surfaces: the text a token stands for, by id; None for holes and special tokens. Not always valid UTF-8.
        byte_ids: byte value to the id of its ``<0xNN>`` token; empty for tokenizers without byte fallback.
        special_ids: every special token, with a role or without.
        bos_id: the token that begins a text.
        eos_ids: the tokens that end one: the tokenizer's, the generation config's, then those known by name.
        unk_id: the token for what cannot be spelled.
        pad_id: the token that fills up batches.
        fingerprint: SHA-256 over everything of the tokenizer that decides the map and the spelling. The roles, which
            a model folder may change without changing a token, are not part of it; see ``roles_digest``.
    """

    contents: tuple[str | None, ...]
    surfaces: tuple[bytes | None, ...]
    special_ids: frozenset[int]
    byte_ids: Mapping[int, int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    pad_id: int | None
    fingerprint: str

    @property
    def size(self) -> int:
        """Number of ids, holes included: the highest id plus one."""
        return len(self.contents)

    @property
    def roles_digest(self) -> str:
        """SHA-256 of the special tokens and their roles."""
        parts = [sorted(self.special_ids), self.bos_id, self.eos_ids, self.unk_id, self.pad_id]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def ordinary_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for text, byte tokens included."""
        return tuple(token for token, surface in enumerate(self.surfaces) if surface is not None)

    @cached_property
    def ids_by_content(self) -> Mapping[str, int]:
        """Token content to id."""
        return {content: token for token, content in enumerate(self.contents) if content is not None}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder or hub id. Code from the repository is never run.

    Raises:
        MapError: there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise MapError(f"The folder {path} does not exist; give the folder of a model or its hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare exceptions for broken files
        reason = one_line(error)
        raise MapError(f"No tokenizer could be loaded from {path}: {reason[:300]}") from None
    _backend(tokenizer, path)
    return tokenizer


def load_vocabulary(path: str) -> Vocabulary:
    """The vocabulary of a model folder or hub id, with the ends that its ``generation_config.json`` names.

    Raises:
        MapError: the tokenizer or the generation config cannot be used.
    """
    return read_vocabulary(load_tokenizer(path), read_generation_config(path))


def read_generation_config(path: str) -> Mapping[str, Any] | None:
    """The ``generation_config.json`` of a model folder or hub id, or None where there is none.

    Raises:
        MapError: the file is not a JSON object.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(
            path,
            "generation_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        config = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MapError(f"The generation_config.json of {path} cannot be read: {error}.") from None
    if config is not None and not isinstance(config, dict):
        raise MapError(f"The generation_config.json of {path} must hold a JSON object.")
    return config


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any] | None = None
) -> Vocabulary:
    """The vocabulary of a fast tokenizer, from its own data.

    Args:
        tokenizer: a fast tokenizer of transformers.
        generation_config: content of the model's ``generation_config.json``, for its ``eos_token_id``.

    Raises:
        MapError: the tokenizer is not a fast one, is empty, or does not tell what text its tokens stand for.
    """
    backend = _backend(tokenizer, getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    model_ids: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added: dict[int, Any] = backend.get_added_tokens_decoder()
    if not model_ids and not added:
        raise MapError("The tokenizer has no tokens; give the folder of a complete tokenizer.")
    contents = _contents(model_ids, added)
    parts = _parts(backend)
    byte_ids = _byte_ids(parts, model_ids)
    roles = find_roles(contents, added, byte_ids, tokenizer, generation_config)
    return Vocabulary(
        contents=contents,
        surfaces=_surfaces(contents, parts, set(added.keys() - model_ids.values()), roles.special_ids, byte_ids),
        byte_ids=byte_ids,
        **roles._asdict(),
        fingerprint=_fingerprint(backend, added, tokenizer.all_special_ids),
    )


def _backend(tokenizer: Any, name: str) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        raise MapError(f"The tokenizer {name} is not a fast one; a tokenizer.json is needed.")
    return backend


def _contents(model_ids: Mapping[str, int], added: Mapping[int, Any]) -> tuple[str | None, ...]:
    size = max([*model_ids.values(), *added.keys()]) + 1
    contents: list[str | None] = [None] * size
    for content, token in model_ids.items():
        contents[token] = content
    for token, added_token in added.items():
        contents[token] = added_token.content
    return tuple(contents)


def _surfaces(
    contents: tuple[str | None, ...],
    parts: TokenizerParts,
    literal_ids: set[int],
    special_ids: frozenset[int],
    byte_ids: Mapping[int, int],
) -> tuple[bytes | None, ...]:
    rule = token_text_rule(parts)
    surfaces = [None if content is None else rule(content) for content in contents]
    for token in literal_ids:
        # Added tokens outside the model are found in the raw text, before any spelling.
        surfaces[token] = str(contents[token]).encode("utf-8")
    for value, token in byte_ids.items():
        surfaces[token] = bytes([value])
    for token in special_ids:
        surfaces[token] = None
    return tuple(surfaces)


def _byte_ids(parts: TokenizerParts, model_ids: Mapping[str, int]) -> dict[int, int]:
    if parts.is_byte_level:
        return {}
    if parts.has_byte_tokens:
        found: dict[int | None, int | None] = {
            byte_value(content): token for content, token in model_ids.items() if content.startswith("<0x")
        }
    else:
        # A complete set speaks for itself, where a conversion has lost the flag.
        found = {value: model_ids.get(f"<0x{value:02X}>") for value in range(_ALL_BYTES)}
        found = {} if None in found.values() else found
    return {value: token for value in range(_ALL_BYTES) if (token := found.get(value)) is not None}


def _parts(backend: Any) -> TokenizerParts:
    model = backend.model
    return TokenizerParts(
        model_type=type(model).__name__,
        byte_fallback=bool(getattr(model, "byte_fallback", False)),
        continuing_prefix=getattr(model, "continuing_subword_prefix", None) or "",
        word_suffix=getattr(model, "end_of_word_suffix", None) or "",
        normalizers=tuple(_flatten(backend.normalizer, "normalizers")),
        pre_tokenizers=tuple(_flatten(backend.pre_tokenizer, "pretokenizers")),
        decoders=tuple(_flatten(backend.decoder, "decoders")),
    )


def _flatten(component: Any, key: str) -> list[Component]:
    def walk(state: Component) -> Iterable[Component]:
        if state["type"] != "Sequence":
            return [state]
        return [leaf for child in state[key] for leaf in walk(child)]

    return [] if component is None else list(walk(json.loads(component.__getstate__())))


def _fingerprint(backend: Any, added: Mapping[int, Any], special_ids: Iterable[int]) -> str:
    """Hash of the tokenizer's own serialisation, without the padding and truncation that calls leave behind."""
    digest = hashlib.sha256(b"cmc-server vocabulary 1\0")
    for component in (backend.model, backend.normalizer, backend.pre_tokenizer, backend.decoder):
        state = b"" if component is None else component.__getstate__()
        digest.update(len(state).to_bytes(8, "big") + state)
    flags = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")
    tokens = [[token, *(getattr(added[token], flag) for flag in flags)] for token in sorted(added)]
    digest.update(json.dumps([tokens, sorted(set(special_ids))]).encode())
    return digest.hexdigest()
