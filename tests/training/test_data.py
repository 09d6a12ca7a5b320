"""Chats from files, and what template and delta read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_template import SUBJECTS, chat, write_jsonl
from transformers import AutoModelForCausalLM

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.errors import ConfigError
from cmc_server.training.data import collate, encode_chats, read_chats
from cmc_server.training.template import FrozenTemplate

BROKEN: dict[str, Any] = {
    "no messages": {"prompt": "a"},
    "not an object": [1],
    "unknown role": {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "content is no text": {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
    "no answer": {"messages": [{"role": "user", "content": "a"}]},
    "answer is not last": {"messages": [*reversed(chat("rain"))]},
    "empty answer": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
    "answer without a question": {"messages": [{"role": "assistant", "content": "a"}]},
}


@pytest.fixture(scope="module")
def template(template_folder: Path) -> FrozenTemplate:
    return FrozenTemplate.load(str(template_folder))


@pytest.fixture(scope="module")
def encoder(template: FrozenTemplate) -> PromptEncoder:
    return PromptEncoder(template.tokenizer, DeltaManifest())


@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_named_by_its_line(tmp_path: Path, record: Any) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat("rain")}, record])
    with pytest.raises(ConfigError, match="line 2"):
        read_chats(path)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chats"):
        read_chats(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_chats(tmp_path / "none.jsonl")


def test_each_reads_its_own_prompt_and_the_same_response(template: FrozenTemplate, encoder: PromptEncoder) -> None:
    (example,) = encode_chats([chat("rain")], template, encoder, 128)
    read = template.tokenizer.decode(example.delta_ids)
    assert read == "<|user|>\nWhat is rain?\n<|assistant|>\nIt is rain and nothing else.</s>"
    assert example.labels == example.delta_ids[-len(example.labels) :]
    assert example.labels[-1] == template.eos_id
    assert template.tokenizer.decode(template.encode_prompt(chat("rain")[:-1])) == (
        "<s>user\nWhat is rain?</s>\n<s>assistant\n"
    )


def test_hidden_states_give_the_logits_before_each_label(
    template: FrozenTemplate, template_folder: Path, encoder: PromptEncoder
) -> None:
    examples = encode_chats([chat("rain"), chat("thunder")], template, encoder, 128)
    model = AutoModelForCausalLM.from_pretrained(template_folder)
    for subject, example in zip(("rain", "thunder"), examples, strict=True):
        ids = template.encode_prompt(chat(subject)[:-1]) + example.labels
        expected = model(torch.tensor([ids])).logits[0, -len(example.labels) - 1 : -1]
        torch.testing.assert_close(template.logits(example.hidden), expected)


def test_positions_point_before_the_labels(template: FrozenTemplate, encoder: PromptEncoder) -> None:
    examples = encode_chats([chat(subject) for subject in SUBJECTS[:3]], template, encoder, 128)
    batch = collate(examples)
    flat = batch["input_ids"].flatten()
    num_columns = batch["input_ids"].shape[1]
    start = 0
    for row, example in enumerate(examples):
        stop = start + len(example.labels)
        positions = batch["positions"][start:stop]
        assert (positions // num_columns == row).all()
        assert flat[positions[1:]].tolist() == example.labels[:-1]
        assert batch["labels"][start:stop].tolist() == example.labels
        assert batch["attention_mask"][row].sum() == len(example.delta_ids) - 1
        start = stop
    assert batch["hidden"].shape[0] == start


def test_long_chats_are_left_out_with_a_warning(template: FrozenTemplate, encoder: PromptEncoder) -> None:
    long = chat("very " * 200 + "long")
    with pytest.warns(UserWarning, match="1 of 2 chats"):
        examples = encode_chats([long, chat("rain")], template, encoder, 128)
    assert len(examples) == 1
    with pytest.raises(ConfigError, match="max_length"):
        encode_chats([long], template, encoder, 128)


def test_a_template_without_a_chat_template_is_refused(template: FrozenTemplate) -> None:
    tokenizer = template.tokenizer.__class__(tokenizer_object=template.tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="chat template"):
        FrozenTemplate(template.model, tokenizer)


def test_a_template_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--template"):
        FrozenTemplate.load(str(tmp_path / "nothing"))
