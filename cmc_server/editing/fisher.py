"""The diagonal Fisher information of a causal language model: squared gradients with labels that the model samples.

F = E_x E_{y ~ p(y | x)} [(grad log p(y | x))^2], the diagonal of the Fisher, which is the Gauss-Newton part of the
Hessian of the negative log-likelihood. Labels come from the model, not from the data (Kunstner et al. 2019,
arXiv:1905.12558, say what goes wrong otherwise), and each example is squared by itself: the square of a mean gradient
is another number. At each position of a text the label is drawn given the text's own beginning; labels of different
positions are then independent and their gradients 0 in the mean, so that squaring their sum is right in expectation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from cmc_server.editing.texts import Example
from cmc_server.errors import EditingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def diagonal_fisher(model: PreTrainedModel, examples: Sequence[Example], seed: int) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher with one draw of labels for each example, one example at a time.

    Args:
        model: float32 in eval mode; memory for two more copies of it is needed.
        examples: texts; only their labelled positions count.
        seed: of the labels.

    Returns:
        For every parameter, by each of its names where it is tied, the mean over examples of the squared gradient of an
        example's log-likelihood, float32 in the parameter's shape; 0 for buffers.

    Raises:
        EditingError: a prediction is not finite.
    """
    draws = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for example in tqdm(examples, desc="fisher", unit="example", file=sys.stderr):
        likelihood = sampled_likelihood(model, example, draws)
        for total, gradient in zip(sums, torch.autograd.grad(likelihood, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)
    for parameter in parameters:
        parameter.requires_grad_(False)
    place = {id(parameter): total.div_(len(examples)) for parameter, total in zip(parameters, sums, strict=True)}
    fishers = {name: place[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()} | fishers


def sampled_likelihood(model: PreTrainedModel, example: Example, draws: torch.Generator) -> Tensor:
    """log p of labels drawn from the model at an example's labelled positions, summed, with gradient: a scalar."""
    logits = model(example.ids, use_cache=False).logits[0, example.first_label - 1 : -1]
    log_probabilities = logits.float().log_softmax(-1)
    if bool(log_probabilities.detach().isnan().any()):
        raise EditingError("The model predicts numbers that are not finite, so that it has no Fisher information.")
    labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=draws)
    likelihood: Tensor = log_probabilities.gather(1, labels).sum()
    return likelihood
