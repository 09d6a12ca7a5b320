"""Curvature files: how certain each weight of a checkpoint is, or what goes into its linear layers.

A curvature file is a safetensors file with float32 tensors under the names of a checkpoint's tensors, and metadata:

- ``format``: ``cmc-curvature-1``;
- ``kind``: ``fisher``, the diagonal Fisher information of one example's loss, in the shapes of the weights and one for
  each floating-point tensor; or ``gram``, the mean over examples of X^T X, [in, in], for linear layers alone;
- ``made``: how, in words for people;
- ``num_examples``: that it was measured on;
- ``dataset_size``: N of the data that the model was trained on. The curvature of the summed loss is N times what is
  stored, and that is what a merge uses;
- ``checkpoint``: the SHA-256 of each weight file that it belongs to, by the file's name, as JSON.

:mod:`cmc_server.training.curvature` writes such files as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.shards import Shard
from cmc_server.errors import EditingError

FORMAT = "cmc-curvature-1"
Kind = Literal["fisher", "gram"]


@dataclass(frozen=True)
class CurvatureOrigin:
    """What a curvature file says of itself.

    Args:
        kind: of the tensors.
        made: how it was measured, such as ``sampled labels, seed 0``.
        num_examples: how many were used.
        dataset_size: N, at least 1.
        checkpoint: SHA-256 by weight file.
    """

    kind: Kind
    made: str
    num_examples: int
    dataset_size: int
    checkpoint: Mapping[str, str]

    def as_metadata(self) -> dict[str, str]:
        """In the texts that safetensors takes."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "made": self.made,
            "num_examples": str(self.num_examples),
            "dataset_size": str(self.dataset_size),
            "checkpoint": json.dumps(dict(self.checkpoint)),
        }


class CurvatureFile:
    """An opened curvature file; only its header has been read.

    Args:
        path: the file.

    Raises:
        EditingError: it is missing or no curvature file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise EditingError(f"{path} is a folder; give a curvature file, made with cmc-server merge measure.")
        self._shard = Shard(path)
        metadata = json.loads(self._shard.header[8:]).get("__metadata__", {})
        try:
            if metadata["format"] != FORMAT or metadata["kind"] not in ("fisher", "gram"):
                raise ValueError(metadata["format"])
            self.origin = CurvatureOrigin(
                kind=metadata["kind"],
                made=metadata["made"],
                num_examples=int(metadata["num_examples"]),
                dataset_size=int(metadata["dataset_size"]),
                checkpoint=dict(json.loads(metadata["checkpoint"])),
            )
        except (KeyError, ValueError, TypeError):
            raise EditingError(f"{path} is no curvature file; make one with cmc-server merge measure.") from None
        size = self.origin.dataset_size
        if not 0 < size < 2**63:
            raise EditingError(f"{path} says that its data set has {size} texts, which cannot be; measure it again.")

    def check(self, checkpoint: Checkpoint, kind: Kind) -> None:
        """Refuse a file of another kind, or one that belongs to other weights.

        Raises:
            EditingError: as said, or a tensor is missing or has another shape.
        """
        if self.origin.kind != kind:
            raise EditingError(f"{self.path} holds {self.origin.kind} curvature, where {kind} is needed.")
        if self.origin.checkpoint != checkpoint.file_hashes():
            raise EditingError(
                f"{self.path} was not measured on the weights in {checkpoint.folder}; measure them again."
            )
        for name in checkpoint.names:
            stored, own = checkpoint.stored(name), self._shard.tensors.get(name)
            shape = stored.shape if kind == "fisher" else (stored.shape[-1:] * 2)
            missing = kind == "fisher" and stored.dtype.is_floating_point and own is None
            if missing or (own is not None and own.shape != shape):
                raise EditingError(f"{self.path} has no curvature that fits {name} of {checkpoint.folder}.")

    def __contains__(self, name: str) -> bool:
        return name in self._shard.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements of a tensor's curvature, of the loss summed over the data set: N times what is stored.

        Args:
            name: of the tensor.
            start: index of the first element, in row-major order.
            stop: index behind the last one; None is the end.

        Returns:
            [stop - start] float32.

        Raises:
            EditingError: it is not finite, or a Fisher below 0.
        """
        values = self._shard.read(name, start, stop).float().mul_(self.origin.dataset_size)
        if values.numel():
            low, high = (float(end) for end in values.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)) or (self.origin.kind == "fisher" and low < 0):
                raise EditingError(f"{self.path} holds numbers for {name} that no curvature has; measure it again.")
        return values


def write_curvature(path: Path, tensors: Mapping[str, Tensor], origin: CurvatureOrigin) -> None:
    """Write a curvature file, complete or not at all.

    Args:
        path: of the file; replaced if it is there.
        tensors: float32 by name.
        origin: its metadata.

    Raises:
        EditingError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may write one file; the later one stays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, part, origin.as_metadata())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise EditingError(f"The curvature file {path} cannot be written: {error}.") from None
    finally:
        if part.exists():
            part.unlink()
