"""The slow oracle: the rule on plain transformers, every step from scratch, nothing cached, nothing batched.

Everything fast is judged against this file. It shares with the serving path the rule, the map and the definition of the
spelling, and nothing else: no paged attention, no incremental spelling, no controller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cmc_server.config import DeltaSource, Unmapped
from cmc_server.delta.capacity import DEFAULT_CONTEXT
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.runner import load_model
from cmc_server.delta.spelling import Speller
from cmc_server.delta.store import open_delta
from cmc_server.fusion.rule import Shift, fuse
from cmc_server.vocab.surface import load_vocabulary
from cmc_server.vocab.vocab_map import build_map


@dataclass(frozen=True)
class ReferenceDelta:
    """One delta, loaded as plainly as possible."""

    model: PreTrainedModel
    speller: Speller
    encoder: PromptEncoder
    delta_ids: Tensor
    context_length: int
    unmapped: Unmapped

    def read(self, prompt_ids: Sequence[int], response: Sequence[int]) -> list[int]:
        """The delta input of the design, cut to the window."""
        ids = self.speller.delta_input(prompt_ids, response)
        context = self.context_length
        if len(ids) <= context:
            return ids
        bos = ids[: len(self.encoder.bos_ids)] if ids[: len(self.encoder.bos_ids)] == self.encoder.bos_ids else []
        half = context // 2
        return bos + ids[len(bos) + math.ceil((len(ids) - context) / half) * half :]

    def logits(self, prompt_ids: Sequence[int], response: Sequence[int]) -> Tensor:
        """[D] float32 after the whole input; zeros if there is nothing to read."""
        ids = self.read(prompt_ids, response)
        if not ids:
            return torch.zeros(self.model.get_output_embeddings().weight.shape[0])
        logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits.float()


class ReferenceFusedLM:
    """A user LLM with deltas, in float32 on the CPU, for checking.

    Args:
        user_path: folder or hub id of the user LLM.
        deltas: name to folder of each delta.
    """

    def __init__(self, user_path: str | Path, deltas: Mapping[str, str | Path]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(user_path, dtype=torch.float32).eval()
        self.vocabulary = load_vocabulary(str(user_path))
        self.deltas = {name: self._load(name, str(path)) for name, path in deltas.items()}

    def _load(self, name: str, path: str) -> ReferenceDelta:
        artifact = open_delta(DeltaSource(name=name, path=path))
        tokenizer = artifact.tokenizer()
        delta = load_vocabulary(str(artifact.path))
        vocab_map = build_map(self.vocabulary, delta)
        return ReferenceDelta(
            model=load_model(artifact, torch.float32, "eager"),
            speller=Speller(self.vocabulary, delta, vocab_map, tokenizer),
            encoder=PromptEncoder(tokenizer, artifact.manifest),
            delta_ids=torch.tensor(vocab_map.delta_ids, dtype=torch.int64),
            context_length=artifact.context_length or DEFAULT_CONTEXT,
            unmapped=artifact.manifest.unmapped or "zero",
        )

    @torch.no_grad()
    def steps(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        strengths: Mapping[str, float],
        *,
        delta_prompts: Mapping[str, Sequence[int]] | None = None,
        unmapped: Unmapped = "zero",
        start: int = 0,
    ) -> Iterator[Tensor]:
        """Fused logits for every token of a response, and for the one after it (teacher forcing).

        Args:
            prompt: user token ids, at least one.
            response: user token ids.
            strengths: delta name to strength; those at 0 are left out.
            delta_prompts: prompt in each delta's tokens, as the front door sends it; None spells the user prompt.
            unmapped: policy for tokens outside the maps.
            start: leave out the steps before this one.

        Yields:
            [U] float32, len(response) + 1 - start times.
        """
        ids = torch.tensor([[*prompt, *response]])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        active = {name: strength for name, strength in strengths.items() if strength}
        spelled = {name: self._delta_prompt(name, prompt, delta_prompts) for name in active}
        for position in range(start, len(response) + 1):
            shifts = []
            for name, strength in active.items():
                delta = self.deltas[name]
                shift = delta.logits(spelled[name], response[:position]).unsqueeze(0)
                shifts.append(Shift(shift, delta.delta_ids, float(strength)))
            yield fuse(logits[position : position + 1], shifts, unmapped)[0]

    def _delta_prompt(
        self, name: str, prompt: Sequence[int], delta_prompts: Mapping[str, Sequence[int]] | None
    ) -> Sequence[int]:
        delta = self.deltas[name]
        given = (delta_prompts or {}).get(name)
        return [*delta.encoder.bos_ids, *delta.speller.spell_prompt(prompt)] if given is None else given

    def generate(
        self,
        prompt: Sequence[int],
        strengths: Mapping[str, float],
        *,
        max_tokens: int,
        delta_prompts: Mapping[str, Sequence[int]] | None = None,
        unmapped: Unmapped = "zero",
        end_ids: Sequence[int] = (),
    ) -> list[int]:
        """Greedy decoding; the response includes the end token if one was reached."""
        response: list[int] = []
        while len(response) < max_tokens and not (response and response[-1] in end_ids):
            (last,) = self.steps(
                prompt, response, strengths, delta_prompts=delta_prompts, unmapped=unmapped, start=len(response)
            )
            response.append(int(last.argmax()))
        return response

    def worst_gap(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        strengths: Mapping[str, float],
        *,
        delta_prompts: Mapping[str, Sequence[int]] | None = None,
        unmapped: Unmapped = "zero",
    ) -> float:
        """How far, at worst, an emitted token lies below the oracle's best one, in logits."""
        steps = self.steps(prompt, response, strengths, delta_prompts=delta_prompts, unmapped=unmapped)
        return max(float(logits.max() - logits[token]) for logits, token in zip(steps, response, strict=False))
