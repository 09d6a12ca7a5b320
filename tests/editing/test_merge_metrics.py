"""Figures of a merge against closed forms, and through the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import weights_of
from tiny_family import Family
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmc_server.cli import main
from cmc_server.editing.merge_metrics import gradient_mismatch, relative_distance, robustness_curve


def test_relative_distance() -> None:
    merged, target, base = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), torch.tensor([-3.0, 5.0])
    assert relative_distance([(merged, target, base)]) == pytest.approx(0.75)
    assert relative_distance([(merged[:1], target[:1], base[:1]), (merged[1:], target[1:], base[1:])]) == 0.75
    assert relative_distance([(target, target, base)]) == 0
    assert relative_distance([(merged, target, target)]) == math.inf
    assert relative_distance([(target, target, target)]) == 0


def test_gradient_mismatch_of_a_quadratic() -> None:
    hessian, model, target = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 2.0])
    mismatch = gradient_mismatch([(hessian * target)[:1], (hessian * target)[1:]], [hessian[:1] * 1, hessian[1:] * 1])
    assert mismatch == pytest.approx(float((hessian * (target - model)).norm()))


def test_robustness_curve() -> None:
    curve = robustness_curve(lambda alpha: [(alpha - 1) ** 2, 1.0], [0.0, 1.0, 3.0])
    assert curve["best_alpha"] == 1.0 and curve["spread"] == 2.0
    assert [point["mean"] for point in curve["points"]] == [1.0, 0.5, 2.5]


def loss_of(folder: Path, data: Path) -> float:
    """Nats per token of plain texts, by transformers' own loss, with the token count that it averages over."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for line in data.read_text("utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_the_command_measures(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The quick brown fox jumps."}\n{"text": "Say it in one sentence."}\n', "utf-8")
    words = [*family.words("task-arithmetic", models=("one",)), "--against", str(family.folders["one"])]
    words += ["--data", str(texts), "--alphas", "0", "1", "--dry-run"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["relative_distance"] == pytest.approx(0, abs=1e-5) and metrics["gradient_mismatch"] == [0]
    at_base, at_one = (point["losses"][0] for point in metrics["robustness"]["points"])
    assert at_base == pytest.approx(loss_of(family.folders["base"], texts), rel=1e-4)
    assert metrics["losses"] == [at_one]
    assert at_one == pytest.approx(loss_of(family.folders["one"], texts), rel=1e-4)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "gradient mismatch on the data of family-one: 0\n" in shown and "best alpha" in shown


def test_the_mismatch_is_a_difference_of_gradients(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The quick brown fox jumps."}\n', "utf-8")
    words = [*family.words("task-arithmetic", models=("one",)), "--against", str(family.folders["two"])]
    capsys.readouterr()
    assert main([*words, "--data", str(texts), "--dry-run", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    gradients = []
    for name in ("two", "one"):
        model = AutoModelForCausalLM.from_pretrained(family.folders[name])
        ids = AutoTokenizer.from_pretrained(family.folders[name])("The quick brown fox jumps.", return_tensors="pt")
        model(**ids, labels=ids["input_ids"]).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert metrics["gradient_mismatch"][0] == pytest.approx(float((gradients[0] - gradients[1]).norm()), rel=1e-3)
    base, one, two = (weights_of(family.folders[name]) for name in ("base", "one", "two"))
    flat = [torch.cat([weights[name].flatten() for name in base]) for weights in (base, one, two)]
    expected = float((flat[1] - flat[2]).norm() / (flat[2] - flat[0]).norm())
    assert metrics["relative_distance"] == pytest.approx(expected, rel=1e-4)


def test_a_target_that_is_the_base(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*family.words("task-arithmetic"), "--against", str(family.folders["base"]), "--dry-run"]
    assert main(words) == 2
    assert "equals the base" in capsys.readouterr().err
