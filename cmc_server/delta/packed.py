"""Read packed weights: few bits for each weight and scales, as ``cmc-server edit --packed`` writes them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmc_server.errors import DeltaError

PACKED_FILE = "packed.safetensors"
PACKED_FORMAT = "cmc-packed-1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_packed(folder: Path) -> bool:
    """Whether a delta folder holds packed weights instead of a ``model.safetensors``."""
    return (folder / PACKED_FILE).is_file()


def load_packed(folder: Path, base: Path | None = None) -> dict[str, Tensor]:
    """All weights of a packed folder, as the model that was packed named and typed them.

    Args:
        folder: holds ``packed.safetensors``.
        base: folder of the base, where the weights are relative to one.

    Returns:
        A state dict on the CPU.

    Raises:
        DeltaError: the file is corrupt or of another format, the base is needed and missing, or it is not the one that
            the weights are relative to.
    """
    path = folder / PACKED_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("format") != PACKED_FORMAT:
            raise DeltaError(f"{path} is not of the format {PACKED_FORMAT}.")
        tensors, identity = json.loads(metadata["tensors"]), json.loads(metadata["base"])
        base_weights = _read_base(path, base, identity) if identity else None
        weights = {}
        for name, entry in tensors.items():
            signs, scales = stored.pop(f"{name}.signs"), stored.pop(f"{name}.scales")
            levels = stored.pop(f"{name}.levels", None)
            magnitudes = scales.float() if levels is None else unpack_levels(levels, scales, entry["shape"][-1])
            change = unpack_signs(signs, entry["shape"][-1]) * magnitudes
            weight = change if base_weights is None else base_weights[name].float() + change
            weights[name] = weight.view(entry["shape"]).to(_DTYPES[entry["dtype"]])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DeltaError(f"{path} is not a valid file of packed weights: {error!r}.") from None
    return weights | stored


def unpack_signs(signs: Tensor, length: int) -> Tensor:
    """Packed signs uint8 [..., ceil(length / 8)] as +1 and -1, float32 [..., length]; the lowest bit comes first."""
    return _unpack_bits(signs, length).float().mul_(2).sub_(1)


def unpack_levels(levels: Tensor, scales: Tensor, length: int) -> Tensor:
    """The magnitude of each weight.

    Args:
        levels: uint8 [bits, ..., ceil(length / 8)], packed as signs are, the lowest bit of the level first.
        scales: of the M levels, float [..., M], or 1 for any of the first axes.
        length: of a row.

    Returns:
        float32 [..., length].
    """
    places = torch.zeros(*levels.shape[1:-1], length, dtype=torch.int64)
    for bit, plane in enumerate(levels):
        places += _unpack_bits(plane, length).long() << bit
    return scales.float().expand(*places.shape[:-1], -1).gather(-1, places)


def _unpack_bits(packed: Tensor, length: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=length, bitorder="little"))


def unpack_folder(folder: Path, output: Path, base: Path | None = None) -> None:
    """Write a packed folder as a regular one.

    Args:
        folder: the packed folder.
        output: a new folder.
        base: as for :func:`load_packed`.

    Raises:
        DeltaError: as for :func:`load_packed`, or the output exists.
    """
    weights = load_packed(folder, base)
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        raise DeltaError(f"The output folder {output} exists; give another one.") from None
    for path in folder.iterdir():
        if path.is_file() and path.name != PACKED_FILE:
            shutil.copyfile(path, output / path.name)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})


def _read_base(path: Path, base: Path | None, identity: dict[str, str]) -> dict[str, Tensor]:
    if base is None:
        raise DeltaError(f"{path} is relative to a base; give the folder of that base.")
    weights: dict[str, Any] = {}
    for name, expected in identity.items():
        if name != Path(name).name:
            raise DeltaError(f"{path} names the base file {name!r}, which is outside the base's folder.")
        try:
            with (base / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            raise DeltaError(f"{path} is relative to a base with the file {name}, which {base} lacks.") from None
        if found != expected:
            raise DeltaError(f"{path} is relative to another base: {base / name} has other content.")
        with safe_open(base / name, framework="pt") as file:
            weights |= {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118 - not a mapping
    return weights
