"""The analysis of a loss difference: closed forms on polynomials, and a tiny LLM measured the plain way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import rewrite, weights_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmc_server.cli import main
from cmc_server.editing.riemann import loss_terms, ratio_intervals


def test_a_polynomial_by_hand() -> None:
    # phi = 2 + 3 t + 4 t^2: phi' = 3 + 8 t, and the left Riemann sum with C parts is 3 + 4 (1 - 1/C).
    terms = loss_terms(lambda t: 2 + 3 * t + 4 * t**2, parts=5)
    assert (terms.exact, terms.first_order, terms.second_order) == pytest.approx((7, 3, 4))
    assert terms.riemann == pytest.approx(3 + 4 * 0.8)
    assert loss_terms(lambda t: 2 + 3 * t).second_order == 0


def test_more_parts_come_closer() -> None:
    gaps = []
    for parts in (5, 50, 500):
        terms = loss_terms(lambda t: torch.exp(-t) * torch.sin(3 * t), parts)
        gaps.append(abs(terms.riemann - terms.exact))
    assert gaps[0] > 9 * gaps[1] > 81 * gaps[2]


def test_intervals_are_those_of_a_ratio() -> None:
    sums, weights = np.array([[10.0, 0.0], [10.0, 9.0]]), np.array([1.0, 9.0])
    mean, low, high = ratio_intervals(sums, weights)
    assert mean.tolist() == [2, 0.9]
    assert low == pytest.approx([10 / 9, 0]) and high == pytest.approx([10, 1])
    wide = ratio_intervals(np.repeat([[0.0], [1.0]], 100, axis=0), np.ones(200))
    assert float(wide[2, 0] - wide[1, 0]) == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)


def mean_loss(folder: Path, weights: dict[str, Tensor], data: Path) -> float:
    """NLL in nats per token, in float64 and with labels laid out by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    total, count = 0.0, 0
    for line in data.read_text("utf-8").splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"]).input_ids if "prompt" in record else []
        answer = tokenizer(record.get("response", record.get("text"))).input_ids
        ids = prompt + answer + ([tokenizer.eos_token_id] if prompt else [])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for place in range(max(1, len(prompt)), len(ids)):
            total -= float(logits[place - 1].log_softmax(-1)[ids[place]])
            count += 1
    return total / count


def analyse(base: Path, post: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    words = ["edit", str(base), str(post), "--analyse", str(data), "--dry-run", "--json", *more]
    assert main(words) == 0
    analysis: dict[str, object] = json.loads(capsys.readouterr().out)["analysis"]
    return analysis


def test_the_exact_difference_is_that_of_two_models(
    base: Path, post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = analyse(base, post, data, capsys, "--method", "expo", "--alpha", "-0.5")
    edited = tmp_path / "edited"
    assert main(["edit", str(base), str(post), "--method", "expo", "--alpha", "-0.5", "-o", str(edited)]) == 0
    before, after = weights_of(post), weights_of(edited)
    plain = mean_loss(post, after, data) - mean_loss(post, before, data)
    total = analysis["total"]
    assert total["exact"]["mean"] == pytest.approx(plain, abs=1e-6)
    assert total["exact"]["low"] <= total["exact"]["mean"] <= total["exact"]["high"]
    assert set(analysis["tensors"]) == {name for name in before if not torch.equal(before[name], after[name])}
    name = "model.layers.1.mlp.down_proj.weight"
    alone = mean_loss(post, before | {name: after[name]}, data) - mean_loss(post, before, data)
    assert analysis["tensors"][name]["exact"]["mean"] == pytest.approx(alone, abs=1e-6)
    tensors = sum(summary["exact"]["mean"] for summary in analysis["tensors"].values())
    assert analysis["interaction"] == pytest.approx(total["exact"]["mean"] - tensors)


def test_the_terms_are_derivatives_along_the_edit(
    base: Path, post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As float32, so that the edit is not rounded away from a straight line.
    for folder in (base, post):
        rewrite(folder, lambda weights: {name: tensor.float() for name, tensor in weights.items()})
    total = analyse(base, post, data, capsys, "--method", "expo", "--alpha", "0.8")["total"]
    first, second = weights_of(base), weights_of(post)

    def loss(t: float) -> float:
        change = {name: 0.8 * (second[name].double() - first[name].double()) for name in first}
        return mean_loss(post, {name: second[name].double() + t * change[name] for name in first}, data)

    step = 1e-2
    losses = {t: loss(t) for t in (-step, 0.0, step, 1.0)}
    assert total["exact"]["mean"] == pytest.approx(losses[1.0] - losses[0.0], abs=1e-6)
    slope = (losses[step] - losses[-step]) / (2 * step)
    assert total["first_order"]["mean"] == pytest.approx(slope, abs=1e-4, rel=1e-2)
    curvature = (losses[step] - 2 * losses[0.0] + losses[-step]) / step**2
    assert total["second_order"]["mean"] == pytest.approx(curvature / 2, abs=5e-3, rel=0.05)
    slopes = [(loss(t + step) - loss(t - step)) / (2 * step) for t in (0, 0.2, 0.4, 0.6, 0.8)]
    assert total["riemann"]["mean"] == pytest.approx(np.mean(slopes), abs=1e-4, rel=1e-2)


def test_the_spread_over_masks(base: Path, post: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--method", "dare", "--drop", "0.5", "--analyse-examples", "2", "--only", "*o_proj*", "--mask-seeds", "40"]
    analysis = analyse(base, post, data, capsys, *more)
    masks = analysis["masks"]
    assert analysis["examples"] == 2 and masks["seeds"] == 40
    expected = masks["first_order_standard_deviation_expected"]
    assert masks["standard_deviation"]["first_order"] == pytest.approx(expected, rel=0.4)
    assert abs(masks["mean"]["first_order"]["mean"]) < 4 * expected / math.sqrt(40)


def test_the_table_is_for_people(base: Path, post: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["edit", str(base), str(post), "--method", "dare", "--only", "lm_head*", "--mask-seeds", "2"]
    assert main([*words, "--analyse", str(data), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "lm_head.weight",
        "all together",
        "riemann",
        "second order",
        "edit intensity (k - 1)^2 p / (1 - p): 9",
        "gradient predicts",
        "nothing was",
        "1 tensors (20 copied)",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "data.jsonl, line 2: expected"),
        ('{"prompt": "x"}', "data.jsonl, line 2: expected"),
        ('{"text": "  "}', "data.jsonl, line 2: expected"),
        ('{"prompt": 3, "response": "x"}', "data.jsonl, line 2: expected"),
    ],
)
def test_broken_data(
    base: Path, post: Path, data: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    data.write_text('{"text": "one two three"}\n' + line + "\n", "utf-8")
    assert main(["edit", str(base), str(post), "--method", "expo", "--analyse", str(data), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
