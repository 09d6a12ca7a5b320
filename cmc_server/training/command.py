"""``cmc-server train RECIPE.yaml``: from a recipe to a delta folder."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cmc_server.errors import ConfigError
from cmc_server.training.recipes import Recipe, read_recipe

if TYPE_CHECKING:
    from cmc_server.training.batches import Collator, TrainingSet
    from cmc_server.training.objectives import Objective
    from cmc_server.training.student import Student

_NEEDED = ("accelerate", "matplotlib")


def run_train(
    recipe: Path,
    output: Path | None = None,
    template: str | Sequence[str] | None = None,
    *,
    restart: bool = False,
) -> int:
    """Train a delta as a recipe says and write its folder. Progress goes to stderr, the folder's path to stdout.

    Args:
        recipe: the recipe file; its paths are relative to it.
        output: folder to write instead of the recipe's.
        template: template LLM (folder or hub id) instead of the recipe's, such as a local copy of the same model; as
            many as the recipe has.
        restart: begin again where an unfinished run of this output would be continued.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: recipe, data, template or output cannot be used, the training diverged, or the training extra is
            not installed.
    """
    settings = read_recipe(recipe)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Training needs {' and '.join(missing)}; run: pip install 'cmc-server[train]'.")
    from cmc_server.training.data import local_or_hub

    own = [local_or_hub(path, recipe.parent) for path in settings.templates]
    given = [template] if isinstance(template, str) else list(template or own)
    if len(given) != len(settings.templates):
        raise ConfigError(f"The recipe has {len(settings.templates)} templates; give --template for each, in order.")
    folder = output or recipe.parent / settings.output.folder
    if train_delta(settings, recipe.parent, folder, given, restart=restart):
        sys.stdout.write(f"{folder}\n")
    return 0


def train_delta(
    recipe: Recipe, base: Path, folder: Path, template_paths: Sequence[str], *, restart: bool = False
) -> bool:
    """Train and save; the same recipe, seed and machine give the same weights, interrupted or not.

    Run as several processes (``torchrun --nproc_per_node N -m cmc_server train ...``), each takes its share of every
    step's items, so that a step has N times the recipe's ``batch_size``.

    Args:
        recipe: a valid recipe.
        base: folder that the recipe's paths are relative to.
        folder: the delta folder to write.
        template_paths: folders or hub ids of the template LLMs.
        restart: drop the checkpoints of an unfinished run.

    Returns:
        Whether this process wrote the folder: of several, only the main one does.

    Raises:
        ConfigError: data, template or output cannot be used, another run is writing the output or has left its working
            folder, or the training diverged; the output folder is then as it was.
    """
    from cmc_server.training.output_folder import check_output, held, paths_read

    check_output(folder, paths_read(recipe, base, template_paths))
    # By torchrun's own word: accelerate knows of other processes on a CPU only once the trainer is made.
    with held(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train_held(recipe, base, folder, template_paths, restart=restart)


def _train_held(recipe: Recipe, base: Path, folder: Path, template_paths: Sequence[str], *, restart: bool) -> bool:
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from cmc_server.delta.prompt import PromptEncoder
    from cmc_server.training.batches import Collator
    from cmc_server.training.checkpoints import last_checkpoint, open_folder, working_folder
    from cmc_server.training.curvature import measure_curvature, write_curvature
    from cmc_server.training.curves import LOSS_CURVE, draw_losses
    from cmc_server.training.data import local_or_hub, read_records
    from cmc_server.training.examples import ExampleEncoder, training_set
    from cmc_server.training.hidden_cache import HiddenCache
    from cmc_server.training.output_folder import publishing
    from cmc_server.training.record import build_manifest, prompt_manifest, run_hash
    from cmc_server.training.student import Student, check_finite, load_delta, new_delta, save_delta, vocabulary_size
    from cmc_server.training.template import FrozenTemplate
    from cmc_server.training.trainer import DeltaTrainer

    data, objective = recipe.data, recipe.objective
    pairs = objective.name == "dpo"
    records = {
        key: read_records(source, base, pairs=pairs and key in ("train", "heldout"))
        for key, source in data.sources.items()
    }
    process = PartialState()
    templates = [FrozenTemplate.load(path, process.device) for path in template_paths]
    tuned_path: str | None = getattr(objective, "tuned", None)
    tuned = None if tuned_path is None else FrozenTemplate.load(local_or_hub(tuned_path, base), process.device)
    tokenizer = templates[0].tokenizer
    llms = [*templates, *([] if tuned is None else [tuned])]
    work = working_folder(folder)
    run = run_hash(recipe, records, llms)
    checkpoint = last_checkpoint(work, run, restart=restart)

    set_seed(recipe.seed)
    if recipe.delta.start_from is None:
        delta = new_delta(recipe.delta, tokenizer, data.max_length)
    else:
        delta = load_delta(local_or_hub(recipe.delta.start_from, base), tokenizer, data.max_length)
    student = Student(delta, vocabulary_size(tokenizer))

    cache_folder = None if data.cache_folder is None else base / data.cache_folder
    encoder = ExampleEncoder(
        templates,
        tuned,
        PromptEncoder(tokenizer, prompt_manifest(recipe)),
        HiddenCache(data.cache, data.cache_budget_gib, cache_folder),
        data.max_length,
    )
    sets = {"train": training_set(encoder, objective, recipe.main, records, recipe.seed)}
    if "heldout" in records:
        sets["heldout"] = training_set(encoder, objective, "train", {"train": records["heldout"]}, recipe.seed)
    collator = Collator(templates, tuned, encoder.bridges)
    if process.is_main_process:
        open_folder(work, run, checkpoint)
    trainer = DeltaTrainer(student, collator, recipe, sets["train"], sets.get("heldout"), work)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not process.is_main_process:
        return False

    # What is measured is what is stored: the weights as rounded by the output type.
    dtype: torch.dtype = getattr(torch, recipe.output.dtype)
    check_finite(delta, dtype)
    delta.to(dtype).float()
    # A run that was resumed after its last step has begun no epoch.
    sets["train"].set_epoch(recipe.optimisation.epochs - 1)
    metrics = _measure(student, collator, objective, sets)
    curvature = measure_curvature(recipe, trainer.optimizer, student, collator, sets["train"])
    manifest = build_manifest(recipe, records, sets, llms, trainer.state.global_step, metrics)
    with publishing(folder) as part:
        save_delta(delta.cpu(), tokenizer, manifest, part, dtype)
        write_curvature(part, curvature, recipe, len(sets["train"]))
        draw_losses(trainer.state.log_history, part / LOSS_CURVE)
    shutil.rmtree(work)
    return True


def _measure(
    student: Student, collator: Collator, objective: Objective, sets: Mapping[str, TrainingSet]
) -> dict[str, float]:
    """The figures of the finished delta, for its manifest.

    Raises:
        ConfigError: a loss with the delta is not finite.
    """
    from cmc_server.training.student import DIVERGED
    from cmc_server.training.trainer import measure_losses

    metrics = {}
    for role, items in sets.items():
        measured = measure_losses(student, collator, objective, items)
        if not math.isfinite(measured["loss"][0]):
            raise ConfigError(DIVERGED.format(f"ended with a delta whose {role} loss is {measured['loss'][0]}"))
        for term, (steered, alone) in measured.items():
            if term == "loss" or len(measured) > 2:  # a single term is the loss
                metrics[f"{role}_{term}"], metrics[f"{role}_{term}_without_delta"] = steered, alone
    return metrics
