"""What :mod:`cmc_server.editing.merge_metrics` needs of models and data: losses, gradients, merged weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.losses import mean_loss, nll, num_labels
from cmc_server.editing.merge_inputs import Merge
from cmc_server.editing.merge_metrics import gradient_mismatch, relative_distance, robustness_curve
from cmc_server.editing.models import load_model
from cmc_server.editing.stream import Edit
from cmc_server.editing.texts import Example, Text, encode_all, read_texts
from cmc_server.errors import EditingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_merge(merge: Merge, target: Checkpoint | None) -> dict[str, Any]:
    """What the options of a merge ask to measure.

    Args:
        merge: what to measure.
        target: a jointly trained model, if there is one.

    Returns:
        JSON values: ``relative_distance``, and with data ``gradient_mismatch`` for each model, where there is a target;
        with data ``losses``, those of the merged model in nats per token, and ``robustness`` where there are alphas.

    Raises:
        EditingError: the target does not fit the models, or equals the base.
        ConfigError: data cannot be used.
    """
    options, post = merge.options, merge.sources.post
    figures: dict[str, Any] = {}
    tasks = [_examples(post, texts) for texts in map(read_texts, options.data)]
    if target is not None:
        check_agreement(post, target)
        figures["relative_distance"] = relative_distance(_beside(merge.edit(), target))
        if figures["relative_distance"] == float("inf"):
            raise EditingError(f"{target.folder} equals the base, so that no distance can be measured in its terms.")
    if target is not None and tasks:
        figures["gradient_mismatch"] = [
            gradient_mismatch(_gradients(target, task), _gradients(model, task))
            for model, task in zip(merge.sources.posts, tqdm(tasks, "mismatch", file=sys.stderr), strict=True)
        ]
    if tasks:
        model = load_model(post, torch.float32)

        def losses(alpha: float) -> list[float]:
            _load(merge.edit(alpha), model)
            with torch.no_grad():
                return [float(mean_loss(model, task)) for task in tasks]

        figures["losses"] = losses(1.0)
        if options.alphas:
            figures["robustness"] = robustness_curve(losses, tqdm(options.alphas, "alphas", file=sys.stderr))
    return figures


def _gradients(checkpoint: Checkpoint, examples: Sequence[Example]) -> list[Tensor]:
    """The gradient of the mean loss, by parameter; an example at a time, since its graph is what takes memory."""
    model = load_model(checkpoint, torch.float32).requires_grad_(True)
    for example in examples:
        (nll(model, example) / num_labels(examples)).backward()  # type: ignore[no-untyped-call]
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]


def _examples(checkpoint: Checkpoint, texts: Sequence[Text]) -> list[Example]:
    limit = checkpoint.config.get("max_position_embeddings")
    return encode_all(checkpoint.folder, texts, limit)


def _beside(edit: Edit, target: Checkpoint) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of what the merge stores, of the target and of the base."""
    base = edit.sources.base
    for name in edit.edited_names():
        start = 0
        for piece in edit.tensor(name):
            stop = start + piece.numel()
            zero = torch.zeros_like(piece)
            yield piece, target.read(name, start, stop), zero if base is None else base.read(name, start, stop)
            start = stop


def _load(edit: Edit, model: PreTrainedModel) -> None:
    """Put the merged weights into a model, rounded as they are stored."""
    weights = model.state_dict()
    for name in edit.edited_names():
        weights[name].copy_(torch.cat(list(edit.tensor(name))).view_as(weights[name]))


def metrics_table(metrics: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The figures as lines for people.

    Args:
        metrics: as :func:`evaluate_merge` returns them.
        names: of the models.
    """
    lines = []
    if "relative_distance" in metrics:
        lines.append(f"distance to the target, of the target's to the base: {metrics['relative_distance']:.4f}")
    if "gradient_mismatch" in metrics:
        pairs = zip(names, metrics["gradient_mismatch"], strict=True)
        lines += [f"gradient mismatch on the data of {name}: {mismatch:.4g}" for name, mismatch in pairs]
    if "losses" in metrics:
        pairs = zip(names, metrics["losses"], strict=True)
        lines += [f"loss on the data of {name}: {loss:.4f} nats per token" for name, loss in pairs]
    if "robustness" in metrics:
        curve = metrics["robustness"]
        width = max(10, *(len(name) + 2 for name in names))
        lines.append(f"{'alpha':>8}" + "".join(f"{name:>{width}}" for name in (*names, "mean")) + "  nats per token")
        for point in curve["points"]:
            values = (*point["losses"], point["mean"])
            lines.append(f"{point['alpha']:>8.4g}" + "".join(f"{value:>{width}.4f}" for value in values))
        lines.append(f"best alpha {curve['best_alpha']:.4g}, spread {curve['spread']:.4f}")
    return lines
