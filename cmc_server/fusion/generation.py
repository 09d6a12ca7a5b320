"""Batched greedy decoding of a user LLM with deltas, on transformers, through the controller that serving uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmc_server.config import Unmapped
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.states import SplitModel
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
    model: SplitModel,
    controller: DeltaController,
    requests: Sequence[GreedyRequest],
    *,
    unmapped: Unmapped | None,
    max_tokens: int,
    has_ended: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """Answer all prompts in one batch.

    Args:
        model: the user LLM.
        controller: with every delta that is named loaded, for at least as many rows.
        requests: the prompts; padded on the left to one length.
        unmapped: policy for tokens outside the maps; None lets the manifests decide.
        max_tokens: longest answer.
        has_ended: asked after each token of an answer, with the answer so far.

    Returns:
        One response per request, with the token that ended it.

    Raises:
        ConfigError: a prompt is longer than the user LLM reads.
        DeltaRuntimeError: a delta failed.
    """
    model.check_length(max((len(request.ids) for request in requests), default=0))
    room = [
        max_tokens if model.max_positions is None else min(max_tokens, model.max_positions + 1 - len(request.ids))
        for request in requests
    ]
    answers: list[list[int]] = [[] for _ in requests]
    rows = list(range(len(requests)))  # the request in each row of the batch
    running = rows if max_tokens > 0 else []
    for slot, request in enumerate(requests):
        if request.steering:
            controller.admit(slot, request.ids, request.steering, unmapped)
    feeder = _Feeder(model, [request.ids for request in requests])
    try:
        while running:
            logits = feeder.logits()
            active = set(running)
            places = [(row, one) for row, one in enumerate(rows) if one in active]
            controller.shift([(row, one) for row, one in places if requests[one].steering], logits)
            tokens: list[int] = logits.argmax(dim=-1).tolist()
            feeder.append(tokens)
            for row, one in places:
                answers[one].append(tokens[row])
            running = [one for one in running if len(answers[one]) < room[one] and not has_ended(answers[one])]
            for one in running:
                if requests[one].steering:
                    controller.advance(one, answers[one][-1:])
            # Picking rows out of the cache costs about a step; it pays where half of them or more have ended.
            if 0 < len(running) <= len(rows) // 2:
                feeder.select([rows.index(one) for one in running])
                rows = running
    finally:
        for slot in range(len(requests)):
            controller.release(slot)
    return answers


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


class _Feeder:
    """The user LLM with its key-value cache, over rows that grow together."""

    def __init__(self, model: SplitModel, prompts: Sequence[Sequence[int]]) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        padded = [[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts]
        real = [[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
        self._model = model
        self._ids = torch.tensor(padded, device=model.model.device)
        self._mask = torch.tensor(real, device=model.model.device)
        self._cache: Any = None

    def logits(self) -> Tensor:
        """[B, U] float32 after the last token of every row."""
        last = None if self._model.max_positions is None else self._model.max_positions - 1  # for rows that have ended
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0, max=last)[:, -self._ids.shape[1] :]
        output = self._model.model.base_model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        # The last states as a matrix of their own: of a slice in three dimensions torch's linear would make a product
        # for each row, and for that a copy of the output head for each row.
        return self._model.logits(output[0][:, -1].contiguous())

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        index = torch.tensor(rows, device=self._ids.device)
        self._ids, self._mask = self._ids[index], self._mask[index]
        self._cache.batch_select_indices(index)

    def append(self, tokens: Sequence[int]) -> None:
        """Give every row its next token; rows that have ended go on unread until they are left out."""
        self._ids = torch.tensor(tokens, device=self._mask.device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
