"""Whole runs of every kind, with everything tiny."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import make_delta, make_tokenizer
from tiny_template import SUBJECTS, chat, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.errors import ConfigError
from cmc_server.training.command import run_train

Values = dict[str, Any]


def run(folder: Path, values: Values, name: str = "delta", **options: Any) -> Values:
    """Train, and return the manifest as it is stored."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    assert run_train(path, output=folder / name, **options) == 0
    manifest: Values = json.loads((folder / name / "cmc_delta.json").read_text("utf-8"))
    return manifest


def weights(folder: Path, name: str = "delta") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_gradient_difference_forgets_and_retains(tmp_path: Path, unlearning_values: Values) -> None:
    unlearning_values["optimisation"] |= {"epochs": 80, "batch_size": 1}
    manifest = run(tmp_path, unlearning_values | {"objective": {"name": "grad_diff", "retain_weight": 2.0}})
    training = manifest["training"]
    assert training["objective"] == {"name": "grad_diff", "forget_bound": 8.0, "retain_weight": 2.0}
    metrics = training["metrics"]
    assert metrics["train_forget"] < metrics["train_forget_without_delta"] < 0
    assert 0 < metrics["train_retain"] < metrics["train_retain_without_delta"]
    assert metrics["train_loss"] == pytest.approx(metrics["train_forget"] + 2 * metrics["train_retain"], abs=2e-4)
    assert training["data"]["forget"]["examples"] == 2 and training["data"]["retain"]["examples"] == 6
    assert len(training["templates"][0]["weights_sha256"]) == 64
    assert manifest["objective"] == "grad_diff"


@pytest.mark.parametrize("name", ["grad_ascent", "kl_retain", "npo", "idk", "dpo"])
def test_every_unlearning_objective_gets_smaller(tmp_path: Path, unlearning_values: Values, name: str) -> None:
    if name == "grad_ascent":
        del unlearning_values["data"]["retain"]
    unlearning_values["optimisation"] |= {"epochs": 12}
    metrics = run(tmp_path, unlearning_values | {"objective": name})["training"]["metrics"]
    assert metrics["train_loss"] < metrics["train_loss_without_delta"]
    assert all(math.isfinite(value) for value in metrics.values())


def test_preference_pairs(tmp_path: Path, recipe_values: Values) -> None:
    pairs = [
        {"prompt": f"What is {subject}?", "chosen": "It is.", "rejected": chat(subject)[1]["content"]}
        for subject in SUBJECTS
    ]
    write_jsonl(tmp_path / "train.jsonl", pairs[:6])
    write_jsonl(tmp_path / "heldout.jsonl", pairs[6:])
    metrics = run(tmp_path, recipe_values | {"objective": {"name": "dpo", "beta": 0.5}})["training"]["metrics"]
    assert metrics["train_loss_without_delta"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["train_loss"] < 0.1 and metrics["heldout_loss"] < math.log(2)


def test_distilling_a_shift(tmp_path: Path, recipe_values: Values, template_folder: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(template_folder, tuned)
    model = AutoModelForCausalLM.from_pretrained(template_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(tuned)
    manifest = run(tmp_path, recipe_values | {"objective": {"name": "logit_shift", "tuned": "tuned"}})
    metrics = manifest["training"]["metrics"]
    assert 0 < metrics["train_loss"] < 0.5 * metrics["train_loss_without_delta"]
    assert [one["name"] for one in manifest["training"]["templates"]] == [str(template_folder), "tuned"]


def test_the_pull_towards_the_template_keeps_the_shift_smaller(tmp_path: Path, recipe_values: Values) -> None:
    losses = []
    for weight in (0.0, 0.5):
        objective = {"name": "instruction_tuning", "template_weight": weight}
        metrics = run(tmp_path, recipe_values | {"objective": objective})["training"]["metrics"]
        losses.append((metrics["train_loss"], metrics["train_loss_without_delta"]))
    assert losses[0][0] < losses[1][0] < losses[1][1] == losses[0][1]  # measured without the pull


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_the_cache_changes_nothing(tmp_path: Path, unlearning_values: Values, cache: str) -> None:
    run(tmp_path, unlearning_values, "memory")
    data = unlearning_values["data"] | {"cache": cache} | ({"cache_folder": "kept"} if cache == "disk" else {})
    run(tmp_path, unlearning_values | {"data": data}, cache)
    kept, other = weights(tmp_path, "memory"), weights(tmp_path, cache)
    if cache == "disk":
        assert equal(kept, other) and len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    else:  # other batches over the template LLM: equal but for rounding
        for name in kept:
            torch.testing.assert_close(kept[name], other[name], atol=2e-3, rtol=2e-2)


def test_a_budget_that_is_too_small_is_refused_before_training(tmp_path: Path, recipe_values: Values) -> None:
    recipe_values["data"]["cache_budget_gib"] = 1e-6
    with pytest.raises(ConfigError, match="cache_budget_gib"):
        run(tmp_path, recipe_values)


def test_two_templates_of_one_vocabulary(tmp_path: Path, recipe_values: Values, template_folder: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(template_folder, other)
    model = AutoModelForCausalLM.from_pretrained(template_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-3.0)
    model.save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(other)  # it ends its answers with another token
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(other)
    manifest = run(tmp_path, recipe_values | {"template": [str(template_folder), "other"]}, "both")
    assert manifest["template_llm"] == f"{template_folder}, other"
    alone = [
        run(tmp_path, recipe_values | {"template": path}, f"alone-{index}")["training"]["metrics"]
        for index, path in enumerate((str(template_folder), "other"))
    ]
    both = manifest["training"]["metrics"]
    mean = sum(metrics["train_loss_without_delta"] for metrics in alone) / 2
    assert both["train_loss_without_delta"] == pytest.approx(mean, abs=2e-4)
    assert both["train_loss"] < 0.8 * mean
    twice = run(tmp_path, recipe_values | {"template": [str(template_folder)] * 2}, "twice")["training"]["metrics"]
    assert twice["train_loss"] == pytest.approx(alone[0]["train_loss"], abs=1e-3)


def test_templates_on_the_command_must_be_as_many(tmp_path: Path, recipe_values: Values) -> None:
    with pytest.raises(ConfigError, match="1 templates"):
        run(tmp_path, recipe_values, template=["a", "b"])


def test_starting_from_a_model(tmp_path: Path, recipe_values: Values, template_folder: Path) -> None:
    make_delta(tmp_path / "start", template_folder, hidden=16, layers=1)
    recipe_values["optimisation"] |= {"epochs": 1, "learning_rate": 1e-9}
    run(tmp_path, recipe_values | {"delta": {"start_from": "start"}, "output": {"folder": "x", "dtype": "float32"}})
    found, expected = weights(tmp_path), weights(tmp_path, "start")
    assert set(found) == set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, recipe_values: Values, template_folder: Path) -> None:
    other = make_delta(tmp_path / "other", make_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match=r"vocabulary of delta\.start_from .*template with the delta's vocabulary"):
        run(tmp_path, recipe_values | {"delta": {"start_from": str(other)}})
    with pytest.raises(ConfigError, match=r"start_from ./nowhere cannot be loaded"):
        run(tmp_path, recipe_values | {"delta": {"start_from": "./nowhere"}})
    short = make_delta(tmp_path / "short", template_folder)
    recipe_values["data"]["max_length"] = 513
    with pytest.raises(ConfigError, match="512 tokens; lower"):
        run(tmp_path, recipe_values | {"delta": {"start_from": str(short)}})


def test_a_start_with_scaled_logits_is_refused(tmp_path: Path, recipe_values: Values, template_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(template_folder)
    config = CohereConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.1,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path / "scaled")
    tokenizer.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConfigError, match=r"scaled \(cohere\) changes its logits after the output head"):
        run(tmp_path, recipe_values | {"delta": {"start_from": "./scaled"}})


def test_accumulated_batches_are_one_step(tmp_path: Path, recipe_values: Values) -> None:
    recipe_values["optimisation"] |= {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 3}
    assert run(tmp_path, recipe_values)["training"]["steps"] == 2
    recipe_values["optimisation"] |= {"batch_size": 6, "gradient_accumulation_steps": 1}
    assert run(tmp_path, recipe_values, "whole")["training"]["steps"] == 2
    # All answers have nearly the same length, so that the mean of means is nearly the mean.
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(tmp_path, "whole")[name], atol=5e-3, rtol=0)


def test_bf16_computes_beside_float32_weights(tmp_path: Path, recipe_values: Values) -> None:
    recipe_values["output"]["dtype"] = "float32"
    recipe_values["optimisation"] |= {"mixed_precision": "bf16"}
    metrics = run(tmp_path, recipe_values)["training"]["metrics"]
    assert metrics["train_loss"] < 0.7 * metrics["train_loss_without_delta"]
    tensors = weights(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path, recipe_values: Values) -> None:
    recipe_values["optimisation"]["mixed_precision"] = "fp16"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        run(tmp_path, recipe_values)


def test_the_prompt_template_of_the_output_is_trained_with(tmp_path: Path, recipe_values: Values) -> None:
    own = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    recipe_values["output"]["prompt_template"] = own
    manifest = run(tmp_path, recipe_values)
    assert manifest["prompt_template"] == own and DeltaManifest.read(tmp_path / "delta").prompt_template == own
    plain = recipe_values | {"output": {"folder": "x", "dtype": "float16"}}
    assert run(tmp_path, plain, "plain")["context_length"] > manifest["context_length"]
    assert not equal(weights(tmp_path), weights(tmp_path, "plain"))


def test_an_unfinished_run_of_another_recipe_is_not_continued(tmp_path: Path, recipe_values: Values) -> None:
    work = tmp_path / ".delta.training"
    (work / "checkpoint-4").mkdir(parents=True)
    (work / "checkpoint-4" / "trainer_state.json").write_text("{}", "utf-8")
    (work / "run.json").write_text('{"run": "other"}', "utf-8")
    with pytest.raises(ConfigError, match="--restart"):
        run(tmp_path, recipe_values)
    run(tmp_path, recipe_values, restart=True)
    assert not work.exists()


@pytest.mark.slow
def test_a_dataset_is_trained_on(tmp_path: Path, recipe_values: Values) -> None:
    (tmp_path / "weather").mkdir()
    rows = [{"question": f"What is {subject}?", "answer": f"It is {subject}."} for subject in SUBJECTS]
    write_jsonl(tmp_path / "weather" / "train.jsonl", rows)
    columns = {"prompt": "question", "response": "answer"}
    data = {"train": {"dataset": "weather", "split": "train[:6]", "columns": columns}, "max_length": 128}
    found = run(tmp_path, recipe_values | {"data": data})["training"]["data"]["train"]
    assert found["dataset"] == "weather" and found["examples"] == 6
