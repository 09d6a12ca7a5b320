"""The curvature that training keeps: against gradients computed otherwise, and as editing and serving read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_template import SUBJECTS, chat
from torch import nn
from torch.func import functional_call, jacrev

from cmc_server.cli import main
from cmc_server.config import DeltaSource
from cmc_server.delta.runner import DeltaRunner
from cmc_server.delta.store import content_version, open_delta
from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.curvature import CurvatureFile
from cmc_server.training.batches import Collator, TrainingSet
from cmc_server.training.command import run_train
from cmc_server.training.curvature import online_fisher, sampled_fisher, second_moments
from cmc_server.training.examples import ExampleEncoder
from cmc_server.training.output_folder import CURVATURE_FILE
from cmc_server.training.recipes import DeltaSize, Recipe
from cmc_server.training.student import Student, new_delta, vocabulary_size

Values = dict[str, Any]
SIZE = DeltaSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, initializer_range=0.3)


def run(folder: Path, values: Values, name: str, **output: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output": values["output"] | output}, sort_keys=False), "utf-8")
    assert run_train(path, output=folder / name) == 0
    return folder / name


def test_second_moments_are_a_mean_of_squared_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.unused = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    squares = []
    for _ in range(40):
        optimiser.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        squares.append(model.weight.grad.clone().square())  # type: ignore[union-attr]
        optimiser.step()
    factors = torch.tensor([0.99 ** (39 - step) for step in range(40)])
    expected = (factors[:, None, None] * torch.stack(squares)).sum(0) / factors.sum()
    moments = second_moments(optimiser, model)  # type: ignore[arg-type]
    torch.testing.assert_close(moments["weight"], expected, rtol=1e-4, atol=1e-8)
    assert not bool(moments["unused"].any())


@pytest.mark.parametrize("kind", ["optimiser", "sampled"])
def test_training_keeps_what_merges_read_and_serving_ignores(
    tmp_path: Path, recipe_values: Values, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path, recipe_values, "plain")
    delta = run(tmp_path, recipe_values, "delta", curvature=kind)
    assert not (plain / CURVATURE_FILE).exists()
    checkpoint, file = Checkpoint(delta), CurvatureFile(delta / CURVATURE_FILE)
    file.check(checkpoint, "fisher")
    assert file.origin.dataset_size == file.origin.num_examples == 6 and "steered" in file.origin.made
    stored = load_file(delta / CURVATURE_FILE)
    assert set(stored) == set(checkpoint.names) and all(bool((tensor >= 0).all()) for tensor in stored.values())
    assert all(bool(tensor.any()) for tensor in stored.values())
    # The weights are the same with and without, and what serves them sees no other file.
    first, second = load_file(plain / "model.safetensors"), load_file(delta / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    artifact = open_delta(DeltaSource(name="tiny", path=str(delta)))
    assert DeltaRunner(artifact, max_seqs=1, device=torch.device("cpu")).vocab_size == artifact.vocab_size
    assert artifact.weight_bytes == (delta / "model.safetensors").stat().st_size
    version = content_version(delta)
    (delta / CURVATURE_FILE).rename(tmp_path / "elsewhere")
    assert content_version(delta) == version
    words = ["merge", "zero", str(delta), str(delta), "--method", "fisher", "--curvature"]
    assert main([*words, *[str(tmp_path / "elsewhere")] * 2, "-o", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(merged[name].float(), second[name].float(), atol=1e-3) for name in second)


def items_of(encoder: ExampleEncoder, count: int) -> TrainingSet:
    pairs = [([chat(subject)[0]], chat(subject)[1]["content"]) for subject in SUBJECTS[:count]]
    return TrainingSet(encoder.encode({"train": pairs}))


def test_sampled_labels_give_the_fisher_of_the_steered_model(encoder: ExampleEncoder) -> None:
    """Against sum over positions and vocabulary of q (grad log q)^2, for the weights of one norm."""
    tokenizer = encoder.templates[0].tokenizer
    torch.manual_seed(0)
    student = Student(new_delta(SIZE, tokenizer, 128), vocabulary_size(tokenizer)).eval()
    collator, items = Collator(encoder.templates), items_of(encoder, 1)
    batch = collator([items[0]])
    template_logits = encoder.templates[0].logits(batch["train"]["readings"][0]["hidden"])
    inputs = {name: batch["train"][name] for name in ("input_ids", "attention_mask", "positions")}
    name = "delta.model.norm.weight"

    def log_q(weight: torch.Tensor) -> torch.Tensor:
        logits = functional_call(student, {name: weight}, ({"train": {**inputs, "readings": []}},))["train"]
        padded = nn.functional.pad(logits, (0, template_logits.shape[1] - logits.shape[1]))
        return (template_logits.float() + padded).log_softmax(-1)

    weight = student.get_parameter(name).detach()
    jacobian, q = jacrev(log_q, chunk_size=1000)(weight), log_q(weight).exp()
    expected = (q[..., None] * jacobian.square()).sum((0, 1))
    # Positions are independent given the text, so that squared sums and sums of squares agree in the mean.
    measured = sampled_fisher(student, collator, TrainingSet(list(items.items) * 3000), seed=0)["model.norm.weight"]
    torch.testing.assert_close(measured, expected, rtol=0.15, atol=0.0)


def test_second_moments_are_scaled_to_an_item(recipe_values: Values, tmp_path: Path, encoder: ExampleEncoder) -> None:
    """A softmax that does not move: B tokens a step, labels from the model, and the Fisher p (1 - p) is known."""
    recipe = Recipe(**recipe_values | {"optimisation": {"batch_size": 4}})
    items = items_of(encoder, 6)
    tokens = sum(len(item["train"].readings[0].labels) for item in items.items) / 6
    model = nn.ParameterDict({"logits": torch.tensor([0.0, 1.0, -1.0])})
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0)
    draws = torch.Generator().manual_seed(0)
    p = model["logits"].detach().softmax(-1)
    for _ in range(4000):
        labels = torch.multinomial(p, 4, replacement=True, generator=draws)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model["logits"].expand(4, 3), labels).backward()
        optimiser.step()
    online = online_fisher(recipe, optimiser, model, items)["logits"]  # type: ignore[arg-type]
    torch.testing.assert_close(online, tokens**2 * p * (1 - p), rtol=0.15, atol=0.0)
    answers = Recipe(**recipe_values | {"optimisation": {"batch_size": 4}, "objective": "dpo"})
    per_answer = online_fisher(answers, optimiser, model, items)["logits"]  # type: ignore[arg-type]
    torch.testing.assert_close(per_answer * tokens**2, online)
