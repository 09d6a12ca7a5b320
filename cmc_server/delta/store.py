"""Find a delta artifact, check it, and give it a version by its content. Nothing here loads weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmc_server.config import DeltaSource
from cmc_server.delta.manifest import MANIFEST_FILE, DeltaManifest
from cmc_server.delta.weight_files import check_size, read_json, read_weight_files
from cmc_server.errors import DeltaError, DeltaNotFoundError, MapError, one_line
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt")
_VERSION_LENGTH = 12


@dataclass(frozen=True)
class DeltaArtifact:
    """A delta folder that passed every check short of loading it.

    Args:
        name: the name it is served under.
        path: the folder.
        manifest: its ``cmc_delta.json``, or the defaults.
        version: first 12 hex digits of a hash over every file that matters.
        vocab_size: columns of the delta's logits.
        max_positions: longest input of the architecture, or None if the config does not say.
        weight_bytes: size of the safetensors files.
        num_weights: values in them.
        strength: strength of a request that gives none.
    """

    name: str
    path: Path
    manifest: DeltaManifest
    version: str
    vocab_size: int
    max_positions: int | None
    weight_bytes: int
    num_weights: int
    strength: float

    @property
    def context_length(self) -> int | None:
        """The window C of the design: the manifest's context length, else the model's maximum."""
        return self.manifest.context_length or self.max_positions

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The delta's fast tokenizer.

        Raises:
            DeltaError: the folder has no usable tokenizer, or one larger than the delta's logits.
        """
        try:
            tokenizer = load_tokenizer(str(self.path))
        except MapError as error:
            raise DeltaError(f"The delta {self.name!r} has no usable tokenizer: {error}") from None
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if size > self.vocab_size:
            raise DeltaError(
                f"The delta {self.name!r} has a vocabulary of {size} tokens but only {self.vocab_size} logits; "
                "its tokenizer does not belong to it."
            )
        return tokenizer


def open_delta(source: DeltaSource, roots: Sequence[Path] = ()) -> DeltaArtifact:
    """Check a delta artifact and describe it.

    Args:
        source: name, path (folder or hub id) and optional strength.
        roots: where given, the folder must lie inside one of these, and is never fetched.

    Raises:
        DeltaNotFoundError: no such folder, and no such hub repository within reach.
        DeltaError: a file is missing, unreadable, corrupt, unsafe or does not fit.
    """
    try:
        return _open(source, _locate(source.path, roots))
    except OSError as error:
        raise DeltaError(f"The delta {source.path} cannot be read: {one_line(error)}.") from None


def _open(source: DeltaSource, folder: Path) -> DeltaArtifact:
    config = _read_config(folder)
    weights = read_weight_files(folder)
    manifest = DeltaManifest.read(folder)
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise DeltaError(f"{folder / 'config.json'} gives no vocab_size; a causal language model is needed.")
    check_size(folder, config, weights)
    max_positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(max_positions, int) and (manifest.context_length or 0) > max_positions:
        raise DeltaError(
            f"{folder / MANIFEST_FILE} gives a context_length of {manifest.context_length}, but the model reads at "
            f"most {max_positions} tokens; lower it."
        )
    return DeltaArtifact(
        name=source.name,
        path=folder,
        manifest=manifest,
        version=content_version(folder),
        vocab_size=vocab_size,
        max_positions=max_positions if isinstance(max_positions, int) else None,
        weight_bytes=weights.num_bytes,
        num_weights=weights.num_weights,
        strength=manifest.default_strength if source.strength is None else source.strength,
    )


def content_version(folder: Path) -> str:
    """Hash over names and contents of the files that decide what a delta does.

    Returns:
        12 hex digits; equal for equal content wherever the folder lies.
    """
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file()]
    return _digest({*weights, *_tokenizer_files(folder), *_named(folder, "config.json", MANIFEST_FILE)})


def vocabulary_version(folder: Path) -> str:
    """The same over those files alone that decide how a delta's tokens are read and spelled."""
    return _digest(set(_tokenizer_files(folder)))


def one_of_each_vocabulary(roots: Iterable[Path], most: int = 4) -> list[DeltaArtifact]:
    """Among the folders in some roots, a delta for each different set of tokenizer files; ``most`` sets at most.

    Files of equal names and sizes are taken for equal, so that hundreds of folders need not be read. A folder that is
    no usable delta is passed over: whoever loads it later is told why.
    """
    found: dict[frozenset[tuple[str, int]], DeltaArtifact] = {}
    for folder in (folder for root in roots if root.is_dir() for folder in sorted(root.iterdir()) if folder.is_dir()):
        if len(found) == most:
            break
        try:
            files = frozenset((path.name, path.stat().st_size) for path in _tokenizer_files(folder))
            if files not in found:
                found[files] = open_delta(DeltaSource(name=f"vocabulary-{len(found)}", path=str(folder)))
        except (DeltaError, OSError):
            continue
    return list(found.values())


def _digest(files: set[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:_VERSION_LENGTH]


def _tokenizer_files(folder: Path) -> list[Path]:
    own = [path for path in folder.iterdir() if "token" in path.name and path.suffix != ".safetensors"]
    return [*filter(Path.is_file, own), *_named(folder, "generation_config.json", "vocab.txt")]


def _named(folder: Path, *names: str) -> list[Path]:
    return [path for name in names if (path := folder / name).is_file()]


def _locate(path: str, roots: Sequence[Path]) -> Path:
    try:
        folder = Path(path).expanduser()
        is_local = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a folder that is not ours
        raise DeltaNotFoundError(f"The delta folder {path} cannot be reached: {one_line(error)}.") from None
    if not is_local:
        if roots:  # what comes from the hub lies in none of them
            raise DeltaNotFoundError(f"The delta folder {path} does not exist; it must lie in an allowed folder.")
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
            raise DeltaNotFoundError(f"The delta folder {path} does not exist.")
        folder = _from_hub(path)
    elif roots and not any(folder.resolve().is_relative_to(root.resolve()) for root in roots):
        raise DeltaError(f"The delta folder {path} lies outside the allowed folders.")
    if not folder.is_dir():
        raise DeltaError(f"The delta path {path} is not a folder; give the folder that holds config.json.")
    if roots:
        _check_links(folder, roots)
    return folder.resolve()


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise DeltaNotFoundError(
            f"There is no folder {repository}, and no Hugging Face repository of that name can be reached."
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise DeltaError(f"The delta folder {folder} has no config.json.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise DeltaError(f"{path} must hold a JSON object.")
    if "auto_map" in config:
        raise DeltaError(f"{path} asks for code from the repository (auto_map); deltas must not bring code.")
    return config


def _check_links(folder: Path, roots: Sequence[Path]) -> None:
    """What a file of the folder links to must be allowed, too."""
    inside = [root.resolve() for root in roots]
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in inside):
            raise DeltaError(f"The file {path} is a link that leads outside the allowed folders.")
