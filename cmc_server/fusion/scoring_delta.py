"""One delta as scoring runs it: plain forward passes over whole stretches, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmc_server.config import DeltaSource
from cmc_server.delta.capacity import DEFAULT_CONTEXT
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.runner import load_model
from cmc_server.delta.spelling import Speller
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.fusion.encoding import Prompt, as_chat
from cmc_server.fusion.states import Row, SplitModel
from cmc_server.fusion.stretches import Stretch, plan_stretches, windowed_inputs
from cmc_server.vocab.surface import Vocabulary, read_generation_config, read_vocabulary
from cmc_server.vocab.vocab_map import cached_map


@dataclass(frozen=True)
class ScoringDelta:
    """One delta made ready for scoring beside one user LLM.

    Args:
        artifact: the checked folder.
        model: its weights.
        speller: user tokens in its own tokens.
        encoder: its prompt rendering.
        delta_ids: [U'] int64, the map on the model's device.
        coverage: mapped share of the user LLM's ordinary tokens.
    """

    artifact: DeltaArtifact
    model: SplitModel
    speller: Speller
    encoder: PromptEncoder
    delta_ids: Tensor
    coverage: float

    def prompt_ids(self, prompt: Prompt, user_ids: Sequence[int]) -> list[int]:
        """The prompt as the delta reads it: a chat in its own template, anything else spelled behind its bos."""
        chat = as_chat(prompt)
        if chat is not None:
            return self.encoder.encode_messages(chat.messages, continue_final_message=chat.continue_final_message)
        return [*self.encoder.bos_ids, *self.speller.spell_prompt(user_ids)]

    def states(self, jobs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """Last hidden states before every token of every continuation, one pass per stretch.

        Args:
            jobs: (prompt in delta tokens, continuation in user tokens).

        Returns:
            [N, H] in the model's type, N the tokens of all continuations, and [N, 1] bool: whether the delta read
            anything there. Both on the model's device.
        """
        rows: list[Row] = []
        steps: list[int] = []
        first = 0
        for prompt_ids, continuation in jobs:
            for stretch in self.stretches(prompt_ids, continuation):
                rows.append(Row(stretch.ids, [position for position, _ in stretch.served]))
                steps += [first + step for _, step in stretch.served]
            first += len(continuation)
        head = self.model.model.get_output_embeddings().weight
        found = head.new_zeros(first, head.shape[1])
        reads = torch.zeros(first, 1, dtype=torch.bool, device=head.device)
        if rows:
            index = torch.tensor(steps, device=head.device)
            found.index_copy_(0, index, torch.cat(self.model.states(rows)))
            reads[index] = True
        return found, reads

    def stretches(self, prompt_ids: Sequence[int], continuation: Sequence[int]) -> list[Stretch]:
        """What the delta reads to score a continuation, see :func:`plan_stretches`."""
        inputs = windowed_inputs(
            self.speller,
            prompt_ids,
            continuation,
            bos_ids=self.encoder.bos_ids,
            context_length=self.artifact.context_length or DEFAULT_CONTEXT,
        )
        return plan_stretches(inputs)


def load_scoring_delta(source: DeltaSource, user: Vocabulary, dtype: torch.dtype, device: torch.device) -> ScoringDelta:
    """Check, map and load a delta for a user LLM, whatever the map covers.

    Raises:
        ConfigError: its logits are made in a way that scoring does not know.
        DeltaError: the artifact cannot be used.
        MapError: the map cannot be built.
    """
    artifact = open_delta(source)
    tokenizer = artifact.tokenizer()
    vocabulary = read_vocabulary(tokenizer, read_generation_config(str(artifact.path)))
    vocab_map = cached_map(user, vocabulary, None, None)
    model = load_model(artifact, dtype, "sdpa").to(device)
    return ScoringDelta(
        artifact=artifact,
        model=SplitModel(model, f"The delta {artifact.name!r}"),
        speller=Speller(user, vocabulary, vocab_map, tokenizer),
        encoder=PromptEncoder(tokenizer, artifact.manifest),
        delta_ids=torch.tensor(vocab_map.delta_ids, dtype=torch.int64, device=device),
        coverage=vocab_map.coverage,
    )
