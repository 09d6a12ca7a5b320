"""A base, two models trained from it, and their curvature, all tiny: ``from tiny_family import Family``."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_checkpoints import Weights, rewrite

from cmc_server.cli import main


class Family:
    """A float32 base, two models trained from it, and curvature files of all three."""

    def __init__(self, root: Path, made: Path, data: Path) -> None:
        self.root = root
        self.folders = {}
        for number, name in enumerate(("base", "one", "two")):
            folder = self.folders[name] = root / f"family-{name}"
            shutil.copytree(made / "float", folder)
            rewrite(folder, lambda weights, number=number: shifted(weights, number))
            for kind in ("fisher", "gram"):
                words = ["merge", "measure", str(folder), str(data), "-o", str(self.file(name, kind))]
                assert main([*words, "--kind", kind, "--seed", str(number)]) == 0

    def file(self, name: str, kind: str = "fisher") -> Path:
        return self.root / f"{name}-{kind}.safetensors"

    def words(self, method: str, *, base: str | None = None, models: tuple[str, ...] = ("one", "two")) -> list[str]:
        """A merge by a method with what it needs."""
        words = ["merge", base or str(self.folders["base"]), *(str(self.folders[name]) for name in models)]
        words += ["--method", method]
        kind = {"fisher": "fisher", "gradient-matching": "fisher", "regmean": "gram"}.get(method)
        if kind is not None:
            words += ["--curvature", *(str(self.file(name, kind)) for name in models)]
        if method == "gradient-matching" and base is None:
            words += ["--base-curvature", str(self.file("base"))]
        return words

    def hessian(self, name: str) -> Weights:
        """What a merge reads: N times what is stored; the data have 3 records."""
        return {key: 3 * tensor for key, tensor in load_file(self.file(name)).items()}


def shifted(weights: Weights, number: int) -> Weights:
    generator = torch.Generator().manual_seed(number)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    return {name: tensor + (0.02 * noise[name] if number else 0) for name, tensor in weights.items()}
