"""What evaluation asks of a steered model: log-probabilities of given answers, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor
from tqdm import tqdm

from cmc_server.config import Unmapped
from cmc_server.delta.prompt import Message

#: What evaluation asks with: plain text, user token ids, or a chat.
Prompt = str | Sequence[int] | Sequence[Message]
Continuation = str | Sequence[int]
Pair = tuple[Prompt, Continuation]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class SteeredModel(Protocol):
    """A user LLM with deltas loaded beside it; ``fusion.scoring.FusedLM`` is one."""

    @property
    def tokenizer(self) -> Any:
        """The user LLM's fast tokenizer."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """User token ids of a prompt, as the user LLM reads it."""

    def encode_continuation(self, continuation: Continuation) -> list[int]:
        """User token ids of what follows a prompt, without eos."""

    def score_batch(
        self, pairs: Sequence[Pair], deltas: Mapping[str, float], *, unmapped: Unmapped | None = None
    ) -> list[Tensor]:
        """For each prompt with its continuation, [n] float32 log-probabilities of the continuation's n user tokens.

        Args:
            pairs: a prompt (plain text, user token ids or a chat) and what follows it (text or user token ids).
            deltas: name to strength.
            unmapped: policy for tokens outside the maps; None lets the manifests decide.
        """

    def generate(
        self,
        prompts: Sequence[Prompt],
        deltas: Mapping[str, float],
        *,
        max_tokens: int,
        unmapped: Unmapped | None = None,
    ) -> list[str]:
        """Greedy answers of at most ``max_tokens`` user tokens, without the end token."""


@dataclass(frozen=True)
class Measurement:
    """A steered model at a varying strength, asked in batches, with a progress bar on stderr.

    Args:
        model: the user LLM with its deltas.
        strengths: from the strength under study to a strength for each delta.
        unmapped: policy for tokens outside the maps; None lets the manifests decide.
        batch_size: sequences per call.
        quiet: no progress bars.
    """

    model: SteeredModel
    strengths: Callable[[float], Mapping[str, float]]
    unmapped: Unmapped | None = None
    batch_size: int = 32
    quiet: bool = False

    def log_probs(self, pairs: Sequence[Pair], strength: float, label: str) -> list[Tensor]:
        """[n] float32 each, in the order of the pairs; see :meth:`SteeredModel.score_batch`."""

        def score(some: Sequence[Pair]) -> list[Tensor]:
            return self.model.score_batch(some, self.strengths(strength), unmapped=self.unmapped)

        return self._batched(score, pairs, [_length(pair) for pair in pairs], f"{label} @ {strength:g}")

    def answers(self, prompts: Sequence[Prompt], strength: float, max_tokens: int, label: str) -> list[str]:
        """Greedy answers in the order of the prompts."""

        def generate(some: Sequence[Prompt]) -> list[str]:
            deltas = self.strengths(strength)
            return self.model.generate(some, deltas, max_tokens=max_tokens, unmapped=self.unmapped)

        lengths = [len(self.model.encode_prompt(prompt)) for prompt in prompts]
        return self._batched(generate, prompts, lengths, f"{label} @ {strength:g}")

    def answer_ids(self, answer: str) -> list[int]:
        """An answer in user tokens, with the tokenizer's eos."""
        return [*self.model.encode_continuation(answer), int(self.model.tokenizer.eos_token_id)]

    def count_tokens(self, answers: Sequence[str]) -> list[int]:
        """Length of each answer in user tokens, without eos."""
        return [len(self.model.encode_continuation(answer)) for answer in answers]

    def _batched(
        self,
        call: Callable[[Sequence[_Item]], list[_Result]],
        items: Sequence[_Item],
        lengths: Sequence[int],
        label: str,
    ) -> list[_Result]:
        """Items of similar length together, so that little is padded; the longest first, so that memory fails early."""
        order = sorted(range(len(items)), key=lambda index: -lengths[index])
        results: dict[int, _Result] = {}
        with tqdm(total=len(items), desc=label, unit="seq", leave=False, disable=self.quiet) as bar:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                results.update(zip(some, call([items[index] for index in some]), strict=True))
                bar.update(len(some))
        return [results[index] for index in range(len(items))]


def chat(question: str) -> list[Message]:
    """A chat of one question."""
    return [Message(role="user", content=question)]


def _length(pair: Pair) -> int:
    """A guess in characters or tokens, good enough for sorting."""
    prompt, continuation = pair
    parts = [prompt] if isinstance(prompt, str) else prompt
    size = sum(len(part["content"]) if isinstance(part, Mapping) else len(str(part)) for part in parts)
    return size + (len(continuation) if isinstance(continuation, str) else 4 * len(continuation))
