"""Checkpoint folders for tests of editing: read whole, changed in place, split into shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def weights_of(folder: Path) -> Weights:
    """All tensors of a folder, whatever files they lie in."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """Change the weights of a single-file checkpoint in place."""
    save_file(change(weights_of(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path, target: Path, num_shards: int = 3) -> Path:
    """A copy of a single-file checkpoint in several files."""
    weights = weights_of(folder)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    names = [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]
    weight_map = {tensor: names[index % num_shards] for index, tensor in enumerate(weights)}
    for name in names:
        part = {tensor: weights[tensor] for tensor, file in weight_map.items() if file == name}
        save_file(part, target / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return target


def trained(weights: Mapping[str, Tensor]) -> Weights:
    """What a little training might have made of weights, as bfloat16."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for name, tensor in weights.items()
    }
