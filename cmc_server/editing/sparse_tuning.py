"""Fine-tuning of a pruned model: the pooled adapter, LoRA with and without masks, and the oracle, all on equal data.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC): masks in training, weight decay or dropout as what
normalises the adapter, and LoRA as the baseline are the paper's (the oracle its reviewers'). Inferred, with LoSA's
values: everything about the optimiser, and that masks are applied in the forward.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from cmc_server.config import FrozenModel
from cmc_server.editing.adapters import Adapter, Attached, FullAdapter
from cmc_server.editing.blocks import LinearLayer
from cmc_server.editing.lora import LoraAdapter
from cmc_server.editing.losses import batched_nll, num_labels, passes
from cmc_server.editing.pooled_adapter import PooledAdapter, pooled_sizes
from cmc_server.editing.seeds import generator
from cmc_server.editing.texts import Example
from cmc_server.errors import EditingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TuningMethod = Literal["none", "pooled", "lora", "masked-lora", "oracle"]
#: Share of the steps in which the learning rate rises, and the norm that gradients are clipped to.
WARMUP, CLIP = 0.3, 0.3


class Tuning(FrozenModel):
    """How a pruned model is tuned.

    Args:
        rank: of LoRA in the mean over layers and rounds; the pooled adapter gets as many parameters.
        budget: one rank for all layers, or ranks in proportion to what pruning did to each layer's outputs.
        scale: factor on adapters, LoRA's alpha / r; the oracle has none.
        learning_rate: of AdamW, falling to 0 in a line after the warm-up.
        weight_decay: of the adapters' parameters, towards no change.
        dropout: rate on what adapters read.
        batch_size: texts for each step.
        examples: texts for each round but the last one.
        final_examples: texts for the last round.
    """

    rank: int = Field(default=8, ge=1)
    budget: Literal["loss", "uniform"] = "loss"
    scale: float = Field(default=2.0, gt=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    batch_size: int = Field(default=16, ge=1)
    examples: int = Field(default=1000, ge=1)
    final_examples: int = Field(default=6000, ge=1)


def make_adapter(
    method: TuningMethod, name: str, shape: tuple[int, int], rank: int, scale: float, seed: int
) -> Adapter:
    """A layer's adapter, as yet without effect.

    Args:
        method: which one; not ``none``.
        name: of the layer's weight.
        shape: of it, (out, in).
        rank: of LoRA, or what the pooled adapter's size comes from; the oracle has none.
        scale: factor on the change.
        seed: of LoRA's first factor.
    """
    if method == "oracle":
        return FullAdapter(shape)
    if method == "pooled":
        return PooledAdapter(shape, pooled_sizes(shape, rank), scale)
    return LoraAdapter(shape, min(rank, *shape), scale, generator(seed, name))


def is_masked(method: TuningMethod) -> bool:
    """Whether a method trains with the mask; plain LoRA, the baseline, meets it when it is merged only."""
    return method != "lora"


def attach(
    layers: Sequence[LinearLayer], adapters: Mapping[str, Adapter], masks: Mapping[str, Tensor] | None, rate: float
) -> list[Attached]:
    """Put adapters on the layers of a model.

    Args:
        layers: of it.
        adapters: by the name of a layer's weight.
        masks: the same; None leaves changes dense.
        rate: of dropout on what adapters read.
    """
    return [
        Attached(layer.module, adapters[layer.name], None if masks is None else masks[layer.name], rate)
        for layer in layers
    ]


def drawn(examples: Sequence[Example], number: int, seed: int) -> list[Example]:
    """The texts of a round in the order in which they are learned: the same ones for every method."""
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    return draw.sample(list(examples), min(number, len(examples)))


def fit(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], examples: Sequence[Example], tuning: Tuning, seed: int
) -> list[float]:
    """Train attached adapters for one epoch: AdamW, gradients clipped to 0.3, warm-up over 0.3 of the steps.

    Args:
        model: float32 in eval mode without gradients of its own, adapters attached.
        adapters: theirs are the parameters.
        examples: texts in the order in which they are learned.
        tuning: how.
        seed: of dropout.

    Returns:
        The mean loss of each batch before its step, in nats per token.

    Raises:
        EditingError: a loss is not finite.
    """
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    batches = [examples[first : first + tuning.batch_size] for first in range(0, len(examples), tuning.batch_size)]
    optimiser = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay)
    schedule = LambdaLR(optimiser, lambda step: _rate(step, len(batches)))
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), tqdm(batches, "tune", unit="step", file=sys.stderr) as bar:
        torch.manual_seed(seed)
        for batch in bar:
            optimiser.zero_grad()
            total = 0.0
            # A masked change is made anew in each pass, at the cost of some hundred tokens.
            for group in passes(batch):
                loss = batched_nll(model, group) / num_labels(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if not total < float("inf"):  # NaN is not either
                raise EditingError(f"The loss became {total} in step {len(losses) + 1}; lower --learning-rate.")
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            schedule.step()
            losses.append(total)
            bar.set_postfix(loss=f"{total:.4g}")
    return losses


def _rate(step: int, num_steps: int) -> float:
    """Factor on the learning rate of a step, counted from 0: up in a line to 1, and down towards 0 behind the last."""
    rising = max(1, round(WARMUP * num_steps))
    return min((step + 1) / rising, (num_steps - step) / max(1, num_steps - rising + 1))
