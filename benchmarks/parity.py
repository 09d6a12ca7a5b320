"""Parity of an engine with the slow oracle, judged by teacher forcing.

    python benchmarks/parity.py --engine v1 --user USER_LLM --delta DELTA

Every prompt is answered greedily in float32 at every strength by the engine: ``v1`` and ``v2`` are vLLM's two model
runners, ``generate`` is transformers with the logits processor. The emitted ids are then fed through the oracle: each
must be its best token, or lie within 1e-3 of it. In batches, strengths and base requests are mixed; ``--alone`` runs
one request at a time. Base rows are compared before and after the processor, bit by bit (vLLM only).

Without a GPU, ``v2`` needs the Triton interpreter: PYTHONPATH=tests/cpu_engine CMC_TEST_TRITON_INTERPRETER=1
VLLM_USE_V2_MODEL_RUNNER=1. With CMC_TEST_ASYNC_SCHEDULING=1 scheduling is asynchronous there too, as on a GPU. The last
line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmc_server.config import FAST_PATHS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parent))

TOLERANCE = 1e-3
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "Water is made of",
    "def add(a, b):\n",
    "A good breakfast has",
    "The three primary colours are",
    "Dear Sir or Madam,\n",
    "Q: Why is the sky blue?\nA:",
    "1, 2, 3, 4,",
    "Der schnellste Weg nach Berlin ist",
    "Les trois mousquetaires étaient",
    "The recipe needs 250 g of flour, 2 eggs and",
    "In 1969, humans first",
    '{"name": "Ada", "age":',
    "你好，我想知道",
    "Привет! Сегодня мы",
    "Emoji test: 🎉🚀 means",
    "import numpy as np\n\nx = np.",
    "The opposite of hot is",
    "To be, or not to be,",
)


@dataclass(frozen=True)
class Answer:
    """What an engine emitted for one prompt at one strength; None is a base request."""

    prompt_ids: list[int]
    strength: float | None
    response_ids: list[int]


def cases(prompts: int, strengths: Sequence[float]) -> list[tuple[str, float | None]]:
    """Every prompt at every strength, and once as a base request."""
    return [(prompt, strength) for prompt in PROMPTS[:prompts] for strength in (None, *strengths)]


def answers_of_vllm(args: argparse.Namespace, log: Path) -> Iterator[Answer]:
    from vllm import LLM, SamplingParams

    os.environ["CMC_PARITY_LOG"] = str(log)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    llm = LLM(
        str(args.user),
        dtype="float32",
        enforce_eager=True,
        max_model_len=args.max_model_len,
        disable_log_stats=False,
        tensor_parallel_size=args.tensor_parallel,
        max_num_seqs=1 if args.alone else args.batch,
        max_num_batched_tokens=args.batched_tokens,
        enable_prefix_caching=False,
        generation_config="vllm",
        num_gpu_blocks_override=args.kv_blocks,
        block_size=32 if args.kv_blocks else None,
        logits_processors=["watched_processor:WatchedProcessor"],
        additional_config={
            "cmc_server": {"deltas": [{"name": "delta", "path": str(args.delta)}], "fast_paths": args.fast_paths}
        },
    )
    work = cases(args.prompts, args.strengths)
    params = [
        SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, extra_args=controls(strength, args))
        for _, strength in work
    ]
    for (_, strength), output in zip(work, llm.generate([prompt for prompt, _ in work], params), strict=True):
        yield Answer(list(output.prompt_token_ids), strength, list(output.outputs[0].token_ids))
    preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    is_async = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    with log.open("a") as stream:
        stream.write(json.dumps({"preemptions": sum(preemptions), "async_scheduling": is_async}) + "\n")


def controls(strength: float | None, args: argparse.Namespace) -> dict[str, Any] | None:
    if strength is None:
        return None
    return {"cmc": {"deltas": [{"name": "delta", "strength": strength}], "unmapped": args.unmapped}}


def answers_of_generate(args: argparse.Namespace) -> Iterator[Answer]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cmc_server.integrations.transformers import DeltaLogitsProcessor

    model = AutoModelForCausalLM.from_pretrained(args.user, dtype=torch.float32).eval()
    # The end token is an ordinary one here, as for vLLM with ignore_eos.
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(args.user)
    processors = {
        strength: DeltaLogitsProcessor(
            str(args.user), {"delta": str(args.delta)}, {"delta": strength}, unmapped=args.unmapped
        )
        for strength in args.strengths
    }
    for prompt, strength in cases(args.prompts, args.strengths):
        ids = tokenizer(prompt, return_tensors="pt")
        extra = [] if strength is None else [processors[strength]]
        output = model.generate(
            **ids, do_sample=False, max_new_tokens=args.tokens, logits_processor=extra, pad_token_id=0
        )
        if strength is not None:
            processors[strength].reset()
        prompt_ids = ids["input_ids"][0].tolist()
        yield Answer(prompt_ids, strength, output[0, len(prompt_ids) :].tolist())


def judge(args: argparse.Namespace, answers: Sequence[Answer]) -> dict[str, Any]:
    """The worst distance of an emitted token from the oracle's best one, by strength."""
    from cmc_server.fusion.reference import ReferenceFusedLM

    oracle = ReferenceFusedLM(args.user, {"delta": args.delta})
    worst: dict[str, float] = {}
    for answer in answers:
        gap = oracle.worst_gap(
            answer.prompt_ids, answer.response_ids, {"delta": answer.strength or 0.0}, unmapped=args.unmapped
        )
        key = "base" if answer.strength is None else f"{answer.strength:g}"
        worst[key] = max(worst.get(key, 0.0), gap)
    changed = sum(
        answer.response_ids != base.response_ids
        for base in answers
        if base.strength is None
        for answer in answers
        if answer.strength and answer.prompt_ids == base.prompt_ids
    )
    tokens = sum(len(answer.response_ids) for answer in answers)
    return {"worst_gap": worst, "answers": len(answers), "tokens": tokens, "answers_changed": changed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["v1", "v2", "generate"], required=True)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--delta", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20, choices=range(1, len(PROMPTS) + 1), metavar="1..20")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--unmapped", choices=["zero", "preserve"], default="zero")
    parser.add_argument("--alone", action="store_true", help="one request at a time")
    parser.add_argument("--batch", type=int, default=16, help="rows at once")
    parser.add_argument("--batched-tokens", type=int, default=None, help="small values split prompts into chunks")
    parser.add_argument("--kv-blocks", type=int, default=None, help="few blocks of 32 tokens force preemption")
    parser.add_argument("--fast-paths", nargs="*", default=sorted(FAST_PATHS), help="only these (vLLM engines)")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=512)
    args = parser.parse_args()

    began = time.perf_counter()
    report: dict[str, Any] = {}
    if args.engine == "generate":
        answers = list(answers_of_generate(args))
    else:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
            answers = list(answers_of_vllm(args, Path(log.name)))
            *seen, engine = [json.loads(line) for line in log]
            report |= engine
            report["base_rows_compared"] = sum(entry["base_rows"] for entry in seen)
            report["base_rows_changed"] = sum(entry["changed"] for entry in seen)
            report["rows_with_unseen_tokens"] = sum(entry.get("unseen", 0) for entry in seen)
            report["runner"] = sorted({entry["runner"] for entry in seen})
    report |= judge(args, answers)
    report["passed"] = max(report["worst_gap"].values()) <= TOLERANCE and not report.get("base_rows_changed")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["user"], settings["delta"] = args.user.name, args.delta.name
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"parity": report, "settings": settings, "seconds": seconds, "python": platform.python_version()}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
