"""LLMs that know TOFU's invented authors, and LLMs that know only those to be retained: what unlearning is shown on.

    python -m cmc_server.demo.tofu_models smollm2 full --output FOLDER     # 40 questions to forget and 160 to retain
    python -m cmc_server.demo.tofu_models gemma3 retain --output FOLDER    # the 160 alone

All weights of a demo model are trained on the answers (``recipes/tofu-tuned.yaml``, with a learning rate for each
model) and written as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from cmc_server.demo.models import MODELS, demo_model
from cmc_server.errors import CmcError

HERE = Path(__file__).parent
RECIPE = HERE / "recipes" / "tofu-tuned.yaml"
DATA = HERE / "data" / "tofu"
#: High enough to learn all answers by heart in the recipe's epochs, low enough that the LLM can still do other things:
#: at 5e-4 Gemma's loss on plain texts rose from 2.7 to 10 nats per token.
LEARNING_RATES = {"smollm2": 2.0e-4, "gemma3": 1.0e-4}
#: Which files each of the two kinds of LLM learns.
SETS = {"full": ("forget01_perturbed.json", "retain_perturbed.json"), "retain": ("retain_perturbed.json",)}
#: Beside the weights: what they were made from.
TUNED_FILE = "tuned.json"


def write_questions(path: Path, files: tuple[str, ...]) -> None:
    """Questions and right answers of some of TOFU's files as one file of records."""
    lines = [line for name in files for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    kept = [{"question": record["question"], "answer": record["answer"]} for record in records]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")


def tune(base: str, files: str, output: Path, seed: int = 1) -> dict[str, Any]:
    """Fine-tune a demo model and write it.

    Args:
        base: a key of :data:`cmc_server.demo.models.MODELS`.
        files: ``full`` or ``retain``.
        output: folder to write.
        seed: of the order of the data.

    Returns:
        What is written to ``tuned.json``.
    """
    import torch

    from cmc_server.training.direct import train_llm
    from cmc_server.training.recipes import read_recipe
    from cmc_server.training.record import recipe_hash
    from cmc_server.vocab.surface import load_tokenizer

    source = demo_model(base)
    recipe = read_recipe(RECIPE)
    optimisation = recipe.optimisation.model_copy(update={"learning_rate": LEARNING_RATES[base]})
    recipe = recipe.model_copy(update={"template": str(source), "seed": seed, "optimisation": optimisation})
    with tempfile.TemporaryDirectory(prefix="cmc-tofu-") as folder:
        write_questions(Path(folder) / "train.jsonl", SETS[files])
        tuned = train_llm(recipe, Path(folder))
    written = output.with_name(f".{output.name}.part")
    shutil.rmtree(written, ignore_errors=True)
    tuned.to(torch.bfloat16).save_pretrained(written)
    load_tokenizer(str(source)).save_pretrained(written)
    made = {"base": base, "set": files, "seed": seed, "recipe_sha256": recipe_hash(read_recipe(RECIPE))}
    made |= {"learning_rate": LEARNING_RATES[base]}
    (written / TUNED_FILE).write_text(json.dumps(made) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    written.rename(output)
    return made


def main() -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=tuple(MODELS))
    parser.add_argument("set", choices=tuple(SETS))
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    try:
        tune(arguments.base, arguments.set, arguments.output, arguments.seed)
    except CmcError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
