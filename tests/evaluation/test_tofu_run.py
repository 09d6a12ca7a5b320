"""TOFU on a tiny steered model equals plain transformers and the token-by-token oracle."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_lab import Lab
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmc_server.errors import ConfigError
from cmc_server.evaluation.engine import Measurement, chat
from cmc_server.evaluation.tofu_data import TofuItem, read_tofu
from cmc_server.evaluation.tofu_run import run_tofu, set_losses
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.scoring import FusedLM


@pytest.fixture(scope="module")
def fused(lab: Lab) -> FusedLM:
    return FusedLM.load(lab.user, {"other": lab.other})


def measurement(fused: FusedLM, batch_size: int = 3) -> Measurement:
    return Measurement(fused, lambda strength: {"other": strength}, batch_size=batch_size, quiet=True)


@torch.no_grad()
def plain_loss(lab: Lab, question: str, answer: str) -> float:
    """Mean NLL of answer and eos by the loss of transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(lab.user, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(lab.user)
    prompt = tokenizer.apply_chat_template(chat(question), tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(before) + after])
    return float(model(input_ids=torch.tensor([before + after]), labels=labels).loss)


def test_losses_without_a_delta_are_those_of_transformers(lab: Lab, fused: FusedLM) -> None:
    items = read_tofu(lab.tofu)["forget"]
    for item, losses in zip(items, set_losses(measurement(fused), items, 0.0, "test"), strict=True):
        assert losses.answer == pytest.approx(plain_loss(lab, item.question, item.answer), abs=1e-4)
        assert losses.paraphrase == pytest.approx(plain_loss(lab, item.question, item.paraphrase), abs=1e-4)
        expected = [plain_loss(lab, item.question, text) for text in item.perturbed]
        assert losses.perturbed == pytest.approx(expected, abs=1e-4)


def test_losses_with_a_delta_are_those_of_the_oracle(lab: Lab, fused: FusedLM) -> None:
    oracle = ReferenceFusedLM(lab.user, {"other": lab.other})
    items = read_tofu(lab.tofu, limit=2)["forget"]
    for item, losses in zip(items, set_losses(measurement(fused), items, 1.5, "test"), strict=True):
        prompt, answer = fused.encode_prompt(chat(item.question)), measurement(fused).answer_ids(item.answer)
        delta_prompt = oracle.deltas["other"].encoder.encode_messages(chat(item.question))
        steps = oracle.steps(prompt, answer, {"other": 1.5}, delta_prompts={"other": delta_prompt})
        log_probs = [float(logits.log_softmax(-1)[token]) for logits, token in zip(steps, answer, strict=False)]
        assert losses.answer == pytest.approx(-sum(log_probs) / len(answer), abs=1e-4)


def test_a_run_holds_every_figure_whatever_the_batches(lab: Lab, fused: FusedLM) -> None:
    pytest.importorskip("rouge_score")
    sets = read_tofu(lab.tofu)
    run, again = (run_tofu(measurement(fused, size), sets, 1.0) for size in (1, 32))
    assert run.answers == again.answers
    for name, items in sets.items():
        assert len(run.answers[name]) == len(items)
        for figure in ("probability", "truth_ratio_geometric", "truth_ratio_arithmetic"):
            assert getattr(run.scores[name], figure) == pytest.approx(getattr(again.scores[name], figure), rel=1e-3)
    forget = run.scores["forget"]
    first = set_losses(measurement(fused), sets["forget"], 1.0, "test")[0]
    assert forget.probability[0] == pytest.approx(math.exp(-first.answer), rel=1e-3)


def test_answers_stay_within_the_total_length(lab: Lab, fused: FusedLM) -> None:
    pytest.importorskip("rouge_score")
    short, long = (TofuItem("a " * size, "b", "b", ("c",)) for size in (2, 40))
    run = run_tofu(measurement(fused), {"forget": [short, long]}, 0.0)
    for item, answer in zip((short, long), run.answers["forget"], strict=True):
        total = len(fused.encode_prompt(chat(item.question))) + len(fused.encode_continuation(answer))
        assert total <= 200 + 3  # characters that are incomplete at the cut become a replacement of three bytes


def test_a_question_that_leaves_no_room_is_named(fused: FusedLM) -> None:
    item = TofuItem("why " * 100, "b", "b", ("c",))
    with pytest.raises(ConfigError, match=r"no room for an answer.*why why"):
        run_tofu(measurement(fused), {"forget": [item]}, 0.0)
