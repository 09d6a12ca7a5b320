"""Masks beside a sparse checkpoint, a bit for each weight: a weight that is 0 need not be one that was pruned.

A mask file is a safetensors file in a folder of its own, where neither transformers nor an engine looks for weights. It
has a uint8 tensor under the name of each pruned weight, [rows, (columns + 7) // 8], bits in numpy's order, 1 where the
weight stays, and metadata ``format`` (``cmc-masks-1``) and ``columns``, the widths by name as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmc_server.errors import EditingError

FORMAT = "cmc-masks-1"
#: Within the folder of a checkpoint.
MASKS = Path("sparsity") / "masks.safetensors"


def write_masks(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks into a checkpoint's folder.

    Args:
        folder: exists.
        masks: bool, in the shapes of the weights that they are named after, which have two dimensions.

    Raises:
        EditingError: the file cannot be written.
    """
    path = folder / MASKS
    packed = {name: torch.from_numpy(np.packbits(mask.numpy(), axis=1)).contiguous() for name, mask in masks.items()}
    columns = json.dumps({name: mask.shape[1] for name, mask in masks.items()})
    try:
        path.parent.mkdir()
        save_file(packed, path, {"format": FORMAT, "columns": columns})
    except (OSError, SafetensorError) as error:
        raise EditingError(f"The masks {path} cannot be written: {error}.") from None


def read_masks(folder: Path) -> dict[str, Tensor]:
    """The masks of a sparse checkpoint, bool, True where a weight stays.

    Raises:
        EditingError: the folder has no mask file, or it is broken.
    """
    path = folder / MASKS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EditingError(f"{path} is no mask file.")
            return {
                name: torch.from_numpy(np.unpackbits(file.get_tensor(name).numpy(), axis=1, count=width)).bool()
                for name, width in json.loads(metadata["columns"]).items()
            }
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise EditingError(f"The masks {path} cannot be read: {error}.") from None
