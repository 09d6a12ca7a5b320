"""Batched greedy decoding of a user LLM with deltas, on transformers, through the controller that serving uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cmc_server.config import Unmapped
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.streams import Steering


@dataclass(frozen=True)
class ChosenDelta:
    """A delta of one request, see :class:`cmc_server.fusion.controller.Steering`."""

    name: str
    strength: float
    prompt_ids: Sequence[int]
    version: str | None = None


@dataclass(frozen=True)
class GreedyRequest:
    """One prompt to answer.

    Args:
        ids: user token ids, at least one.
        steering: its deltas; none decodes with the user LLM alone.
    """

    ids: Sequence[int]
    steering: Sequence[Steering] = ()


@torch.inference_mode()
def decode_greedily(
    model: PreTrainedModel,
    controller: DeltaController,
    requests: Sequence[GreedyRequest],
    *,
    unmapped: Unmapped,
    max_tokens: int,
    has_ended: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """Answer all prompts in one batch.

    Args:
        model: the user LLM, in eval mode.
        controller: with every delta that is named loaded, for at least as many rows.
        requests: the prompts; padded on the left to one length.
        unmapped: policy for tokens outside the maps.
        max_tokens: longest answer.
        has_ended: asked after each token of an answer, with the answer so far.

    Returns:
        One response per request, with the token that ended it.

    Raises:
        DeltaRuntimeError: a delta failed.
    """
    answers: list[list[int]] = [[] for _ in requests]
    running = list(range(len(requests))) if max_tokens > 0 else []
    for slot, request in enumerate(requests):
        if request.steering:
            controller.admit(slot, request.ids, request.steering, unmapped)
    feeder = _Feeder(model, [request.ids for request in requests])
    try:
        while running:
            logits = feeder.logits()
            controller.shift([(row, row) for row in running if requests[row].steering], logits)
            tokens: list[int] = logits.argmax(dim=-1).tolist()
            feeder.append(tokens)
            for row in running:
                answers[row].append(tokens[row])
            running = [row for row in running if len(answers[row]) < max_tokens and not has_ended(answers[row])]
            for row in running:
                if requests[row].steering:
                    controller.advance(row, answers[row][-1:])
    finally:
        for slot in range(len(requests)):
            controller.release(slot)
    return answers


class _Feeder:
    """The user LLM with its key-value cache, over rows that grow together."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        padded = [[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts]
        real = [[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
        self._model = model
        self._ids = torch.tensor(padded, device=model.device)
        self._mask = torch.tensor(real, device=model.device)
        self._cache: Any = None
        can_select = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if can_select else {}

    def logits(self) -> Tensor:
        """[B, U] float32 after the last token of every row."""
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._extra,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits.clone()

    def append(self, tokens: Sequence[int]) -> None:
        """Give every row its next token; rows that have ended go on unread."""
        self._ids = torch.tensor(tokens, device=self._mask.device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
