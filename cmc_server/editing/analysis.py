"""Analyse an edit on data: its loss difference taken apart, for each tensor alone and for all of them, and its spread.

Everything is computed in float64, since the differences may be a millionth of the loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cmc_server.editing.dare import first_order_variance
from cmc_server.editing.methods import Dare
from cmc_server.editing.models import load_model
from cmc_server.editing.riemann import PARTS, TERMS, LossTerms, as_rows, loss_terms, ratio_intervals
from cmc_server.editing.stream import Edit
from cmc_server.editing.texts import Example, Text, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def analyse_edit(edit: Edit, texts: Sequence[Text], num_seeds: int) -> dict[str, Any]:
    """Take the loss difference of an edit apart: NLL in nats per token, of the edited model minus the post-trained one.

    The edit that is analysed is the one that is stored, rounded to the stored type.

    Args:
        edit: what to analyse; its model must fit into memory three times in float64.
        texts: what the loss is about.
        num_seeds: how many seeds the spread over masks is measured with, if the method draws.

    Returns:
        JSON values: ``total`` and ``tensors`` (each tensor edited alone) with mean, low and high of every term;
        ``interaction``, the exact total minus the sum of the tensors' exact differences; ``masks`` if the method draws.

    Raises:
        ConfigError: the texts cannot be encoded.
        EditingError: the model cannot be loaded.
    """
    post = edit.sources.post
    model = load_model(post, torch.float64)
    limit = getattr(model.config, "max_position_embeddings", None)
    examples = encode_all(post.folder, texts, limit)
    weights = np.array([example.num_labels for example in examples], dtype=np.float64)
    changes = _changes(edit, model)
    choices = [list(changes), *([name] for name in changes)]
    with tqdm(total=len(examples) * len(choices), desc="analyse", unit="path", file=sys.stderr) as bar:
        rows = [[_terms(model, example, changes, names, bar) for names in choices] for example in examples]
    sums = np.array([as_rows(of_example) for of_example in rows])  # [examples, choices, terms]
    intervals = ratio_intervals(sums.reshape(len(examples), -1), weights).reshape(3, len(choices), len(TERMS))
    exact = intervals[0, :, TERMS.index("exact")]
    report: dict[str, Any] = {
        "unit": "nats per token",
        "examples": len(examples),
        "tokens": int(weights.sum()),
        "parts": PARTS,
        "total": _summary(intervals[:, 0]),
        "tensors": {name: _summary(intervals[:, index]) for index, name in enumerate(changes, start=1)},
        "interaction": float(exact[0] - exact[1:].sum()),
    }
    if edit.method.draws:
        report["masks"] = _masks(edit, model, examples, weights, num_seeds)
    return report


def _changes(edit: Edit, model: PreTrainedModel) -> dict[str, Tensor]:
    """E of each edited tensor that it changes at all, float64."""
    weights = model.state_dict()
    changes = {}
    for name in edit.edited_names():
        change = torch.cat(list(edit.tensor(name))).double().view_as(weights[name]) - weights[name]
        if bool(change.any()):
            changes[name] = change
    return changes


def _terms(
    model: PreTrainedModel, example: Example, changes: Mapping[str, Tensor], names: Sequence[str], bar: Any = None
) -> LossTerms:
    weights = model.state_dict()

    def phi(t: Tensor) -> Tensor:
        return _nll(model, {name: weights[name] + t * changes[name] for name in names}, example)

    terms = loss_terms(phi) if names else LossTerms(0.0, 0.0, 0.0, 0.0)
    if bar is not None:
        bar.update()
    return terms


def _nll(model: PreTrainedModel, weights: dict[str, Tensor], example: Example) -> Tensor:
    """Summed NLL of an example's labels, with plain attention: fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = functional_call(model, weights, (example.ids,), {"use_cache": False}).logits
    predicted = logits[0, example.first_label - 1 : -1].log_softmax(-1)
    total: Tensor = -predicted.gather(1, example.ids[0, example.first_label :, None]).sum()
    return total


def _masks(
    edit: Edit, model: PreTrainedModel, examples: Sequence[Example], weights: np.ndarray, num_seeds: int
) -> dict[str, Any]:
    """Mean and standard deviation of the total's terms over seeds, the edit's own first."""
    totals = []
    for seed in tqdm(range(edit.seed, edit.seed + num_seeds), desc="masks", unit="seed", file=sys.stderr):
        changes = _changes(Edit(edit.sources, edit.method, seed), model)
        sums = as_rows([_terms(model, example, changes, list(changes)) for example in examples])
        totals.append(sums.sum(0) / weights.sum())
    values = np.array(totals)
    report: dict[str, Any] = {
        "seeds": num_seeds,
        "mean": _summary(ratio_intervals(values, np.ones(num_seeds))),
        "standard_deviation": dict(zip(TERMS, values.std(0, ddof=1).tolist(), strict=True)),
    }
    if isinstance(edit.method, Dare):
        report["first_order_standard_deviation_expected"] = _expected_deviation(edit, edit.method, model, examples)
    return report


def _expected_deviation(edit: Edit, method: Dare, model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Standard deviation of the first-order term over all masks, from the gradient at the post-trained model."""
    weights = model.state_dict()
    leaves = {name: weights[name].clone().requires_grad_() for name in edit.edited_names()}
    for example in examples:
        _nll(model, leaves, example).backward()  # type: ignore[no-untyped-call]
    num_labels = sum(example.num_labels for example in examples)
    gradients = {name: leaf.grad / num_labels for name, leaf in leaves.items() if leaf.grad is not None}
    variances = (
        first_order_variance(edit.delta(name), gradient, method.drop, method.k) for name, gradient in gradients.items()
    )
    return math.sqrt(sum(variances))


def _summary(intervals: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        term: {"mean": float(mean), "low": float(low), "high": float(high)}
        for term, mean, low, high in zip(TERMS, *intervals, strict=True)
    }


def analysis_table(analysis: Mapping[str, Any]) -> list[str]:
    """The analysis as lines for people."""
    width = max(len(name) for name in ("tensor (each alone)", *analysis["tensors"]))
    head = f"{'tensor (each alone)':<{width}}" + "".join(f"{term.replace('_', ' '):>15}" for term in TERMS)

    def row(name: str, summary: Mapping[str, Any]) -> str:
        return f"{name:<{width}}" + "".join(f"{summary[term]['mean']:>15.3e}" for term in TERMS)

    total = analysis["total"]
    lines = [
        f"loss difference in nats per token, {analysis['examples']} examples, {analysis['tokens']} tokens",
        head,
        *(row(name, summary) for name, summary in analysis["tensors"].items()),
        row("all together", total),
        f"{'  95 % interval':<{width}}" + "".join(f"{total[term]['low']:>15.2e}" for term in TERMS),
        " " * width + "".join(f"{total[term]['high']:>15.2e}" for term in TERMS),
        f"interaction of the tensors: {analysis['interaction']:.3e}",
    ]
    if "masks" in analysis:
        masks = analysis["masks"]
        lines += [
            f"{'mean over masks':<{width}}" + "".join(f"{masks['mean'][term]['mean']:>15.3e}" for term in TERMS),
            f"{'deviation':<{width}}" + "".join(f"{masks['standard_deviation'][term]:>15.3e}" for term in TERMS),
        ]
        if "first_order_standard_deviation_expected" in masks:
            expected = masks["first_order_standard_deviation_expected"]
            lines.append(f"deviation of the first order that the gradient predicts: {expected:.3e}")
    return lines
