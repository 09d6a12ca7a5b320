"""Scoring across vocabularies: the fused log-probability of each user token of a continuation.

With z the fused logits of :mod:`cmc_server.fusion.rule` after the prompt x and the tokens y_1..y_{t-1}::

    score_t = log softmax(z(x, y_1..y_{t-1}))[y_t]

Every delta reads before y_t exactly what it would read in decoding, in one pass per stretch
(:mod:`cmc_server.fusion.stretches`). The slow reference is ``fusion/reference.py``, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from cmc_server.config import DeltaSource, EngineSettings, Unmapped, build, check_strength, check_unmapped
from cmc_server.delta.capacity import VALUE_BYTES, memory_needed
from cmc_server.errors import ConfigError, one_line
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.encoding import Chat, Prompt, UserEncoder
from cmc_server.fusion.generation import ChosenDelta, GreedyRequest, decode_greedily, until
from cmc_server.fusion.loaded import load_delta
from cmc_server.fusion.rule import Shift, common_policy, fuse_
from cmc_server.fusion.scoring_delta import ScoringDelta, load_scoring_delta
from cmc_server.fusion.states import Row, SplitModel
from cmc_server.vocab.surface import Vocabulary, load_tokenizer, read_generation_config, read_vocabulary

DType = Literal["float32", "bfloat16"]
Pair = tuple[Prompt, str | Sequence[int]]

#: Bytes that logits over a vocabulary, with all that the rule makes of them on the way, may take at a time.
LOGIT_BYTES = 2**30
#: User tokens whose hidden states are kept at a time.
GROUP_TOKENS = 16384
#: Answers that are generated together, if the deltas' caches then take no more than ``CACHE_BYTES``.
GENERATED_ROWS = 64
CACHE_BYTES = 2 * 2**30
_ROW_COPIES = 8  # float32 copies of a row that fuse and log_softmax hold at once, rounded up


@dataclass(frozen=True)
class TokenScores:
    """One continuation scored.

    Args:
        log_probs: [n] float32, on the CPU.
        greedy: [n] bool: whether the token is the one with the highest fused logit.
    """

    log_probs: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    user_ids: list[int]
    continuation: list[int]

    @property
    def length(self) -> int:
        return len(self.user_ids) + len(self.continuation)


class FusedLM:
    """A user LLM with deltas, for scoring and batched greedy decoding on transformers. See :meth:`load`.

    Unlike the server it takes deltas of any map coverage, which is then a result and not a mistake.
    """

    def __init__(
        self,
        model: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        loaded: Mapping[str, ScoringDelta],
        dtype: DType = "float32",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.loaded = dict(loaded)
        self._dtype = dtype
        self._encoder = UserEncoder(tokenizer, vocabulary, model.num_inputs)

    @classmethod
    def load(
        cls,
        user_path: str | Path,
        deltas: Mapping[str, str | Path],
        *,
        dtype: DType = "float32",
        device: str | torch.device = "cpu",
    ) -> FusedLM:
        """Load a user LLM and deltas of any vocabulary.

        Args:
            user_path: folder or hub id of the user LLM.
            deltas: name to folder or hub id of each delta; may be empty.
            dtype: computing type of all models.
            device: where all models run.

        Raises:
            ConfigError: the user LLM cannot be loaded, or its logits are made in a way that scoring does not know.
            DeltaError: a delta cannot be used.
            MapError: a tokenizer cannot be read, or a map cannot be built.
        """
        path = str(user_path)
        tokenizer = load_tokenizer(path)
        vocabulary = read_vocabulary(tokenizer, read_generation_config(path))
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        except (OSError, ValueError, SafetensorError) as error:
            reason = one_line(error)[:300]
            raise ConfigError(f"The user LLM {path} cannot be loaded: {reason}.") from error
        bare = cls(SplitModel(model.to(device), f"The user LLM {path}"), tokenizer, vocabulary, {}, dtype)
        return bare.with_deltas(deltas)

    def with_deltas(self, deltas: Mapping[str, str | Path]) -> FusedLM:
        """The same user LLM, with what it has kept of texts that it read, beside other deltas.

        Args:
            deltas: name to folder or hub id of each delta; may be empty.

        Raises:
            ConfigError: a name is not allowed.
            DeltaError: a delta cannot be used.
            MapError: a map cannot be built.
        """
        dtype, device = getattr(torch, self._dtype), self.model.model.device
        loaded = {
            name: load_scoring_delta(source, self.vocabulary, dtype, device)
            for name, source in _sources(deltas).items()
        }
        return FusedLM(self.model, self.tokenizer, self.vocabulary, loaded, self._dtype)

    @property
    def deltas(self) -> tuple[str, ...]:
        """Names of the deltas."""
        return tuple(self.loaded)

    @property
    def default_strengths(self) -> dict[str, float]:
        """Name to the strength that the delta's manifest advises, else 1."""
        return {name: delta.artifact.strength for name, delta in self.loaded.items()}

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """User token ids of a prompt, at least one; see :meth:`UserEncoder.prompt`."""
        return self._encoder.prompt(prompt)

    def render(self, chat: Chat) -> str:
        """A chat in the user LLM's template; see :meth:`UserEncoder.render`."""
        return self._encoder.render(chat)

    def encode_continuation(self, continuation: str | Sequence[int]) -> list[int]:
        """User token ids of a continuation; see :meth:`UserEncoder.continuation`."""
        return self._encoder.continuation(continuation)

    def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int],
        deltas: Mapping[str, float],
        *,
        unmapped: Unmapped | None = None,
    ) -> Tensor:
        """Fused log-probability of each user token of one continuation; see :meth:`score_batch`.

        Returns:
            [n] float32, on the CPU, in nats.
        """
        return self.score_batch([(prompt, continuation)], deltas, unmapped=unmapped)[0]

    def score_batch(
        self, pairs: Sequence[Pair], deltas: Mapping[str, float], *, unmapped: Unmapped | None = None
    ) -> list[Tensor]:
        """Fused log-probabilities of many continuations.

        Args:
            pairs: (prompt, continuation). A prompt is a text, user token ids, or a chat, which the user LLM reads in
                its own chat template and each delta in its own. A text continuation is encoded as the tokens that
                follow the prompt, with nothing added.
            deltas: name to strength; those at 0 are left out, and without any the user LLM is scored alone.
            unmapped: policy for tokens outside the maps; None lets the manifests decide.

        Returns:
            For each pair [n] float32, on the CPU, in nats: one figure per user token of the continuation.

        Raises:
            ConfigError: a name is no delta here, a strength is none or far too large, or a pair cannot be encoded.
            DeltaError: a delta's prompt template cannot render a chat.
        """
        return [scores.log_probs for scores in self.token_scores(pairs, deltas, unmapped=unmapped)]

    def token_scores(
        self, pairs: Sequence[Pair], deltas: Mapping[str, float], *, unmapped: Unmapped | None = None
    ) -> list[TokenScores]:
        """As :meth:`score_batch`, and whether each token is what greedy decoding would have chosen there."""
        strengths = self._active(deltas, unmapped)
        jobs = [self._job(pair) for pair in pairs]
        found: dict[int, TokenScores] = {}
        for group in _groups([job.length for job in jobs]):
            members = [jobs[index] for index in group]
            found.update(zip(group, self._score(members, strengths, unmapped), strict=True))
        return [found[index] for index in range(len(jobs))]

    def generate(
        self,
        prompts: Sequence[Prompt],
        deltas: Mapping[str, float],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        unmapped: Unmapped | None = None,
    ) -> list[str]:
        """Greedy answers, batched.

        Args:
            prompts: as in :meth:`score_batch`.
            deltas: as in :meth:`score_batch`.
            max_tokens: longest answer in user tokens.
            stop_ids: user tokens that end an answer; None means every end that the user LLM has.
            stop: texts that end an answer.
            unmapped: policy for tokens outside the maps; None lets the manifests decide.

        Returns:
            The answers without special tokens, up to the first of the ``stop`` texts.

        Raises:
            ConfigError: as in :meth:`score_batch`.
            DeltaRuntimeError: a delta failed on the way.
        """
        strengths = self._active(deltas, unmapped)
        ends = frozenset(self.vocabulary.eos_ids if stop_ids is None else stop_ids)
        requests = [self._greedy_request(prompt, strengths) for prompt in prompts]
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
        texts: dict[int, str] = {}
        for start in range(0, len(order), self._generated_rows):
            batch = order[start : start + self._generated_rows]
            answers = decode_greedily(
                self.model,
                self._controller,
                [requests[index] for index in batch],
                unmapped=unmapped,
                max_tokens=max_tokens,
                has_ended=lambda answer: answer[-1] in ends or (bool(stop) and self._is_stopped(answer, stop)),
            )
            for index, answer in zip(batch, answers, strict=True):
                ended = bool(answer) and answer[-1] in ends
                texts[index] = until(self._decode(answer[:-1] if ended else answer), stop)
        return [texts[index] for index in range(len(prompts))]

    def _active(self, deltas: Mapping[str, float], unmapped: Unmapped | None) -> dict[str, float]:
        """The deltas that do something, with their strengths."""
        check_unmapped(unmapped)
        for name, strength in deltas.items():
            if name not in self.loaded:
                raise ConfigError(f"There is no delta {name!r}; choose from {sorted(self.loaded)}.")
            check_strength(name, strength)
        return {name: float(strength) for name, strength in deltas.items() if strength}

    @torch.inference_mode()
    def step_logits(self, pair: Pair, deltas: Mapping[str, float], *, unmapped: Unmapped | None = None) -> Tensor:
        """Fused logits before each user token of one continuation.

        Args:
            pair: as in :meth:`score_batch`.
            deltas: as in :meth:`score_batch`.
            unmapped: policy for tokens outside the maps; None lets the manifests decide.

        Returns:
            [n, U] float32, on the models' device.

        Raises:
            ConfigError: as in :meth:`score_batch`.
        """
        job = self._job(pair)
        none = torch.zeros(0, self.model.num_logits, device=self.model.model.device)
        return torch.cat([none, *self._fused_logits([job], self._active(deltas, unmapped), unmapped)])

    @torch.inference_mode()
    def _score(
        self, jobs: Sequence[_Job], strengths: Mapping[str, float], unmapped: Unmapped | None
    ) -> list[TokenScores]:
        counts = [len(job.continuation) for job in jobs]
        targets = torch.tensor([token for job in jobs for token in job.continuation], device=self.model.model.device)
        log_probs, greedy = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
        start = 0
        for fused in self._fused_logits(jobs, strengths, unmapped):
            wanted = targets[start : start + len(fused)].unsqueeze(1)
            log_probs.append(fused.log_softmax(dim=-1).gather(1, wanted)[:, 0].cpu())
            greedy.append((fused.argmax(dim=-1) == wanted[:, 0]).cpu())
            start += len(fused)
        scores, choices = torch.split(torch.cat(log_probs), counts), torch.split(torch.cat(greedy), counts)
        return [TokenScores(*parts) for parts in zip(scores, choices, strict=True)]

    def _fused_logits(
        self, jobs: Sequence[_Job], strengths: Mapping[str, float], unmapped: Unmapped | None
    ) -> Iterator[Tensor]:
        """[rows, U] float32 before all tokens of all continuations, in turn; as many rows as the budget allows.

        The hidden states of all jobs come first, the logits from them chunk by chunk.
        """
        user_states = self._user_states(jobs)
        shifting = []
        for name, strength in strengths.items():
            delta = self.loaded[name]
            read = [(delta.prompt_ids(job.prompt, job.user_ids), job.continuation) for job in jobs]
            shifting.append((delta, strength, *delta.states(read)))
        policy = unmapped or common_policy(delta.artifact.manifest.unmapped for delta, *_ in shifting)
        columns = _ROW_COPIES * self.model.num_logits + sum(3 * delta.model.num_logits for delta, *_ in shifting)
        size = max(1, LOGIT_BYTES // (4 * columns))
        for start in range(0, len(user_states), size):
            rows = slice(start, start + size)
            logits = self.model.logits(user_states[rows])
            shifts = [
                Shift(torch.where(reads[rows], delta.model.logits(states[rows]), 0.0), delta.delta_ids, strength)
                for delta, strength, states, reads in shifting
            ]
            yield fuse_(logits, torch.arange(len(logits), device=logits.device), shifts, policy)

    def _job(self, pair: Pair) -> _Job:
        prompt, continuation = pair
        return _Job(prompt, self.encode_prompt(prompt), self.encode_continuation(continuation))

    def _user_states(self, jobs: Sequence[_Job]) -> Tensor:
        """[N, H]: the user LLM's last hidden state before each token of each continuation."""
        rows = []
        for job in jobs:
            before_first = len(job.user_ids) - 1
            ids = [*job.user_ids, *job.continuation[:-1]]
            rows.append(Row(ids, range(before_first, before_first + len(job.continuation))))
        return torch.cat(self.model.states(rows))

    def _greedy_request(self, prompt: Prompt, strengths: Mapping[str, float]) -> GreedyRequest:
        ids = self.encode_prompt(prompt)
        steering = [
            ChosenDelta(name, strength, self.loaded[name].prompt_ids(prompt, ids))
            for name, strength in strengths.items()
        ]
        return GreedyRequest(ids, steering)

    @cached_property
    def _generated_rows(self) -> int:
        """As many rows as the deltas' caches may hold, at least one."""
        on_cpu, size = self.model.model.device.type == "cpu", VALUE_BYTES[self._dtype]
        weights, one_row = (
            sum(memory_needed(delta.artifact, rows, size, on_cpu) for delta in self.loaded.values()) for rows in (0, 1)
        )
        return min(GENERATED_ROWS, max(1, CACHE_BYTES // max(1, one_row - weights)))

    @cached_property
    def _controller(self) -> DeltaController:
        """The deltas once more, with caches, as serving has them; made when something is generated."""
        controller = DeltaController()
        settings = EngineSettings(force_coverage=True, delta_dtype=self._dtype)
        rows, device = self._generated_rows, self.model.model.device
        for name, delta in self.loaded.items():
            source = DeltaSource(name=name, path=str(delta.artifact.path))
            controller.load(load_delta(source, self.vocabulary, settings, max_seqs=rows, device=device))
        return controller

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _is_stopped(self, answer: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the end of an answer holds a stop text; a character takes four tokens at most."""
        tail = self._decode(answer[-4 * max(map(len, stop)) - 1 :])
        return any(text in tail for text in stop)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by falling length, at most ``GROUP_TOKENS`` tokens a group; one that is longer stands alone."""
    group: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if group and total + lengths[index] > GROUP_TOKENS:
            yield group
            group, total = [], 0
        group.append(index)
        total += lengths[index]
    if group:
        yield group


def _sources(deltas: Mapping[str, str | Path]) -> dict[str, DeltaSource]:
    return {name: build(DeltaSource, {"name": name, "path": str(folder)}) for name, folder in deltas.items()}
