"""A user LLM with deltas as a model of the lm-evaluation-harness. Needs the harness; see ``evaluation/harness.py``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cmc_server.config import DeltaSource, Unmapped
from cmc_server.delta.prompt import plain_messages
from cmc_server.errors import ConfigError
from cmc_server.fusion.encoding import Chat, Prompt
from cmc_server.fusion.scoring import DType, FusedLM, Pair, TokenScores

logger = logging.getLogger(__name__)

#: Requests between two updates of the progress bar; scoring itself batches by tokens.
_CHUNK = 128
_DEFAULT_MAX_LENGTH = 2048
_DEFAULT_MAX_TOKENS = 256
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

#: (context, continuation) as texts where there are any, and both in user tokens: what the harness's base class makes.
_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("cmc")
class FusedHarnessModel(TemplateLM):  # type: ignore[misc]
    """``cmc``: log-likelihoods and greedy answers of a user LLM with deltas.

    With ``--apply_chat_template`` the user LLM reads each chat in its own template and each delta in its own, and the
    answer begins behind the whole prompt.

    Args:
        user: folder or hub id of the user LLM.
        delta: ``NAME=PATH`` or ``NAME=PATH@STRENGTH``, several with ``;`` between them or as a list; without a
            strength the manifest's is taken. None is the user LLM alone.
        unmapped: policy for tokens outside the maps; None lets the manifests decide.
        dtype: computing type of all models.
        device: where they run; the harness itself asks for the first GPU, which is the CPU where there is none.
        max_length: longest input of the user LLM; None is what its config says. Longer contexts lose their beginning.
        batch_size: not used, for scoring batches by tokens; the harness always gives it.
        max_batch_size: as ``batch_size``.

    Raises:
        ConfigError: an argument is invalid.
        DeltaError: a delta cannot be used.
        MapError: a tokenizer cannot be used.
    """

    def __init__(
        self,
        user: str,
        delta: str | Sequence[str] | None = None,
        unmapped: Unmapped | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (("unmapped", unmapped, get_args(Unmapped)), ("dtype", dtype, get_args(DType))):
            if value not in known and not (name == "unmapped" and value is None):
                raise ConfigError(f"{name} is {value!r} and must be one of {', '.join(known)}.")
        parts = delta.split(";") if isinstance(delta, str) else list(delta or ())
        sources = [DeltaSource.parse(part) for part in parts if part]
        self.fused = FusedLM.load(
            user,
            {source.name: source.path for source in sources},
            dtype=dtype,
            device=_device(device),
        )
        given = {source.name: source.strength for source in sources if source.strength is not None}
        self.strengths = {**self.fused.default_strengths, **given}
        self.unmapped: Unmapped | None = unmapped
        self.tokenizer = self.fused.tokenizer
        config = self.fused.model.model.config.get_text_config()
        self.max_length: int = max_length or getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
        self._chats: dict[str, Chat] = {}
        self._expects_chats = False

    @property
    def eot_token_id(self) -> int:
        """The user LLM's end of a text."""
        return self.fused.vocabulary.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: bos, or else the end of the text before."""
        bos = self.fused.vocabulary.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """User token ids of a text; None adds the special tokens that the tokenizer adds, but no second bos."""
        bos = self.tokenizer.bos_token
        add = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=add)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat for the user LLM, and remember it, so that the deltas can read it in their own template."""
        chat = Chat(plain_messages(chat_history), continue_final_message=not add_generation_prompt)
        text = self.fused.render(chat)
        self._chats[text] = chat
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The user LLM's chat template, for the harness's records; requests are chats from now on if it is asked."""
        self._expects_chats = bool(chat_template)
        template: str | None = super().chat_template(chat_template)
        return template

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the longest input, each token scored once."""
        windows: list[_Encoded] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to a stop text.

        Raises:
            ConfigError: a task asks for sampling.
        """
        answers: dict[int, str] = {}
        for settings, members in _by_settings(requests).items():
            max_tokens, stop = settings
            for start in tqdm(range(0, len(members), _CHUNK), desc="cmc: answers", disable=disable_tqdm):
                chunk = members[start : start + _CHUNK]
                texts = self.fused.generate(
                    [self._generation_prompt(requests[index].args[0], max_tokens) for index in chunk],
                    self.strengths,
                    max_tokens=max_tokens,
                    stop=stop,
                    unmapped=self.unmapped,
                )
                for index, text in zip(chunk, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [answers[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[_Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum over the tokens of each continuation, and whether greedy decoding would have given all of them."""
        # Requests of similar length side by side, so that the chunks have little padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), _CHUNK), desc="cmc: log-likelihoods", disable=disable_tqdm):
            chunk = order[start : start + _CHUNK]
            pairs = [self._pair(*requests[index]) for index in chunk]
            for index, scores in zip(
                chunk, self.fused.token_scores(pairs, self.strengths, unmapped=self.unmapped), strict=True
            ):
                found[index] = _total(scores)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return [found[index] for index in range(len(requests))]

    def _pair(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Pair:
        chat = self._chat(texts[0]) if texts is not None else None
        if texts is not None and chat is not None:
            # The harness moves white space from the end of a context to the continuation; here it ends the prompt.
            return chat, texts[1]
        room = self.max_length + 1 - len(continuation)  # the last token is scored, but not read
        if room < 1:
            raise ConfigError(
                f"A continuation of {len(continuation)} tokens is longer than the user LLM's {self.max_length}; "
                "give a larger max_length or leave this task out."
            )
        if len(context) > room:
            logger.warning("A context of %d tokens is cut to its last %d.", len(context), room)
        return context[-room:], continuation

    def _generation_prompt(self, context: str, max_tokens: int) -> Prompt:
        chat = self._chat(context)
        if chat is not None:
            return chat
        ids = self.tok_encode(context) if context else [self.prefix_token_id]
        return ids[-max(1, self.max_length - max_tokens) :]

    def _chat(self, context: str) -> Chat | None:
        chat = self._chats.get(context)
        if chat is None and context and self._expects_chats:
            raise ConfigError(
                "A chat of this task was not rendered in this run, so that the deltas cannot read it in their own "
                "template; run without --cache_requests."
            )
        return chat


def _device(asked: str | None) -> str:
    return "cpu" if not torch.cuda.is_available() else asked or "cuda"


def _by_settings(requests: Sequence[Instance]) -> dict[tuple[int, tuple[str, ...]], list[int]]:
    """Indices of the requests by longest answer and stop texts."""
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for index, request in enumerate(requests):
        options = cast(Mapping[str, Any], request.args[1])
        if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
            raise ConfigError("The model cmc answers greedily; set --gen_kwargs do_sample=false,temperature=0.")
        until = options.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        limits = (int(options[key]) for key in _MAX_TOKENS_KEYS if options.get(key) is not None)
        groups.setdefault((next(limits, _DEFAULT_MAX_TOKENS), stop), []).append(index)
    return groups


def _total(scores: TokenScores) -> tuple[float, bool]:
    return float(scores.log_probs.double().sum()), bool(scores.greedy.all())
