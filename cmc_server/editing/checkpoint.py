"""A Hugging Face checkpoint folder as tensors by name, whatever files they lie in, and whether two of them agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cmc_server.editing.shards import Shard, StoredTensor
from cmc_server.errors import EditingError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED_FILE = "packed.safetensors"
_NAMED = 5  # tensors or tokens that a message names at most
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class Checkpoint:
    """An opened checkpoint; only headers have been read.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards with their index.

    Raises:
        EditingError: a file is missing or corrupt, or the index does not tell what the shards hold.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise EditingError(f"There is no folder {folder}; give the folder of a checkpoint.")
        self.folder = folder
        self.config = read_object(folder / "config.json")
        index = _read_index(folder)
        if index is not None and (folder / WEIGHTS).is_file() and WEIGHTS not in index.values():
            raise EditingError(f"{folder} has both {WEIGHTS} and {INDEX}; remove the one that is not the model's.")
        names = [WEIGHTS] if index is None else sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing and (folder / PACKED_FILE).is_file():
            raise EditingError(
                f"{folder} holds packed weights, which cannot be edited as they are; write them as a regular folder "
                "first, with unpack_folder of cmc_server.delta.packed."
            )
        if missing:
            raise EditingError(f"{folder} has no {missing[0]}; a checkpoint in safetensors is needed.")
        self.shards = [Shard(folder / name) for name in names]
        self._shard_of = {name: shard for shard in self.shards for name in shard.tensors}
        if index is not None:
            wrong = [
                name
                for name in sorted(index.keys() | self._shard_of.keys())
                if name not in index or name not in self._shard_of or self._shard_of[name].path.name != index[name]
            ]
            if wrong:
                raise EditingError(f"{folder / INDEX} does not fit the shards: see {_some(wrong)}.")

    @property
    def names(self) -> list[str]:
        """All tensors, shard by shard in the order of the files."""
        return list(self._shard_of)

    def stored(self, name: str) -> StoredTensor:
        """Type and shape of a tensor."""
        return self._shard_of[name].tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements of a tensor, see :meth:`Shard.read`."""
        return self._shard_of[name].read(name, start, stop)

    def forget(self, name: str) -> None:
        """Give the page cache's memory of a tensor back, see :meth:`Shard.forget`."""
        self._shard_of[name].forget(name)

    def check_finite(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Refuse NaN and infinity among the elements of a tensor.

        Raises:
            EditingError: there is one.
        """
        is_number = self.stored(name).dtype.is_floating_point
        if is_number and not bool(self.read(name, start, stop).float().isfinite().all()):
            raise EditingError(f"{name} of {self.folder} holds NaN or infinity.")

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.stored(name).num_bytes for name in self._shard_of)

    def fingerprint(self) -> str:
        """A hash of the headers and of sampled content, for provenance: the whole of a large model takes too long.

        Returns:
            64 hex digits; equal for equal folders, and different for models that differ all over.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            size = shard.path.stat().st_size
            digest.update(shard.header + size.to_bytes(8, "little"))
            with shard.path.open("rb") as stream:
                for sample in range(_SAMPLES):
                    stream.seek(len(shard.header) + sample * (size - len(shard.header)) // _SAMPLES)
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def file_hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file, by the file's name: for what must belong to these very weights."""
        hashes = {}
        for shard in self.shards:
            with shard.path.open("rb") as stream:
                hashes[shard.path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashes


def check_agreement(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse two checkpoints that are not the same architecture with the same vocabulary.

    Raises:
        EditingError: tied weights, tensor names, shapes, kinds of type or vocabulary differ; the message names where.
    """
    pair = f"{first.folder} and {other.folder}"
    ties = [one.config.get("tie_word_embeddings") for one in (first, other)]
    if None not in ties and ties[0] != ties[1]:
        tied, free = (first, other) if ties[0] else (other, first)
        raise EditingError(f"{tied.folder} ties its output head to its embeddings (tied weights), {free.folder} not.")
    for one, two in ((first, other), (other, first)):
        lacking = [name for name in one.names if name not in set(two.names)]
        if lacking:
            raise EditingError(f"{two.folder} lacks tensors of {one.folder}: {_some(lacking)}.")
    shapes = [
        f"{name} {list(first.stored(name).shape)} and {list(other.stored(name).shape)}"
        for name in first.names
        if first.stored(name).shape != other.stored(name).shape
    ]
    if shapes:
        raise EditingError(f"Tensors of {pair} differ in shape: {_some(shapes)}.")
    kinds = [
        name
        for name in first.names
        if first.stored(name).dtype.is_floating_point != other.stored(name).dtype.is_floating_point
    ]
    if kinds:
        raise EditingError(f"Tensors of {pair} are integers in one and numbers in the other: {_some(kinds)}.")
    _check_vocabulary(first, other)


def _check_vocabulary(first: Checkpoint, other: Checkpoint) -> None:
    mine, its = _vocabulary(first.folder), _vocabulary(other.folder)
    if mine is None or its is None:
        return
    different = [token for token in sorted(mine.keys() | its.keys()) if mine.get(token) != its.get(token)]
    if different:
        tokens = [json.dumps(token, ensure_ascii=False) for token in different]
        raise EditingError(f"The vocabularies of {first.folder} and {other.folder} differ in {_some(tokens)}.")


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Tokens and ids; None where the folder has no fast tokenizer, and shapes must do."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare exceptions
        raise EditingError(f"{path} is not a valid tokenizer: {error}.") from None
    return vocabulary


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        EditingError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EditingError(f"{path.parent} has no {path.name}; give the folder of a checkpoint.") from None
    except (OSError, ValueError) as error:
        raise EditingError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise EditingError(f"{path} must hold a JSON object.")
    return content


def _read_index(folder: Path) -> dict[str, str] | None:
    if not (folder / INDEX).exists():
        return None
    index = read_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(_is_plain(name) for name in index.values()):
        raise EditingError(f"{folder / INDEX} is no index of safetensors: weight_map must name files of the folder.")
    return index


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _some(names: Sequence[str] | Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
