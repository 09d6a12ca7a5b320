"""An LLM trained itself by the same objectives: the tuned LLMs of the demos, and what a delta is compared with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, set_seed

from cmc_server.errors import ConfigError
from cmc_server.training.batches import Collator, Example, Reading, TrainingSet
from cmc_server.training.data import Prompt, read_records
from cmc_server.training.examples import roles_of
from cmc_server.training.recipes import Recipe
from cmc_server.training.student import Student, vocabulary_size
from cmc_server.training.template import FrozenTemplate
from cmc_server.training.trainer import DeltaTrainer
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Objectives that need no frozen partner: with none, the steered distribution is the LLM's own.
PARTNERLESS = ("instruction_tuning", "grad_ascent", "grad_diff", "idk")


class NoTemplate(FrozenTemplate):
    """Stands where a frozen LLM would, and says nothing.

    Args:
        model: the LLM that is trained; only asked for its device.
        tokenizer: its tokenizer, with a chat template and an eos.
    """

    silent = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.eos_id = tokenizer.eos_token_id

    def example(self, prompt: Prompt, answer: str) -> Example:
        """What the LLM itself reads and learns."""
        ids, labels = self.encode(prompt, answer)
        read = [*ids, *labels[:-1]]
        positions = list(range(len(ids) - 1, len(read)))
        nothing = torch.zeros(len(labels), 0)
        return Example(read, (Reading(read, len(ids) - 1, labels, positions, hidden=nothing),))


def train_llm(recipe: Recipe, base: Path, lora: LoraConfig | None = None) -> PreTrainedModel:
    """Train the recipe's template LLM itself instead of a delta beside it.

    Args:
        recipe: as for a delta; its keys ``delta`` and ``output`` are not used, and nothing is written.
        base: folder that the recipe's data paths are relative to.
        lora: trains low-rank adapters (Hu et al., 2022) and merges them, instead of training all weights.

    Returns:
        The tuned LLM, float32, in evaluation mode.

    Raises:
        ConfigError: the objective needs a frozen partner, or data or LLM cannot be used.
    """
    objective = recipe.objective
    if objective.name not in PARTNERLESS or getattr(objective, "template_weight", 0.0) > 0:
        raise ConfigError(f"objective {objective.name} needs a frozen LLM; choose one of {', '.join(PARTNERLESS)}.")
    records = {key: read_records(source, base) for key, source in recipe.data.sources.items()}
    set_seed(recipe.seed)
    path = recipe.templates[0]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    alone = NoTemplate(model.to(PartialState().device), load_tokenizer(path))
    adapted: Any = None
    if lora is not None:
        from peft import get_peft_model

        # The adapters are put into the model in place, so that it can be called as before.
        adapted = get_peft_model(model, lora)
    answers = roles_of(objective, recipe.main, records[recipe.main].items, recipe.seed)
    items = [
        dict(zip(answers, examples, strict=True))
        for examples in zip(*([alone.example(*pair) for pair in pairs] for pairs in answers.values()), strict=True)
    ]
    kept = records["retain"].items if "retain" in records else []
    retain = [alone.example(record.prompt, record.answer) for record in kept]
    student = Student(model, vocabulary_size(alone.tokenizer))
    with tempfile.TemporaryDirectory(prefix="cmc-llm-") as folder:
        train = TrainingSet(items, retain, recipe.seed)
        DeltaTrainer(student, Collator([alone]), recipe, train, None, Path(folder)).train()
    tuned: PreTrainedModel = model if adapted is None else adapted.merge_and_unload()
    return tuned.eval()
