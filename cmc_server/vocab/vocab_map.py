"""The map from a user vocabulary to a delta's: built, kept in one safetensors file, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cmc_server.errors import MapError
from cmc_server.vocab.pm_mined import MatchKind, match_tokens
from cmc_server.vocab.special import Overrides, pair_special, resolve_overrides
from cmc_server.vocab.surface import Vocabulary

#: Raised whenever the same two vocabularies would give another map, so that no cache outlives its algorithm.
ALGORITHM_VERSION = 1
#: Environment variable with the folder for cached files.
CACHE_VARIABLE = "CMC_SERVER_CACHE"

_FORMAT = "cmc-server vocabulary map"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Which delta token stands for each user token.

    Args:
        delta_ids: int32 [num_user_tokens], -1 for an unmapped token.
        match: uint8 [num_user_tokens], values of ``MatchKind``.
        user_fingerprint: fingerprint of the user vocabulary.
        delta_fingerprint: fingerprint of the delta vocabulary.
        algorithm_version: version of the rules that made the map.
        counts: tokens by match kind (``none``, ``exact``, ``prefix``, ``extension``, ``special``; they add up to the
            number of ids), ``ordinary`` tokens, and how many of these are mapped (``ordinary_mapped``).

    Raises:
        MapError: the arrays do not fit each other or hold impossible values.
    """

    delta_ids: NDArray[np.int32]
    match: NDArray[np.uint8]
    user_fingerprint: str
    delta_fingerprint: str
    algorithm_version: int
    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        ids, match = self.delta_ids, self.match
        if ids.dtype != np.int32 or match.dtype != np.uint8 or ids.ndim != 1 or ids.shape != match.shape:
            raise MapError("A vocabulary map needs delta_ids (int32) and match (uint8), both of one length.")
        if (ids < -1).any() or (match > max(MatchKind)).any() or ((ids == -1) != (match == MatchKind.NONE)).any():
            raise MapError("The vocabulary map holds impossible values; build it again.")
        ids.setflags(write=False)
        match.setflags(write=False)

    @cached_property
    def is_identity(self) -> bool:
        """Whether both sides have the same tokenizer and every token stands for itself."""
        same = self.user_fingerprint == self.delta_fingerprint
        return same and bool(np.array_equal(self.delta_ids, np.arange(len(self.delta_ids))))

    @property
    def coverage(self) -> float:
        """Mapped share of the ordinary tokens, 0 to 1."""
        ordinary = self.counts["ordinary"]
        return self.counts["ordinary_mapped"] / ordinary if ordinary else 0.0

    def save(self, path: Path) -> None:
        """Write the map as one safetensors file; an existing file is replaced in one step.

        Raises:
            MapError: the file cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "user_fingerprint": self.user_fingerprint,
            "delta_fingerprint": self.delta_fingerprint,
            "algorithm_version": str(self.algorithm_version),
            "counts": json.dumps(dict(self.counts)),
        }
        metadata["digest"] = _digest(self.delta_ids, self.match, metadata)
        data = save({"delta_ids": self.delta_ids, "match": self.match}, metadata)
        try:
            _write_atomically(path, data)
        except OSError as error:
            raise MapError(f"The vocabulary map cannot be written to {path}: {error.strerror}.") from None

    @classmethod
    def load(cls, path: Path) -> VocabularyMap:
        """Read a map that :meth:`save` wrote.

        Raises:
            MapError: the file is missing, corrupt or something else.
        """
        try:
            with safe_open(path, framework="numpy") as tensors:
                metadata = tensors.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise MapError(f"{path} is not a vocabulary map.")
                delta_ids, match = tensors.get_tensor("delta_ids"), tensors.get_tensor("match")
                if metadata.pop("digest") != _digest(delta_ids, match, metadata):
                    raise ValueError("its digest is another one")
                return cls(
                    delta_ids=delta_ids,
                    match=match,
                    user_fingerprint=metadata["user_fingerprint"],
                    delta_fingerprint=metadata["delta_fingerprint"],
                    algorithm_version=int(metadata["algorithm_version"]),
                    counts={str(key): int(value) for key, value in json.loads(metadata["counts"]).items()},
                )
        except FileNotFoundError:
            raise MapError(f"The vocabulary map {path} does not exist.") from None
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise MapError(f"The vocabulary map {path} is corrupt ({error}); delete it and build it again.") from None


def build_map(user: Vocabulary, delta: Vocabulary, overrides: Overrides | None = None) -> VocabularyMap:
    """Map a user vocabulary to a delta's by PM-MinED, with special tokens by role.

    With equal fingerprints the map is the identity, holes included, except for what overrides change.

    Args:
        user: the vocabulary of the user LLM.
        delta: the vocabulary of the delta model.
        overrides: user token content to delta token content, or to None to unmap it; these win over every rule and
            count as special matches.

    Raises:
        MapError: the overrides name a token that does not exist.
    """
    if user.fingerprint == delta.fingerprint:
        ids = np.arange(user.size, dtype=np.int32)
        match = np.full(user.size, MatchKind.EXACT, dtype=np.uint8)
        pairs = {token: token for token in user.special_ids}
    else:
        ids, match = match_tokens(user.surfaces, delta.surfaces, user.byte_ids, delta.byte_ids)
        pairs = pair_special(user, delta)
    pairs |= resolve_overrides(overrides or {}, user, delta)
    for user_token, delta_token in pairs.items():
        ids[user_token] = delta_token
        match[user_token] = MatchKind.NONE if delta_token < 0 else MatchKind.SPECIAL
    return VocabularyMap(ids, match, user.fingerprint, delta.fingerprint, ALGORITHM_VERSION, _counts(ids, match, user))


def cached_map(
    user: Vocabulary, delta: Vocabulary, overrides: Overrides | None = None, cache_dir: Path | None = None
) -> VocabularyMap:
    """:func:`build_map` through a cache that several processes may share.

    A corrupt or unreadable file is rebuilt, and a folder that cannot be written is done without; both are logged as
    warnings.

    Args:
        user: the vocabulary of the user LLM.
        delta: the vocabulary of the delta model.
        overrides: as for :func:`build_map`.
        cache_dir: folder of the cached maps; None is :func:`default_cache_dir`.

    Raises:
        MapError: as :func:`build_map`.
    """
    if user.fingerprint == delta.fingerprint:
        return build_map(user, delta, overrides)
    folder = default_cache_dir() if cache_dir is None else cache_dir
    path = folder / f"{_cache_key(user, delta, overrides)}.safetensors"
    if os.path.lexists(path):
        try:
            cached = VocabularyMap.load(path)
            _check_belongs(cached, user, delta)
            return cached
        except MapError as error:
            _log.warning("Rebuilding a cached vocabulary map: %s", error)
    built = build_map(user, delta, overrides)
    try:
        built.save(path)
    except MapError as error:
        _log.warning("Continuing without caching: %s", error)
    return built


def default_cache_dir() -> Path:
    """``maps`` in the folder that ``CMC_SERVER_CACHE`` names, else in ``~/.cache/cmc-server``."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "cmc-server") / "maps"


def _digest(ids: NDArray[np.int32], match: NDArray[np.uint8], metadata: Mapping[str, str]) -> str:
    """Of everything in the file: a token that points elsewhere looks like any other."""
    words = json.dumps(metadata, sort_keys=True).encode()
    return hashlib.sha256(b"".join([words, b"\0", ids.tobytes(), match.tobytes()])).hexdigest()


def _counts(ids: NDArray[np.int32], match: NDArray[np.uint8], user: Vocabulary) -> dict[str, int]:
    by_kind = np.bincount(match, minlength=len(MatchKind))
    ordinary = np.array([surface is not None for surface in user.surfaces], dtype=bool)
    return {kind.name.lower(): int(by_kind[kind]) for kind in MatchKind} | {
        "ordinary": int(ordinary.sum()),
        "ordinary_mapped": int((ids[ordinary] >= 0).sum()),
    }


def _cache_key(user: Vocabulary, delta: Vocabulary, overrides: Overrides | None) -> str:
    parts = [
        ALGORITHM_VERSION,
        *(user.fingerprint, user.roles_digest),
        *(delta.fingerprint, delta.roles_digest),
        sorted((overrides or {}).items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check_belongs(cached: VocabularyMap, user: Vocabulary, delta: Vocabulary) -> None:
    found = (cached.user_fingerprint, cached.delta_fingerprint, cached.algorithm_version, len(cached.delta_ids))
    if found != (user.fingerprint, delta.fingerprint, ALGORITHM_VERSION, user.size):
        raise MapError("the cached file belongs to other vocabularies.")
    if int(cached.delta_ids.max(initial=-1)) >= delta.size:
        raise MapError("the cached file names tokens that the delta does not have.")


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
