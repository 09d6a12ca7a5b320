"""The output head of a delta on a CPU: weights packed once into the order that oneDNN multiplies by.

Over a large vocabulary the head is most of a tiny model's work, and a plain linear layer rearranges its weights in
every call. Packed, one core comes near its peak (``benchmarks/step.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Rows that the packed order is made for; other numbers of rows run nearly as well, one row alone is the slowest.
_PLANNED_ROWS = 32


class PackedHead(nn.Module):
    """A linear layer whose weight is kept in oneDNN's order. Float32, inference only.

    Args:
        head: the layer to pack; its weight [D, H] stays as it is.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(head.weight.detach(), _PLANNED_ROWS)
        self._bias = None if head.bias is None else head.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] to [..., D]; the slow equal is ``torch.nn.functional.linear``."""
        logits: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._packed, self._bias, "none", [], "")
        return logits


def pack_head(model: PreTrainedModel) -> int:
    """Replace the output head of a float32 model on a CPU, where that is possible.

    Returns:
        Bytes of the packed copy; 0 if the head stays as it was.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype != torch.float32 or head.weight.device.type != "cpu":
        return 0
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    model.set_output_embeddings(PackedHead(head))
    return int(head.weight.nbytes)
