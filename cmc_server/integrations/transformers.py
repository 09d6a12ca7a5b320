"""Deltas in transformers' ``generate``: ``model.generate(..., logits_processor=[DeltaLogitsProcessor(...)])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from cmc_server.config import DeltaSource, EngineSettings, Unmapped, build, check_strength, check_unmapped
from cmc_server.errors import ConfigError
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.loaded import load_delta
from cmc_server.integrations.request_args import ActiveDelta
from cmc_server.vocab.surface import load_vocabulary


class DeltaLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Adds deltas to a user LLM's logits inside ``generate``: greedy, sampling and beams, batched.

    One object serves one ``generate`` call at a time; call :meth:`reset` before the next one.

    Args:
        user: folder or hub id of the user LLM, for its tokenizer.
        deltas: name to folder or hub id of each delta.
        strengths: name to strength; a delta without an entry has its manifest's. 0 switches a delta off.
        unmapped: policy for tokens outside the maps; None lets the manifests decide.
        messages: one chat per prompt, where the prompts are chats; None spells the prompts.
        pad_token_id: padding on the left of the prompts in a batch.
        settings: limits and types, see :class:`EngineSettings`.
        device: where the deltas run.

    Raises:
        ConfigError: a strength names no delta or is none or far too large, or a name is not allowed.
        DeltaError: a delta cannot be used.
    """

    def __init__(
        self,
        user: str,
        deltas: Mapping[str, str],
        strengths: Mapping[str, float] | None = None,
        *,
        unmapped: Unmapped | None = None,
        messages: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        pad_token_id: int | None = None,
        settings: EngineSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        unknown = sorted(set(strengths or {}) - set(deltas))
        if unknown:
            raise ConfigError(f"strengths names {unknown[0]!r}, which is not among the deltas {sorted(deltas)}.")
        check_unmapped(unmapped)
        settings = settings or EngineSettings()
        vocabulary = load_vocabulary(user)
        self._controller = DeltaController()
        for name, path in deltas.items():
            source = build(DeltaSource, {"name": name, "path": path, "strength": (strengths or {}).get(name)})
            check_strength(name, source.strength or 0.0)
            max_seqs = settings.max_delta_seqs or 64
            loaded = load_delta(source, vocabulary, settings, max_seqs=max_seqs, device=torch.device(device))
            self._controller.load(loaded)
        self._active = {name: one for name, one in self._controller.deltas.items() if one.artifact.strength != 0}
        self._unmapped = unmapped
        self._messages = messages
        self._pad_token_id = pad_token_id
        self._rows: list[list[int]] = []
        self._prompt_length = 0

    def reset(self, messages: Sequence[Sequence[Mapping[str, Any]]] | None = None) -> None:
        """Forget the last ``generate`` call; ``messages`` are the chats of the next one."""
        for slot in range(len(self._rows)):
            self._controller.release(slot)
        self._rows = []
        self._messages = messages

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by ``generate`` at every step.

        Args:
            input_ids: [B, L] prompts and responses so far.
            scores: [B, U] logits.

        Returns:
            [B, U] float32.

        Raises:
            ConfigError: this is another ``generate`` call than the last one and :meth:`reset` was not called between
                the two, or the chats do not fit the rows.
        """
        if not self._active:
            return scores.float()
        rows: list[list[int]] = input_ids.tolist()
        if not self._rows:
            self._begin(rows)
        elif len(rows) != len(self._rows) or len(rows[0]) <= len(self._rows[0]):
            raise ConfigError("Another generate call has begun; call reset() of the DeltaLogitsProcessor before it.")
        for slot, row in enumerate(rows):
            self._follow(slot, row, len(rows))
        return self._controller.shift([(slot, slot) for slot in range(len(rows))], scores.float().clone())

    def _begin(self, rows: list[list[int]]) -> None:
        chats = self._messages
        if chats is not None and (not chats or len(rows) % len(chats)):
            raise ConfigError(f"messages holds {len(chats)} chats for {len(rows)} rows; give one for each prompt.")
        self._prompt_length = len(rows[0])
        self._rows = [[] for _ in rows]

    def _follow(self, slot: int, row: list[int], num_rows: int) -> None:
        known = self._rows[slot]
        if not known or row[: len(known)] != known:  # a beam took over another one's tokens
            self._controller.admit(slot, self._prompt(row), self._steering(slot, num_rows), self._unmapped)
            known = row[: self._prompt_length]
        self._controller.advance(slot, row[len(known) :])
        self._rows[slot] = row

    def _prompt(self, row: list[int]) -> list[int]:
        prompt = row[: self._prompt_length]
        padding = 0
        while padding < len(prompt) and prompt[padding] == self._pad_token_id:
            padding += 1
        return prompt[padding:]

    def _steering(self, slot: int, num_rows: int) -> list[ActiveDelta]:
        chats = self._messages
        chat = chats[slot * len(chats) // num_rows] if chats else None
        return [
            ActiveDelta(
                name=name,
                strength=delta.artifact.strength,
                prompt_ids=tuple(delta.encoder.encode_messages(chat)) if chat is not None else None,
            )
            for name, delta in self._active.items()
        ]
