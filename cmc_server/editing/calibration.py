"""BitDelta's scale calibration: scales trained so that the logits stay those of the post-trained model.

Liu et al. 2024 (arXiv:2402.10193), equation 5: with signs and base fixed, the mean squared difference between the
logits of the edited and of the post-trained model is minimised over the scales alone. (The original code also trains
whatever is not packed and counts padding; here there is no padding, and only scales are trained.)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from cmc_server.editing.bitdelta import rounded_scales, signs
from cmc_server.editing.models import load_model
from cmc_server.editing.stream import Edit
from cmc_server.editing.texts import Text, encode_all

BATCH_SIZE = 4


def calibrate_scales(
    edit: Edit, scales: Mapping[str, Tensor], texts: Sequence[Text], num_steps: int, rate: float, seed: int
) -> dict[str, Tensor]:
    """Train the scales of a one-bit BitDelta: AdamW with a cosine schedule, batches of 4 texts, as published.

    Args:
        edit: names the tensors and gives their delta parameters; the model must fit into memory in float32 thrice.
        scales: where to begin, float32 that broadcast to the tensors.
        texts: what the model reads; prompts count as much as answers.
        num_steps: optimiser steps; 200 in the published script.
        rate: learning rate; 1e-4 as published.
        seed: of the order of the texts.

    Returns:
        The trained scales; those of rows rounded as :func:`cmc_server.editing.bitdelta.rounded_scales` does.

    Raises:
        ConfigError: the texts cannot be encoded.
        EditingError: the model cannot be loaded.
    """
    post = edit.sources.post
    model = load_model(post, torch.float32)
    limit = getattr(model.config, "max_position_embeddings", None)
    inputs = [example.ids for example in encode_all(post.folder, texts, limit)]
    deltas = {name: edit.delta(name) for name in scales}
    weights = model.state_dict()
    fixed = {name: (weights[name] - delta, signs(delta)) for name, delta in deltas.items()}
    trained = {name: scale.clone().requires_grad_() for name, scale in scales.items()}
    optimiser = torch.optim.AdamW(list(trained.values()), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    with tqdm(total=num_steps, desc="calibrate", unit="step", file=sys.stderr) as bar:
        for _ in range(num_steps):
            batch = [draw.choice(inputs) for _ in range(BATCH_SIZE)]
            num_tokens = sum(ids.numel() for ids in batch)
            optimiser.zero_grad()
            total = 0.0
            for ids in batch:
                with torch.no_grad():
                    wanted = model(ids, use_cache=False).logits
                edited = {name: base + sign * trained[name] for name, (base, sign) in fixed.items()}
                logits = functional_call(model, edited, (ids,), {"use_cache": False}).logits
                loss = (logits - wanted).square().mean() * (ids.numel() / num_tokens)
                loss.backward()
                total += float(loss.detach())
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{total:.4g}")
            bar.update()
    return {name: _stored(scale.detach()) for name, scale in trained.items()}


def _stored(scale: Tensor) -> Tensor:
    return rounded_scales(scale) if scale.numel() > 1 else scale
