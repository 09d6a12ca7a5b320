"""``generate`` with the logits processor equals the oracle, token for token, greedy."""

from __future__ import annotations

import pytest
import torch
from steered import SETTINGS, Steered
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cmc_server.errors import ConfigError
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.integrations.transformers import DeltaLogitsProcessor


@pytest.fixture(scope="module")
def model(steered: Steered) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(steered.user).eval()


@pytest.fixture(scope="module")
def oracle(steered: Steered) -> ReferenceFusedLM:
    return ReferenceFusedLM(steered.user, steered.deltas)


def processor(steered: Steered, strengths: dict[str, float], **options: object) -> DeltaLogitsProcessor:
    deltas = {name: str(steered.deltas[name]) for name in strengths}
    return DeltaLogitsProcessor(str(steered.user), deltas, strengths, settings=SETTINGS, **options)  # type: ignore[arg-type]


def generate(
    model: LlamaForCausalLM, prompts: list[list[int]], made: DeltaLogitsProcessor, **options: object
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        min_new_tokens=12,
        pad_token_id=0,
        do_sample=False,
        logits_processor=[made],
        **options,
    )
    return [row[longest:] for row in output.tolist()]


@pytest.mark.parametrize("strengths", [{"same": 1.0}, {"other": 2.0}, {"words": 1.0, "other": -0.5}])
def test_batched_greedy(
    steered: Steered, model: LlamaForCausalLM, oracle: ReferenceFusedLM, strengths: dict[str, float]
) -> None:
    prompts = [[9, 40, 41, 42], [77, 78]]
    made = processor(steered, strengths, pad_token_id=0)
    for _ in range(2):
        answers = generate(model, prompts, made)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert oracle.worst_gap(prompt, answer, strengths) < 1e-3
        made.reset()


def test_beams_keep_their_own_state(steered: Steered, model: LlamaForCausalLM) -> None:
    (answer,) = generate(model, [[9, 40, 41]], processor(steered, {"other": 1.0}), num_beams=3)
    assert len(answer) == 12


def test_strength_zero_is_the_model_itself(steered: Steered, model: LlamaForCausalLM) -> None:
    plain = model.generate(torch.tensor([[9, 40]]), max_new_tokens=8, do_sample=False)
    made = processor(steered, {"same": 0.0})
    steered_ids = model.generate(torch.tensor([[9, 40]]), max_new_tokens=8, do_sample=False, logits_processor=[made])
    assert torch.equal(plain, steered_ids)


def test_chats_are_rendered_as_the_server_renders_them(
    steered: Steered, model: LlamaForCausalLM, oracle: ReferenceFusedLM
) -> None:
    chat = [{"role": "user", "content": "The quick brown fox"}]
    prompt_ids = oracle.deltas["other"].encoder.encode_messages(chat)
    made = processor(steered, {"other": 2.0}, messages=[chat])
    (answer,) = generate(model, [[9, 40, 41]], made)
    assert oracle.worst_gap([9, 40, 41], answer, {"other": 2.0}, delta_prompts={"other": prompt_ids}) < 1e-3


@pytest.mark.parametrize("number", [0, 3])
def test_chats_that_do_not_fit_the_prompts(steered: Steered, model: LlamaForCausalLM, number: int) -> None:
    chats = [[{"role": "user", "content": "The fox"}]] * number
    with pytest.raises(ConfigError, match=f"holds {number} chats for 2 rows"):
        generate(model, [[9, 40], [9, 41]], processor(steered, {"other": 2.0}, messages=chats))


def test_another_call_without_a_reset(steered: Steered, model: LlamaForCausalLM) -> None:
    made = processor(steered, {"other": 2.0})
    generate(model, [[9, 40, 41]], made)
    for prompts in ([[9, 40, 42]], [[9, 40], [9, 41]]):
        with pytest.raises(ConfigError, match=r"call reset\(\)"):
            generate(model, prompts, made)


@pytest.mark.parametrize(
    ("options", "message"), [({"unmapped": "Preserve"}, "unmapped must be"), ({}, "finite number")]
)
def test_controls_that_are_none(steered: Steered, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processor(steered, {"other": float("nan")}, **options)


def test_a_strength_for_a_delta_that_is_not_there(steered: Steered) -> None:
    with pytest.raises(ConfigError, match="nope"):
        DeltaLogitsProcessor(str(steered.user), {}, {"nope": 1.0})
