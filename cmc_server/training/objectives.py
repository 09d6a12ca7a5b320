"""Training objectives: pure functions of the template's logits, the delta's logits and the labels.

Shapes: N response tokens (end of the answer included), V template logits, D delta logits, D <= V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmc_server.fusion.rule import Shift, fuse

#: (template logits [N, V], delta logits [N, D], labels [N]) to a scalar.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def instruction_tuning(template_logits: Tensor, delta_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the steered distribution on the response tokens, at strength 1.

    L = -(1/N) sum_t log softmax(l_t + d_t)[y_t], with l from the frozen template and d from the delta
    (Cross-model Control, NeurIPS 2024). The rule is that of serving; template and delta share a vocabulary, and columns
    that pad the template's logits beyond it stay as they are.

    Args:
        template_logits: [N, V], without gradient.
        delta_logits: [N, D].
        labels: [N] int64, the tokens that follow.

    Returns:
        A scalar, float32.
    """
    delta_ids = torch.arange(delta_logits.shape[-1], device=delta_logits.device)
    return cross_entropy(fuse(template_logits, [Shift(delta_logits, delta_ids, 1.0)]), labels)


OBJECTIVES: Mapping[str, Objective] = {"instruction_tuning": instruction_tuning}
