"""Training objectives: pure functions of the template's logits, the delta's logits and the labels.

Shapes: N response tokens (end of the answer included), V template logits, D delta logits, D <= V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmc_server.fusion.rule import Shift, fuse

#: (template logits [N, V], delta logits [N, D], labels [N], template weight) to a scalar.
Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def instruction_tuning(
    template_logits: Tensor, delta_logits: Tensor, labels: Tensor, template_weight: float = 0.0
) -> Tensor:
    """Cross-entropy of the steered distribution on the response tokens, at strength 1.

    L = -(1/N) sum_t [(1 - a) log q_t[y_t] + a sum_v p_t[v] log q_t[v]], with p = softmax(l) of the frozen template and
    q = softmax(l + d) of template and delta (Cross-model Control, NeurIPS 2024, where a = 0). The second term is the
    KL divergence of q from p but for a constant: it keeps the delta from shifting more than it needs to. The rule is
    that of serving; template and delta share a vocabulary, and columns that pad the template's logits beyond it stay as
    they are.

    Args:
        template_logits: [N, V], without gradient.
        delta_logits: [N, D].
        labels: [N] int64, the tokens that follow.
        template_weight: a, in [0, 1).

    Returns:
        A scalar, float32.
    """
    delta_ids = torch.arange(delta_logits.shape[-1], device=delta_logits.device)
    steered = fuse(template_logits, [Shift(delta_logits, delta_ids, 1.0)])
    loss = cross_entropy(steered, labels)
    if template_weight == 0:
        return loss
    pull = cross_entropy(steered, template_logits.float().softmax(-1))
    return (1 - template_weight) * loss + template_weight * pull


OBJECTIVES: Mapping[str, Objective] = {"instruction_tuning": instruction_tuning}
