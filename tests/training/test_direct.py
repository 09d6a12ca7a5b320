"""Training an LLM itself: the same objectives, no frozen partner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_template import SUBJECTS, chat, write_jsonl
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from cmc_server.errors import ConfigError
from cmc_server.training.data import read_chats
from cmc_server.training.direct import NoTemplate, train_llm
from cmc_server.training.recipes import Recipe
from cmc_server.vocab.surface import load_tokenizer


def recipe(template: Path, objective: Any = "instruction_tuning", epochs: int = 8, **data: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tuned",
            "template": str(template),
            "data": data,
            "objective": objective,
            "optimisation": {"epochs": epochs, "batch_size": 2, "learning_rate": 1e-2},
            "checkpoint": {"save_strategy": "no"},
            "output": {"folder": "unused"},
        }
    )


def losses(model: Any, template: Path, path: Path) -> list[float]:
    """Cross-entropy of each answer, written out."""
    tokenizer = load_tokenizer(str(template))
    results = []
    for messages in read_chats(path):
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        results.append(cross_entropy(logits[:, : len(tokenizer)], torch.tensor(answer)).item())
    return results


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    chats = [{"messages": chat(subject)} for subject in SUBJECTS]
    return {
        "forget": write_jsonl(tmp_path / "forget.jsonl", chats[:3]),
        "retain": write_jsonl(tmp_path / "retain.jsonl", chats[3:]),
    }


def test_the_loss_is_that_of_the_llm_alone(template_folder: Path, files: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(template_folder, dtype=torch.float32)
    alone = NoTemplate(model, load_tokenizer(str(template_folder)))
    messages = read_chats(files["forget"])[0]
    example = alone.example(messages[:-1], messages[-1]["content"])
    logits = model(torch.tensor([example.delta_ids])).logits[0, example.readings[0].positions]
    loss = cross_entropy(logits[:, : len(alone.tokenizer)], torch.tensor(example.readings[0].labels)).item()
    assert loss == pytest.approx(losses(model, template_folder, files["forget"])[0], abs=1e-5)


def test_tuning_learns_and_gradient_difference_forgets_what_it_should(
    template_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(template_folder, dtype=torch.float32)
    tuned = train_llm(recipe(template_folder, train=files["retain"].name, epochs=12), tmp_path)
    learnt = losses(tuned, template_folder, files["retain"])
    assert max(learnt) < 0.5 * min(losses(base, template_folder, files["retain"]))
    objective = {"name": "grad_diff", "forget_bound": 8.0}
    torn = train_llm(
        recipe(template_folder, objective, forget=files["forget"].name, retain=files["retain"].name), tmp_path
    )
    assert min(losses(torn, template_folder, files["forget"])) > max(losses(torn, template_folder, files["retain"]))


def test_adapters_alone_are_trained_and_merged(template_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    base = AutoModelForCausalLM.from_pretrained(template_folder, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    tuned = train_llm(recipe(template_folder, train=files["retain"].name), tmp_path, lora)
    assert torch.equal(tuned.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert {name for name, _ in tuned.named_parameters()} == {name for name, _ in base.named_parameters()}
    changed = {
        name.split(".")[-2]
        for (name, new), old in zip(tuned.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_objectives_with_a_reference_are_refused(template_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="npo needs a frozen LLM"):
        train_llm(recipe(template_folder, "npo", forget=files["forget"].name), tmp_path)
