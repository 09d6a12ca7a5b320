"""Templates with another vocabulary than the delta's: which steps one pass serves, and what they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tokenizer
from tiny_template import CHAT_TEMPLATE, make_template
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.training.batches import Collator
from cmc_server.training.command import train_delta
from cmc_server.training.examples import ExampleEncoder
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.recipes import Recipe
from cmc_server.training.student import Student, vocabulary_size
from cmc_server.training.template import FrozenTemplate
from cmc_server.training.terms import label_loss
from cmc_server.training.trainer import answers_by_template

ANSWERS = (
    "It is thunder and nothing else.",
    "Naïve café 🎉🚀, ½ + ¼ = ¾!",
    "  spaces\n\tand tabs  ",
    "日本語 and русский",
)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM with a vocabulary of its own."""
    folder = make_template(tmp_path_factory.mktemp("other"))
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=500))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder, vocab_size=len(tokenizer) + 4)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bridged(template_folder: Path, other_folder: Path) -> ExampleEncoder:
    templates = [FrozenTemplate.load(str(folder)) for folder in (template_folder, other_folder)]
    prompts = PromptEncoder(templates[0].tokenizer, DeltaManifest())
    return ExampleEncoder(templates, None, prompts, HiddenCache("memory", 1.0), 256)


def pairs() -> list[Any]:
    return [([{"role": "user", "content": "What?"}], answer) for answer in ANSWERS]


def test_the_served_steps_are_those_at_which_the_delta_reads_the_same(bridged: ExampleEncoder) -> None:
    speller, template = bridged.bridges[1].speller, bridged.templates[1]
    num_served = num_steps = 0
    for item, (_, answer) in zip(bridged.encode({"train": pairs()}), pairs(), strict=True):
        example = item["train"]
        first, reading = example.readings
        prompt = example.delta_ids[: first.positions[0] + 1]
        response = template.encode_response(answer)
        expected = []
        for step in range(len(response)):
            ids = speller.delta_input(prompt, response[:step])
            if ids == example.delta_ids[: len(ids)]:
                expected.append((step, len(ids) - 1, response[step]))
        assert list(zip(reading.steps or [], reading.positions, reading.labels, strict=True)) == expected
        num_served, num_steps = num_served + len(expected), num_steps + len(response)
    # Both the step after the prompt and many behind it, but not all: the vocabularies differ.
    assert len(ANSWERS) < num_served < num_steps


def test_the_loss_is_that_of_the_rule_through_the_map(bridged: ExampleEncoder, other_folder: Path) -> None:
    items = bridged.encode({"train": pairs()})
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(other_folder, vocab_size=vocabulary_size(bridged.templates[0].tokenizer))
    delta = LlamaForCausalLM(config).eval()
    collator = Collator(bridged.templates, None, bridged.bridges)
    batch = collator(items)
    student = Student(delta, config.vocab_size)
    _, through = answers_by_template(student(batch), collator, batch)
    values = label_loss(through["train"])

    user, bridge, expected = AutoModelForCausalLM.from_pretrained(other_folder), bridged.bridges[1], []
    for item, (prompt, answer) in zip(items, pairs(), strict=True):
        example = item["train"]
        response = bridged.templates[1].encode_response(answer)
        start = len(bridged.templates[1].encode_prompt(prompt))
        delta_prompt = example.delta_ids[: example.readings[0].positions[0] + 1]
        for step in example.readings[1].steps or []:
            ids = bridged.templates[1].encode_prompt(prompt) + response[:step]
            assert len(ids) == start + step
            logits = user(torch.tensor([ids])).logits[0, -1]
            read = bridge.speller.delta_input(delta_prompt, response[:step])
            shift = delta(torch.tensor([read])).logits[0, -1]
            for token, target in enumerate(bridge.delta_ids.tolist()):
                if target >= 0:
                    logits[token] = logits[token] + shift[target]
            expected.append(cross_entropy(logits, torch.tensor(response[step])))
    torch.testing.assert_close(values, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_one_delta_is_trained_beside_both(
    tmp_path: Path, recipe_values: dict[str, Any], template_folder: Path, other_folder: Path
) -> None:
    folders = [str(template_folder), str(other_folder)]
    recipe = Recipe.model_validate(recipe_values | {"template": folders})
    train_delta(recipe, tmp_path, tmp_path / "delta", folders)
    metrics = DeltaManifest.read(tmp_path / "delta").training["metrics"]
    assert metrics["train_loss"] < metrics["train_loss_without_delta"]


def test_states_that_are_not_kept_are_picked_alike(bridged: ExampleEncoder) -> None:
    fresh = ExampleEncoder(
        bridged.templates,
        None,
        PromptEncoder(bridged.templates[0].tokenizer, DeltaManifest()),
        HiddenCache("none", 1.0),
        256,
    )
    collator = Collator(bridged.templates, None, bridged.bridges)
    kept, computed = (
        collator(encoder.encode({"train": pairs()}))["train"]["readings"][1] for encoder in (bridged, fresh)
    )
    torch.testing.assert_close(kept["hidden"], computed["hidden"])
    assert torch.equal(kept["labels"], computed["labels"])
