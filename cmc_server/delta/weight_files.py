"""The weight files of a delta, by their headers alone: of known types, and as large as the config says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cmc_server.errors import DeltaError

#: JSON files of a delta are small; what is larger is no config, manifest or index.
MAX_JSON_BYTES = 16 * 2**20
#: Values that a delta's weights may have: floating point, and bytes of packed signs and levels (delta/packed.py).
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SINGLE = ("packed.safetensors", "model.safetensors")
_SIGNS, _LEVELS = ".signs", ".levels"


@dataclass(frozen=True)
class WeightFiles:
    """What lies in a folder.

    Args:
        num_bytes: size of the safetensors files.
        num_tensors: tensors in them.
        num_weights: values in them.
    """

    num_bytes: int
    num_tensors: int
    num_weights: int


def read_weight_files(folder: Path) -> WeightFiles:
    """Read the headers of the files that hold the weights; others may lie beside them.

    Raises:
        DeltaError: there is none, one is missing or not valid, or a tensor is of a type that no delta has.
    """
    files = _find(folder)
    counts = []
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                counts += [_num_values(path, name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DeltaError(f"{path} is not a valid safetensors file: {error}.") from None
    return WeightFiles(sum(path.stat().st_size for path in files), len(counts), sum(counts))


def check_size(folder: Path, config: Mapping[str, Any], weights: WeightFiles) -> None:
    """A config that asks for more than the files hold would take memory or time without end before it is refused.

    Raises:
        DeltaError: a layer count, or a matrix that the config implies, is larger than all the weights.
    """

    def size(*names: str) -> int:
        values = [value for name in names if isinstance(value := config.get(name), int)]
        return max(values, default=0)

    hidden = size("hidden_size", "n_embd")
    matrices = {
        "vocab_size": size("vocab_size") * hidden,
        "hidden_size": hidden * hidden,
        "intermediate_size": size("intermediate_size", "n_inner") * hidden,
        "num_attention_heads": size("num_attention_heads", "n_head") * size("head_dim") * hidden,
    }
    if size("num_hidden_layers", "n_layer") > weights.num_tensors:
        raise DeltaError(f"{folder / 'config.json'} asks for more layers than the weights have tensors.")
    for name, values in matrices.items():
        if values > weights.num_weights:
            raise DeltaError(
                f"{folder / 'config.json'} gives a {name} that implies {values} weights in one matrix, but all the "
                f"files hold {weights.num_weights}."
            )


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        DeltaError: it is no regular file, too large, or not JSON.
    """
    try:
        if not path.is_file():
            raise DeltaError(f"{path} is not a regular file.")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DeltaError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path} cannot be read as JSON: {error}.") from None


def _find(folder: Path) -> list[Path]:
    """What will be loaded, in transformers' order of preference behind packed weights."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(_read_index(index).values())) if index.exists() else []
    for name in shards:
        if name != Path(name).name or not (folder / name).is_file():
            raise DeltaError(f"{index} names {name}, which is missing from the delta folder.")
    single = [path for name in _SINGLE if (path := folder / name).is_file()][:1]
    if not single and not shards:
        raise DeltaError(
            f"The delta folder {folder} has no model.safetensors, nor an index of shards; convert its weights to "
            "safetensors."
        )
    return single or [folder / name for name in shards]


def _num_values(path: Path, name: str, tensor: Any) -> int:
    shape: Sequence[int] = tensor.get_shape()
    dtype = str(tensor.get_dtype())
    if name.endswith(_SIGNS) and dtype == "U8":
        return 8 * math.prod(shape)
    if name.endswith(_LEVELS) and dtype == "U8":
        return 0  # more about weights that have signs
    if dtype not in _FLOATS:
        raise DeltaError(f"{path} holds {name} as {dtype}; weights are floating-point numbers of 16 to 64 bits.")
    return math.prod(shape)


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DeltaError(f"{index} is not a valid safetensors index: it needs an object weight_map of file names.")
    return weight_map
