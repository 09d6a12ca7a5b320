"""Randomness that depends on a seed and a tensor's name alone, not on the order of tensors or on their files."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor.

    Args:
        seed: of the whole edit.
        name: of the tensor.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
