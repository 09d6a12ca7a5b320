"""The frozen template LLM: its hidden states in batches against one by one, its fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cmc_server.errors import ConfigError
from cmc_server.training import template as template_module
from cmc_server.training.template import FrozenTemplate


def test_batches_give_the_states_of_one_by_one(
    template: FrozenTemplate, template_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_module, "TOKENS_PER_BATCH", 60)
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 300, (n,), generator=draw).tolist() for n in (5, 31, 9, 17, 30, 2, 9)]
    starts = [2, 30, 0, 5, 12, 1, 8]
    found = dict(template.hidden_states(sequences, starts))
    model = AutoModelForCausalLM.from_pretrained(template_folder)
    assert sorted(found) == list(range(7))
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        with torch.no_grad():
            expected = model.base_model(torch.tensor([ids])).last_hidden_state[0, start:]
            torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=1e-5)
            logits = model(torch.tensor([ids])).logits[0, start:]
            torch.testing.assert_close(template.logits(found[index]), logits, atol=1e-5, rtol=1e-4)


def test_the_fingerprint_follows_weights_and_configuration_alone(template_folder: Path) -> None:
    first, second = (FrozenTemplate.load(str(template_folder)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    third = FrozenTemplate.load(str(template_folder))
    with torch.no_grad():
        third.model.get_output_embeddings().weight[3, 3] += 1e-3
    assert third.fingerprint != first.fingerprint
    fourth = FrozenTemplate.load(str(template_folder))
    fourth.model.config.rms_norm_eps = 1e-3
    assert fourth.fingerprint != first.fingerprint


def test_a_template_without_a_chat_template_is_refused(template: FrozenTemplate) -> None:
    tokenizer = template.tokenizer.__class__(tokenizer_object=template.tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="chat template"):
        FrozenTemplate(template.model, tokenizer)


def test_a_template_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--template"):
        FrozenTemplate.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for message in messages %}", "Unexpected end"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ nothing.of_the_kind }}", "undefined"),
    ],
)
def test_a_chat_template_that_fails_names_the_record(template_folder: Path, source: str, reason: str) -> None:
    template = FrozenTemplate.load(str(template_folder))
    template.tokenizer.chat_template = source
    with pytest.raises(ConfigError, match=rf"begins with 'What is rain\?' \(.*{reason}") as caught:
        template.encode([{"role": "user", "content": "What is rain?"}], "It is rain.")
    assert "\n" not in str(caught.value) and str(template_folder) in str(caught.value)
