"""A Llama's forward pass over packed rows in few operations: what most deltas are, and how most of their steps go.

A tiny model's step is mostly the cost of calling operations, not of computing. Joined projections, tables of the rotary
angles and one write of keys and values need a third of transformers' calls. Its slow equal is the transformers model
itself; the runner compares the two whenever it loads a delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cmc_server.delta.attention import KeyValuePool, attend

#: Kinds of rotary angles that depend on the position alone, not on how long the input is.
_FIXED_ANGLES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class FastLlama:
    """The same weights, packed rows in, logits of some positions out.

    Args:
        model: in evaluation mode; gives its weights away, and can no longer be called itself.
        num_positions: longest input.
    """

    def __init__(self, model: LlamaForCausalLM, num_positions: int) -> None:
        config = model.config
        self._num_heads = config.num_attention_heads
        self._head_size = model.model.layers[0].self_attn.head_dim
        self._eps = config.rms_norm_eps
        self._embedding = model.model.embed_tokens.weight
        self._norm = model.model.norm.weight
        self._head = model.lm_head
        self._layers = [_join(layer) for layer in model.model.layers]
        model.model.layers = nn.ModuleList()  # their weights are held joined now
        positions = torch.arange(num_positions, device=self._embedding.device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self._embedding, positions)
        # The angles of both halves of a head are equal; rotated, the first half changes its sign.
        sign = torch.ones_like(sin)
        sign[..., : self._head_size // 2] = -1
        self._cos, self._sin = cos[0].unsqueeze(1), (sin * sign)[0].unsqueeze(1)

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether this class computes what the model computes."""
        if type(model) is not LlamaForCausalLM:
            return False
        kind = getattr(model.model.rotary_emb, "rope_type", None)
        return kind in _FIXED_ANGLES and model.config.hidden_act == "silu"

    def forward(self, pool: KeyValuePool, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits at some of the packed tokens.

        Args:
            pool: with the layout of these tokens.
            ids: [T] int64.
            positions: [T] int64.
            wanted: [N] int64 into the packed tokens.

        Returns:
            [N, D].
        """
        states = embedding(ids, self._embedding)
        cos, sin = self._cos[positions], self._sin[positions]
        width = (states.shape[1],)
        for number, layer in enumerate(self._layers):
            states = states + self._attention(
                pool, number, layer, rms_norm(states, width, layer.input_norm, self._eps), cos, sin
            )
            gate, up = linear(
                rms_norm(states, width, layer.mlp_norm, self._eps), layer.gate_up, layer.gate_up_bias
            ).chunk(2, dim=-1)
            states = states + linear(silu(gate).mul_(up), layer.down, layer.down_bias)
        logits: Tensor = self._head(rms_norm(states[wanted], width, self._norm, self._eps))
        return logits

    def _attention(
        self, pool: KeyValuePool, number: int, layer: _Layer, states: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        joined = linear(states, layer.qkv, layer.qkv_bias).view(states.shape[0], -1, self._head_size)
        turned = joined[:, : self._num_heads + pool.num_kv_heads]
        halves = turned.roll(self._head_size // 2, dims=-1).mul_(sin)
        turned.mul_(cos).add_(halves)
        queries, new = joined[:, : self._num_heads], joined[:, self._num_heads :]
        return linear(attend(pool, number, queries, new).flatten(1), layer.output, layer.output_bias)


def _join(layer: LlamaDecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _stack(mlp.gate_proj, mlp.up_proj)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _stack(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([layer.weight for layer in layers])
    return weight, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
