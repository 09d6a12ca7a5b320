"""The curvature of a trained delta, kept beside it for merges: the diagonal Fisher of what it was trained for.

``curvature/fisher.safetensors`` in the delta's folder is a curvature file as ``cmc-server merge measure`` writes it
(:mod:`cmc_server.editing.curvature` says what is in it), with one difference: the loss is that of the template LLM
steered by the delta, not of the delta by itself. Serving looks at the files of the folder alone, not at those of a
folder inside it, so that neither loading nor the delta's version depends on it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cmc_server.training.batches import Collator, TrainingSet
from cmc_server.training.output_folder import CURVATURE_FILE
from cmc_server.training.recipes import Recipe
from cmc_server.training.student import Student
from cmc_server.training.trainer import answers_by_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "cmc-curvature-1"
#: Objectives whose loss is a mean over answers; that of the others is a mean over tokens.
_PER_ANSWER = ("npo", "dpo")


def measure_curvature(
    recipe: Recipe, optimiser: Any, student: Student, collator: Collator, items: TrainingSet
) -> dict[str, Tensor]:
    """What the recipe's ``output.curvature`` asks for, by the names of the delta's parameters; nothing for ``none``."""
    if recipe.output.curvature == "optimiser":
        return online_fisher(recipe, optimiser, student.delta, items)
    if recipe.output.curvature == "sampled":
        return sampled_fisher(student.eval(), collator, items, recipe.seed)
    return {}


def second_moments(optimiser: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """Adam's running mean of squared gradients, its bias corrected: what training knows of the curvature at no cost.

    Args:
        optimiser: Adam or AdamW, as it ended.
        model: whose parameters it trained.

    Returns:
        By name: float32 on the CPU in the parameter's shape; 0 for parameters that never had a gradient.
    """
    betas = {id(one): group["betas"][1] for group in optimiser.param_groups for one in group["params"]}
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimiser.state.get(parameter)
        moments[name] = torch.zeros_like(parameter, device="cpu", requires_grad=False)
        if state:
            correction = 1 - betas[id(parameter)] ** float(state["step"])
            moments[name] = state["exp_avg_sq"].detach().float().cpu() / correction
    return moments


def online_fisher(recipe: Recipe, optimiser: Any, model: PreTrainedModel, items: TrainingSet) -> dict[str, Tensor]:
    """The Fisher of one item's loss, summed over its tokens, from Adam's second moments (Daheim et al. 2024).

    A step's gradient is that of a mean over B items of T tokens. Near a minimum the gradients of items are independent
    and 0 in the mean, so that its square is the Fisher of one item's summed loss over B T^2 in expectation. Labels are
    those of the data, gradients were clipped, and the mean reaches back over about 1 / (1 - beta_2) = 1,000 steps, to
    weights far from the last ones in a short run: a cheap estimate, and a coarse one.

    Args:
        recipe: says B, and whether the loss is a mean over tokens; where it is one over answers, T is 1.
        optimiser: as it ended.
        model: the delta.
        items: what was learned.

    Returns:
        By name, float32 on the CPU.
    """
    settings = recipe.optimisation
    num_items = settings.batch_size * settings.gradient_accumulation_steps * PartialState().num_processes
    lengths = [len(next(iter(item.values())).readings[0].labels) for item in items.items]
    num_tokens = 1.0 if recipe.objective.name in _PER_ANSWER else sum(lengths) / len(lengths)
    scale = min(num_items, len(lengths)) * num_tokens**2
    return {name: scale * moment for name, moment in second_moments(optimiser, model).items()}


def sampled_fisher(student: Student, collator: Collator, items: TrainingSet, seed: int) -> dict[str, Tensor]:
    """The Fisher of one item's log-likelihood under the steered LLM, with labels that it samples, item by item.

    Every answer of an item, beside every template, is squared by itself; templates are averaged, answers added up.

    Args:
        student: the delta, in evaluation mode.
        collator: puts an item into a batch.
        items: what was learned.
        seed: of the labels.

    Returns:
        By name of the delta's parameters, the mean over items, float32 on the CPU.
    """
    names, parameters = zip(*student.delta.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    draws = torch.Generator().manual_seed(seed)
    for index in tqdm(range(len(items)), desc="fisher", unit="item", file=sys.stderr):
        batch = send_to_device(collator([items[index]]), collator.templates[0].model.device)
        for answers in answers_by_template(student(batch), collator, batch):
            for answer in answers.values():
                log_probabilities = answer.fused_logits.log_softmax(-1)
                labels = torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=draws)
                likelihood = log_probabilities.gather(1, labels.to(log_probabilities.device)).sum()
                gradients = torch.autograd.grad(likelihood, parameters, retain_graph=True, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
    count = len(items) * len(collator.templates)
    return {name: total.div(count).cpu() for name, total in zip(names, sums, strict=True)}


def write_curvature(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, num_items: int) -> None:
    """Write the file into a delta's folder, unless there is nothing to write.

    Args:
        folder: the delta's weights lie in it already.
        tensors: as :func:`measure_curvature` gave them.
        recipe: as it was run.
        num_items: N of the data set, all of which was used.
    """
    if not tensors:
        return
    hashes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    sampled = recipe.output.curvature == "sampled"
    metadata = {
        "format": _FORMAT,
        "kind": "fisher",
        "made": f"steered, {f'sampled labels, seed {recipe.seed}' if sampled else 'second moments of the optimiser'}",
        "num_examples": str(num_items),
        "dataset_size": str(num_items),
        "checkpoint": json.dumps(hashes),
    }
    path = folder / CURVATURE_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(dict(tensors), path, metadata)
