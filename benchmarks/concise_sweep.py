"""How the length of answers falls with the strength of a delta, on held-out prompts, through vLLM.

    python benchmarks/concise_sweep.py "SmolLM2 135M=FOLDER" "Gemma 3 270M=FOLDER" --plot docs/images/concise.png

Prints the table of docs/concise.md, sample answers and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cmc_server
from cmc_server.evaluation.generation import (
    Answer,
    falls_steadily,
    markdown_table,
    plot_sweep,
    summarise_sweep,
)

DEMO = Path(cmc_server.__file__).parent / "demo"
SAMPLES = 5
#: Beyond it answers cannot be expected to shorten further; the table shows what happens there.
JUDGED_UP_TO = 1.5

Chat = list[dict[str, str]]


def read_prompts(path: Path) -> list[Chat]:
    """Held-out chats without the reference answer at their end."""
    with path.open(encoding="utf-8") as lines:
        chats: list[Chat] = [json.loads(line)["messages"] for line in lines]
    return [chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in chats]


def generate(
    model: str, deltas: Mapping[str, Path], chats: Sequence[Chat], strengths: Sequence[float], limit: int
) -> dict[str, dict[float, list[Answer]]]:
    """Greedy answers of one user LLM with each delta at every strength, all in one continuous batch."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from cmc_server.config import ADDITIONAL_CONFIG_KEY, DeltaSource
    from cmc_server.delta.prompt import PromptEncoder
    from cmc_server.delta.store import open_delta
    from cmc_server.integrations.request_args import ActiveDelta, RequestControls
    from cmc_server.integrations.vllm_processor import CLASS_PATH

    encoders = {}
    for name, path in deltas.items():
        artifact = open_delta(DeltaSource(name=name, path=str(path)))
        encoders[name] = PromptEncoder(artifact.tokenizer(), artifact.manifest)
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=64,
        logits_processors=[CLASS_PATH],
        additional_config={
            ADDITIONAL_CONFIG_KEY: {"deltas": [{"name": name, "path": str(path)} for name, path in deltas.items()]}
        },
    )
    tokenizer = llm.get_tokenizer()
    # The bare LLM answers once for all deltas.
    wanted = [(name, strength) for name in deltas for strength in strengths if strength]
    wanted = [*([("", 0.0)] if 0.0 in strengths else []), *wanted]
    prompts, parameters = [], []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, strength in wanted:
            extra: dict[str, Any] = {}
            if strength:
                prompt_ids = tuple(encoders[name].encode_messages(chat))
                active = ActiveDelta(name=name, strength=strength, prompt_ids=prompt_ids)
                extra = dict(RequestControls(deltas=(active,), unmapped="zero").to_extra_args())
            prompts.append(TokensPrompt(prompt_token_ids=ids))
            parameters.append(SamplingParams(temperature=0, max_tokens=limit, extra_args=extra or None))
    outputs = [output.outputs[0] for output in llm.generate(prompts, parameters)]
    del llm
    answers = [
        Answer(output.text.strip(), len(output.token_ids) - ended, ended)
        for output in outputs
        for ended in [output.finish_reason == "stop"]
    ]
    by_run = {run: answers[index :: len(wanted)] for index, run in enumerate(wanted)}
    return {
        name: {strength: by_run[(name, strength) if strength else ("", 0.0)] for strength in strengths}
        for name in deltas
    }


def show_samples(model: str, chats: Sequence[Chat], answers: dict[float, list[Answer]]) -> None:
    for index in range(0, len(chats), max(1, len(chats) // SAMPLES)):
        print(f"\n**{model}: {chats[index][-1]['content']}**\n")
        for strength, some in answers.items():
            print(f"- {strength:g}: {' '.join(some[index].text.split())}{'' if some[index].ended else ' …'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="user LLMs")
    parser.add_argument("--delta", type=Path, default=DEMO / "concise")
    parser.add_argument("--prompts", type=Path, default=DEMO / "data" / "concise" / "heldout.jsonl")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--limit", type=int, default=80, help="answers are cut after so many tokens")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    chats = read_prompts(options.prompts)
    sweeps = {}
    for entry in options.models:
        name, _, folder = entry.partition("=")
        answers = generate(folder, {"concise": options.delta}, chats, options.strengths, options.limit)["concise"]
        show_samples(name, chats, answers)
        sweeps[name] = summarise_sweep(answers)
    print(f"\n{markdown_table(sweeps)}")
    if options.plot is not None:
        plot_sweep(
            sweeps, options.plot, f"concise: {len(chats)} held-out prompts, answers cut at {options.limit} tokens"
        )
    steady = {
        name: falls_steadily([result for result in results if result.strength <= JUDGED_UP_TO])
        for name, results in sweeps.items()
    }
    figures = {name: [asdict(result) for result in results] for name, results in sweeps.items()}
    print(json.dumps({"prompts": len(chats), "limit": options.limit, "falls_steadily": steady, "sweeps": figures}))
    sys.exit(0 if all(steady.values()) else 1)


if __name__ == "__main__":
    main()
