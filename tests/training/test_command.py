"""`cmc-server train` from recipe to delta folder, with everything tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cmc_server.cli import main
from cmc_server.config import DeltaSource
from cmc_server.delta.store import open_delta
from cmc_server.errors import ConfigError
from cmc_server.training.command import run_train
from cmc_server.training.curves import LOSS_CURVE
from cmc_server.training.data import file_hash
from cmc_server.vocab.surface import load_vocabulary


def test_trains_a_delta_that_can_be_served(
    recipe_file: Path, template_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(recipe_file) == 0
    folder = recipe_file.parent / "delta"
    assert capsys.readouterr().out == f"{folder}\n"

    artifact = open_delta(DeltaSource(name="tiny", path=str(folder)))
    assert artifact.tokenizer().get_vocab() and artifact.vocab_size == load_vocabulary(str(template_folder)).size
    assert load_vocabulary(str(folder)).fingerprint == load_vocabulary(str(template_folder)).fingerprint
    assert (folder / LOSS_CURVE).read_bytes().startswith(b"\x89PNG")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}

    manifest = artifact.manifest
    assert manifest.name == "tiny" and manifest.objective == "instruction_tuning"
    assert manifest.template_llm == str(template_folder)
    assert manifest.context_length is not None and manifest.context_length <= (artifact.max_positions or 0)
    training = manifest.training
    assert training["seed"] == 7 and training["steps"] == 24
    assert training["data"]["train"]["sha256"] == file_hash(recipe_file.parent / "train.jsonl")
    assert training["data"]["train"]["examples"] == 6 and training["data"]["heldout"]["examples"] == 2
    metrics = training["metrics"]
    assert metrics["train_loss"] < 0.7 * metrics["train_loss_without_delta"]
    assert metrics["heldout_loss"] < 0.9 * metrics["heldout_loss_without_delta"]


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(recipe_file: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text("utf-8")
    weights = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        recipe_file.write_text(text.replace("seed: 7", f"seed: {seed}"), "utf-8")
        run_train(recipe_file, output=tmp_path / name)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_the_recorded_loss_is_that_of_the_stored_weights(recipe_file: Path, template_folder: Path) -> None:
    run_train(recipe_file)
    folder = recipe_file.parent / "delta"
    delta = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = AutoModelForCausalLM.from_pretrained(template_folder)
    tokenizer = open_delta(DeltaSource(name="tiny", path=str(folder))).tokenizer()
    total, count = 0.0, 0
    for line in (recipe_file.parent / "heldout.jsonl").read_text("utf-8").splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        response = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        logits = torch.zeros(len(response), template.config.vocab_size)
        for model, prompt in (
            (template, f"<s>user\n{question}</s>\n<s>assistant\n"),
            (delta, f"<|user|>\n{question}\n<|assistant|>\n"),
        ):
            ids = torch.tensor([tokenizer(prompt)["input_ids"] + response])
            one = model(ids).logits[0, -len(response) - 1 : -1]
            logits[:, : one.shape[1]] += one
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    recorded = open_delta(DeltaSource(name="tiny", path=str(folder))).manifest.training["metrics"]["heldout_loss"]
    assert recorded == pytest.approx(total / count, abs=1e-3)


def test_template_and_output_can_be_given_on_the_command(
    recipe_file: Path, template_folder: Path, tmp_path: Path
) -> None:
    text = recipe_file.read_text("utf-8").replace(str(template_folder), "someone/some-model")
    recipe_file.write_text(text, "utf-8")
    options = ["--output", str(tmp_path / "other"), "--template", str(template_folder), "--restart"]
    assert main(["train", str(recipe_file), *options]) == 0
    manifest = open_delta(DeltaSource(name="tiny", path=str(tmp_path / "other"))).manifest
    assert manifest.template_llm == "someone/some-model"


def test_a_template_that_is_not_there_is_a_mistake_of_the_user(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="--template"):
        run_train(recipe_file, template="/no/such-model-anywhere")
