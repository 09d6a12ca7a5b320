"""``cmc-server train RECIPE.yaml``: from a recipe to a delta folder."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.errors import ConfigError
from cmc_server.training.recipes import Recipe, read_recipe

_NEEDED = ("accelerate", "matplotlib")


def run_train(recipe: Path, output: Path | None = None, template: str | None = None) -> int:
    """Train a delta as a recipe says and write its folder. Progress goes to stderr, the folder's path to stdout.

    Args:
        recipe: the recipe file; its paths are relative to it.
        output: folder to write instead of the recipe's.
        template: template LLM (folder or hub id) instead of the recipe's, such as a local copy of the same model.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: recipe, data or template cannot be used, or the training extra is not installed.
    """
    settings = read_recipe(recipe)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Training needs {' and '.join(missing)}; run: pip install 'cmc-server[train]'.")
    folder = output or recipe.parent / settings.output.folder
    train_delta(settings, recipe.parent, folder, template or settings.template)
    sys.stdout.write(f"{folder}\n")
    return 0


def train_delta(recipe: Recipe, base: Path, folder: Path, template_path: str) -> None:
    """Train and save; the same recipe, seed and machine give the same weights.

    Args:
        recipe: a valid recipe.
        base: folder that the recipe's data paths are relative to.
        folder: the delta folder to write.
        template_path: folder or hub id of the template LLM.

    Raises:
        ConfigError: data or template cannot be used.
    """
    import torch
    from transformers import set_seed

    from cmc_server.delta.prompt import PromptEncoder
    from cmc_server.training.data import encode_chats, read_chats
    from cmc_server.training.record import LOSS_CURVE, build_manifest, draw_losses
    from cmc_server.training.student import Student, new_delta, save_delta
    from cmc_server.training.template import FrozenTemplate
    from cmc_server.training.trainer import DeltaTrainer, measure_losses

    files = {
        name: base / path for name, path in (("train", recipe.data.train), ("heldout", recipe.data.heldout)) if path
    }
    chats = {name: read_chats(path) for name, path in files.items()}
    template = FrozenTemplate.load(template_path, "cuda" if torch.cuda.is_available() else "cpu")
    encoder = PromptEncoder(template.tokenizer, DeltaManifest())
    examples = {name: encode_chats(some, template, encoder, recipe.data.max_length) for name, some in chats.items()}
    set_seed(recipe.seed)
    delta = new_delta(recipe.delta, template.tokenizer, recipe.data.max_length)
    student = Student(delta)
    with tempfile.TemporaryDirectory(prefix="cmc-train-") as work:
        trainer = DeltaTrainer(student, template, recipe, examples["train"], examples.get("heldout"), Path(work))
        trainer.train()
    # What is measured is what is stored: the weights as rounded by the output type.
    dtype: torch.dtype = getattr(torch, recipe.output.dtype)
    delta.to(dtype).float()
    metrics = {}
    for role, some in examples.items():
        metrics[f"{role}_loss"], metrics[f"{role}_loss_without_delta"] = measure_losses(student, template, recipe, some)
    manifest = build_manifest(recipe, files, examples, trainer.state.global_step, metrics)
    save_delta(delta.cpu(), template.tokenizer, manifest, folder, dtype)
    draw_losses(trainer.state.log_history, folder / LOSS_CURVE)
