"""Time scoring by stretches against the token-by-token oracle, on the demo models with the shipped delta.

    python benchmarks/scoring.py [--user NAME]... [--chats NUM] [--repeat NUM] [--output FILE]

Each chat of the shipped held-out data is scored with its reference answer at strength 1, in float32: by the oracle one
step after the other, by ``FusedLM.score`` one chat at a time, and by ``FusedLM.score_batch`` all at once (after a
warm-up, the median of the repetitions). Two continuations are added: a text in many scripts, which makes the delta
spell anew most often, and all the answers as one long text.

The ceiling: where compute decides, the delta's share falls by the ratio of the tokens that it reads in both ways,
which is printed beside the times. The whole falls by less, since the oracle too reads the user LLM once per
continuation; so the delta's share is timed by itself as well.

Seconds are CPU seconds on one thread, which other work on the machine disturbs least; the load is noted beside them.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from benchmark_report import describe_machine, keep

import cmc_server
from cmc_server.demo.models import demo_model
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.scoring import FusedLM, Pair

T = TypeVar("T")
DEMO = Path(cmc_server.__file__).parent / "demo"
STRENGTHS = {"concise": 1.0}
SCRIPTS = "naïve café déjà vu 👩‍👩‍👧‍👦🇩🇪 你好，世界！ Привет, как дела? مرحبا بالعالم 3.14159"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    report = {
        "benchmark": "scoring",
        "machine": {**describe_machine("torch", "tokenizers", "transformers"), "threads_used": 1},
        "chats": arguments.chats,
        "models": {name: _measure(name, arguments) for name in arguments.user or ("smollm2", "gemma3")},
    }
    keep(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", action="append", choices=("smollm2", "gemma3"), help="demo model; default both")
    parser.add_argument("--chats", type=int, default=8, help="chats of the held-out data")
    parser.add_argument("--repeat", type=int, default=3, help="timed repetitions of what is fast")
    parser.add_argument("--output", type=Path, help="also write the report here")
    return parser.parse_args()


def _pairs(num_chats: int) -> list[Pair]:
    lines = (DEMO / "data" / "concise" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:num_chats]
    chats = [json.loads(line)["messages"] for line in lines]
    together = "\n".join(chat[-1]["content"] for chat in chats)
    return [*((chat[:-1], chat[-1]["content"]) for chat in chats), (chats[0][:-1], SCRIPTS), (chats[0][:-1], together)]


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    path, delta_path = demo_model(name), DEMO / "concise"
    fused, oracle = FusedLM.load(path, {"concise": delta_path}), ReferenceFusedLM(path, {"concise": delta_path})
    # Every repetition computes: what is kept of the last one would be timed as if it cost nothing.
    for model in (fused.model, *(delta.model for delta in fused.loaded.values())):
        model.kept_bytes = 0
    pairs = _pairs(arguments.chats)
    fused.score_batch(pairs, STRENGTHS)
    one_by_one, _ = _median(lambda: [fused.score(*pair, STRENGTHS) for pair in pairs], arguments.repeat)
    batched, scores = _median(lambda: fused.score_batch(pairs, STRENGTHS), arguments.repeat)
    by_oracle, expected = _timed(lambda: [_oracle_scores(fused, oracle, pair) for pair in pairs])
    by_stretches, by_steps = _delta_share(fused, oracle, pairs, arguments.repeat)
    worst = max(float((one - other).abs().max()) for one, other in zip(scores, expected, strict=True))
    result = {
        **_work(fused, pairs),
        "oracle_cpu_s": round(by_oracle, 3),
        "stretches_one_by_one_cpu_s": round(one_by_one, 3),
        "stretches_batched_cpu_s": round(batched, 3),
        "delta_alone_oracle_cpu_s": round(by_steps, 3),
        "delta_alone_stretches_cpu_s": round(by_stretches, 3),
        "speed_up_delta_alone": round(by_steps / by_stretches, 1),
        "speed_up_one_by_one": round(by_oracle / one_by_one, 1),
        "speed_up_batched": round(by_oracle / batched, 1),
        "worst_difference_nats": float(f"{worst:.2g}"),
    }
    print(f"{name}: {result}", file=sys.stderr)
    return result


def _oracle_scores(fused: FusedLM, oracle: ReferenceFusedLM, pair: Pair) -> torch.Tensor:
    prompt, text = pair
    response = fused.encode_continuation(text)
    delta_prompt = oracle.deltas["concise"].encoder.encode_messages(prompt)  # type: ignore[arg-type]
    steps = oracle.steps(
        fused.encode_prompt(prompt), response, STRENGTHS, delta_prompts={"concise": delta_prompt}, unmapped="zero"
    )
    # The oracle yields one step more, for the token behind the response.
    return torch.stack([z.log_softmax(-1)[token] for z, token in zip(steps, response, strict=False)])


def _delta_share(fused: FusedLM, oracle: ReferenceFusedLM, pairs: Sequence[Pair], repeat: int) -> tuple[float, float]:
    """Seconds for the delta's logits at every token: by stretches (median), and one step after the other."""
    fast, slow = fused.loaded["concise"], oracle.deltas["concise"]
    jobs = [
        (fast.prompt_ids(prompt, fused.encode_prompt(prompt)), fused.encode_continuation(text))
        for prompt, text in pairs
    ]
    by_stretches, _ = _median(lambda: fast.model.logits(fast.states(jobs)[0]), repeat)

    def step_by_step() -> None:  # keeps nothing: fresh memory for every step would cost more than the step
        for prompt_ids, response in jobs:
            for step in range(len(response)):
                slow.logits(prompt_ids, response[:step])

    with torch.inference_mode():
        by_steps, _ = _timed(step_by_step)
    return by_stretches, by_steps


def _work(fused: FusedLM, pairs: Sequence[Pair]) -> dict[str, Any]:
    """How much the delta has to read, by stretches and token by token."""
    delta = fused.loaded["concise"]
    tokens = stretches = read = read_by_oracle = 0
    for prompt, text in pairs:
        response = fused.encode_continuation(text)
        planned = delta.stretches(delta.prompt_ids(prompt, fused.encode_prompt(prompt)), response)
        tokens += len(response)
        stretches += len(planned)
        read += sum(len(stretch.ids) for stretch in planned)
        read_by_oracle += sum(position + 1 for stretch in planned for position, _ in stretch.served)
    return {
        "continuation_tokens": tokens,
        "delta_passes": stretches,
        "delta_passes_by_oracle": tokens,
        "delta_tokens_read": read,
        "delta_tokens_read_by_oracle": read_by_oracle,
    }


def _median(call: Callable[[], T], repeat: int) -> tuple[float, T]:
    runs = [_timed(call) for _ in range(repeat)]
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.process_time()
    value = call()
    return time.process_time() - started, value


if __name__ == "__main__":
    main()
