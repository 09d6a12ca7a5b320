"""Records encoded for every reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer
from tiny_template import SUBJECTS, chat, make_template
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.errors import ConfigError
from cmc_server.training.data import Record, Records
from cmc_server.training.examples import ExampleEncoder, roles_of, training_set
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.objectives import DPO, GradDiff, IdK, InstructionTuning
from cmc_server.training.template import FrozenTemplate


def record(subject: str, rejected: str | None = None) -> Record:
    (question, answer) = chat(subject)
    return Record([{"role": "user", "content": question["content"]}], answer["content"], rejected)


def pair(subject: str) -> tuple[list, str]:  # type: ignore[type-arg]
    one = record(subject)
    return one.prompt, one.answer


def test_each_reads_its_own_prompt_and_the_same_answer(encoder: ExampleEncoder) -> None:
    ((example,),) = ([*item.values()] for item in encoder.encode({"train": [pair("rain")]}))
    (reading,) = example.readings
    decode = encoder.templates[0].tokenizer.decode
    assert decode(example.delta_ids) == "<|user|>\nWhat is rain?\n<|assistant|>\nIt is rain and nothing else."
    assert decode(reading.ids) == "<s>user\nWhat is rain?</s>\n<s>assistant\nIt is rain and nothing else."
    assert decode(reading.labels) == "It is rain and nothing else.</s>"
    whole = [*example.delta_ids, encoder.templates[0].eos_id]
    assert [whole[position + 1] for position in reading.positions] == reading.labels


def test_records_that_a_template_cannot_read_are_left_out(template: FrozenTemplate) -> None:
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    encoder = ExampleEncoder([template], None, prompts, HiddenCache("memory", 1.0), 1024)
    long = pair("rain " * 200)
    with pytest.warns(UserWarning, match=r"1 of 2 records exceed the 256 tokens that .* reads and are left out"):
        assert len(encoder.encode({"train": [pair("rain"), long]})) == 1
    with pytest.raises(ConfigError, match="No record fits into the 256 tokens"):
        encoder.encode({"train": [long]})


def test_a_token_that_the_template_has_no_embedding_of(template_folder: Path) -> None:
    template = FrozenTemplate.load(str(template_folder))
    template.tokenizer.add_tokens([f"<new-{number}>" for number in range(9)])
    encoder = ExampleEncoder(
        [template], None, PromptEncoder(template.tokenizer, DeltaManifest()), HiddenCache("none", 1.0), 128
    )
    assert len(encoder.encode({"train": [pair("<new-0>")]})) == 1
    with pytest.raises(ConfigError, match="the token '<new-8>' the id 313, but the model has 313 embeddings"):
        encoder.encode({"train": [pair("<new-8>")]})


def test_a_plain_text_is_read_as_it_is_and_has_no_end(encoder: ExampleEncoder) -> None:
    ((example,),) = ([*item.values()] for item in encoder.encode({"train": [("It", " is rain and nothing else.")]}))
    (reading,) = example.readings
    tokenizer = encoder.templates[0].tokenizer
    whole = tokenizer("It is rain and nothing else.")["input_ids"]
    assert [*reading.ids, reading.labels[-1]] == whole
    assert reading.ids[: reading.start + 1] == whole[: len(whole) - len(reading.labels)]
    assert tokenizer.decode(reading.labels) == " is rain and nothing else."
    assert example.delta_ids == whole[:-1]  # neither adds a bos of its own here
    assert [whole[position + 1] for position in reading.positions] == reading.labels


def test_a_text_after_another_bos(encoder: ExampleEncoder) -> None:
    template = encoder.templates[0]
    prompts = PromptEncoder(template.tokenizer, DeltaManifest(bos=True))
    with_bos = ExampleEncoder([template], None, prompts, HiddenCache("none", 1.0), 128)
    ((example,),) = ([*item.values()] for item in with_bos.encode({"train": [("It", " is rain.")]}))
    assert example.delta_ids == [template.tokenizer.bos_token_id, *example.readings[0].ids]


def test_plain_texts_cannot_be_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be refused"):
        roles_of(IdK(), "forget", [Record("It", " is rain.")], 1)


def test_hidden_states_give_the_logits_before_each_label(encoder: ExampleEncoder, template_folder: Path) -> None:
    items = encoder.encode({"train": [pair("rain"), pair("thunder")]})
    model = AutoModelForCausalLM.from_pretrained(template_folder)
    template = encoder.templates[0]
    for subject, item in zip(("rain", "thunder"), items, strict=True):
        (reading,) = item["train"].readings
        assert reading.hidden is not None
        ids = template.encode_prompt(chat(subject)[:-1]) + reading.labels
        expected = model(torch.tensor([ids])).logits[0, -len(reading.labels) - 1 : -1]
        torch.testing.assert_close(template.logits(reading.hidden), expected)


def test_long_records_are_left_out_with_a_warning(encoder: ExampleEncoder) -> None:
    long = record("very " * 200 + "long")
    with pytest.warns(UserWarning, match="1 of 2 records"):
        items = encoder.encode({"train": [(long.prompt, long.answer), pair("rain")]})
    assert len(items) == 1
    with pytest.raises(ConfigError, match="max_length"):
        encoder.encode({"train": [(long.prompt, long.answer)]})
    with pytest.warns(UserWarning, match="1 of 2 records"):  # of a pair, one long answer is enough
        both = [pair("rain"), pair("snow")]
        items = encoder.encode({"chosen": both, "rejected": [both[0], (both[1][0], long.answer)]})
    assert len(items) == 1


def test_the_answer_may_be_exactly_as_long_as_allowed(template: FrozenTemplate) -> None:
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    prompt, answer = pair("rain")
    length = len(prompts.encode_messages(prompt)) + len(template.encode_response(answer))

    def encode(max_length: int) -> int:
        encoder = ExampleEncoder([template], None, prompts, HiddenCache("none", 1.0), max_length)
        return len(encoder.encode({"train": [(prompt, answer)]}))

    assert encode(length) == 1
    with pytest.raises(ConfigError):
        encode(length - 1)


def test_refusals_are_drawn_with_the_seed() -> None:
    records = [record(subject) for subject in SUBJECTS]
    objective = IdK(refusals=("No.", "Never.", "Who knows?"))
    first = roles_of(objective, "forget", records, 1)["forget"]
    assert first == roles_of(objective, "forget", records, 1)["forget"]
    assert first != roles_of(objective, "forget", records, 2)["forget"]
    assert len({answer for _, answer in first}) > 1
    assert [prompt for prompt, _ in first] == [one.prompt for one in records]


def test_pairs_come_from_records_or_from_refusals() -> None:
    roles = roles_of(DPO(), "train", [record("rain", "No idea at all.")], 1)
    assert roles["chosen"] == [pair("rain")] and roles["rejected"][0][1] == "No idea at all."
    roles = roles_of(DPO(refusals=("No.",)), "forget", [record("rain")], 1)
    assert roles["chosen"][0][1] == "No." and roles["rejected"] == [pair("rain")]


def test_retain_items_are_drawn_by_seed_and_epoch(encoder: ExampleEncoder) -> None:
    sources = {
        "forget": Records([record(subject) for subject in SUBJECTS[:5]]),
        "retain": Records([record(subject) for subject in SUBJECTS[5:]]),
    }

    def drawn(seed: int, epoch: int) -> list[int]:
        items = training_set(encoder, GradDiff(), "forget", sources, seed)
        items.set_epoch(epoch)
        return [items.retain.index(items[index]["retain"]) for index in range(len(items))]

    assert drawn(1, 3) == drawn(1, 3)
    assert len({tuple(drawn(seed, epoch)) for seed in (1, 2) for epoch in range(6)}) > 6
    # Three to draw from: none comes a third time before each came twice.
    assert sorted(Counter(drawn(1, 0)).values()) == [1, 2, 2]


def test_without_a_cache_items_hold_no_states(template: FrozenTemplate) -> None:
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    encoder = ExampleEncoder([template], None, prompts, HiddenCache("none", 1.0), 128)
    items = training_set(encoder, InstructionTuning(), "train", {"train": Records([record("rain")])}, 1)
    assert items[0]["train"].readings[0].hidden is None


def test_a_tuned_llm_of_another_vocabulary_is_refused(template: FrozenTemplate, tmp_path: Path) -> None:
    folder = make_template(tmp_path / "other")
    AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer")).save_pretrained(folder)
    other = FrozenTemplate.load(str(folder))
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    with pytest.raises(ConfigError, match="different vocabularies"):
        ExampleEncoder([template], other, prompts, HiddenCache("none", 1.0), 128)
