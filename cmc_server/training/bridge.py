"""A template LLM with another vocabulary than the delta's: the map between them, and what one delta pass can serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmc_server.delta.spelling import DeltaInput, Speller
from cmc_server.training.template import FrozenTemplate
from cmc_server.vocab.surface import load_vocabulary
from cmc_server.vocab.vocab_map import build_map


@dataclass(frozen=True)
class Bridge:
    """From a template's tokens to the delta's.

    Args:
        speller: spells the template's tokens in the delta's.
        delta_ids: [U'] int64, the vocabulary map; -1 is unmapped.
    """

    speller: Speller
    delta_ids: Tensor

    @classmethod
    def between(cls, template: FrozenTemplate, partner: FrozenTemplate) -> Bridge:
        """The bridge for a template.

        Args:
            template: the LLM with the other vocabulary.
            partner: a template with the delta's vocabulary.

        Raises:
            MapError: a tokenizer cannot be read.
        """
        user, delta = load_vocabulary(template.name), load_vocabulary(partner.name)
        vocab_map = build_map(user, delta)
        speller = Speller(user, delta, vocab_map, partner.tokenizer)
        return cls(speller, torch.tensor(vocab_map.delta_ids, dtype=torch.int64))

    def served(
        self, prompt_ids: Sequence[int], response: Sequence[int], delta_ids: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The template's steps at which the delta, when it is served, reads a beginning of one given input.

        At the others it reads a spelling of its own, because a word is cut where its own tokenizer would not cut it.
        They would each need a pass, and are left out.

        Args:
            prompt_ids: the prompt in delta tokens.
            response: the template's tokens, its eos at the end.
            delta_ids: what the delta reads in training: prompt and answer.

        Returns:
            (step, position in ``delta_ids``) by rising step; the logits at the position predict ``response[step]``.
        """
        steps = []
        text = DeltaInput(self.speller, prompt_ids)
        for step, token in enumerate(response):
            if text.ids and list(text.ids) == list(delta_ids[: len(text.ids)]):
                steps.append((step, len(text.ids) - 1))
            text.extend([token])
        return steps
