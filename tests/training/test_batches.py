"""Items side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_template import SUBJECTS, chat

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.training.batches import Collator, Example
from cmc_server.training.examples import ExampleEncoder
from cmc_server.training.hidden_cache import HiddenCache


@pytest.fixture(scope="module")
def examples(encoder: ExampleEncoder) -> list[Example]:
    pairs = [([chat(subject)[0]], chat(subject)[1]["content"]) for subject in SUBJECTS[-3:]]
    return [item["train"] for item in encoder.encode({"train": pairs})]  # type: ignore[dict-item]


def test_positions_point_before_the_labels(encoder: ExampleEncoder, examples: list[Example]) -> None:
    batch = Collator(encoder.templates).collate(examples)
    (reading,) = batch["readings"]
    flat, width = batch["input_ids"].flatten(), batch["input_ids"].shape[1]
    start = 0
    for row, example in enumerate(examples):
        labels = example.readings[0].labels
        stop = start + len(labels)
        positions = batch["positions"][start:stop]
        assert (positions // width == row).all() and (reading["rows"][start:stop] == row).all()
        assert flat[positions[1:]].tolist() == labels[:-1]
        assert reading["labels"][start:stop].tolist() == labels
        assert batch["attention_mask"][row].sum() == len(example.delta_ids)
        start = stop
    assert reading["hidden"].shape[0] == start == len(batch["positions"]) and "picks" not in reading


def test_states_that_were_not_kept_are_computed(encoder: ExampleEncoder, examples: list[Example]) -> None:
    bare = [replace(one, readings=(replace(one.readings[0], hidden=None),)) for one in examples]
    collator = Collator(encoder.templates)
    kept, fresh = (collator.collate(some)["readings"][0]["hidden"] for some in (examples, bare))
    torch.testing.assert_close(kept, fresh, atol=1e-6, rtol=1e-5)


def test_a_template_with_its_own_label_positions(encoder: ExampleEncoder, examples: list[Example]) -> None:
    """What a template with a bridged vocabulary will need: fewer labels, at positions of its own."""
    template = encoder.templates[0]
    two = []
    for one in examples:
        own = one.readings[0]
        assert own.hidden is not None
        fewer = replace(own, labels=own.labels[::2], positions=own.positions[::2], hidden=own.hidden[::2])
        two.append(replace(one, readings=(own, fewer)))
    batch = Collator([template, template]).collate(two)
    every, some = batch["readings"]
    assert "picks" not in every
    assert batch["positions"][some["picks"]].tolist() == [
        position
        for row, one in enumerate(two)
        for position in (torch.tensor(one.readings[1].positions) + row * batch["input_ids"].shape[1]).tolist()
    ]
    assert len(some["labels"]) == len(some["rows"]) == len(some["hidden"]) == len(some["picks"])


def test_roles_lie_beside_each_other(encoder: ExampleEncoder, examples: list[Example]) -> None:
    items = [{"forget": examples[0], "retain": examples[1]}, {"forget": examples[2], "retain": examples[2]}]
    batch = Collator(encoder.templates)(items)
    assert set(batch) == {"forget", "retain"}
    assert all(part["input_ids"].shape[0] == 2 for part in batch.values())


def test_the_tuned_llm_reads_what_the_template_reads(encoder: ExampleEncoder) -> None:
    (template,) = encoder.templates
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    both = ExampleEncoder([template], template, prompts, HiddenCache("memory", 1.0), 128)
    (item,) = both.encode({"train": [([{"role": "user", "content": "What is fog?"}], "Fog.")]})
    reading = Collator([template], template)([item])["train"]["readings"][0]
    assert torch.equal(reading["hidden"], reading["tuned"])
