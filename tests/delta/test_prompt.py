from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_tokenizers import byte_level_bpe, sentencepiece_bpe

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.errors import DeltaError

CHAT = [{"role": "system", "content": None}, {"role": "user", "content": "Hi"}]


def encoder(**manifest: object) -> PromptEncoder:
    return PromptEncoder(byte_level_bpe(), DeltaManifest.model_validate(manifest))


def test_the_default_rendering() -> None:
    assert encoder().render(CHAT) == "<|system|>\n\n<|user|>\nHi\n<|assistant|>\n"


def test_text_parts_are_joined_and_other_parts_left_out() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    assert encoder().render([{"role": "user", "content": parts}]) == "<|user|>\na\nb\n<|assistant|>\n"


def test_a_partial_answer_stays_at_the_end() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "Hel"}]
    assert encoder().render(chat, continue_final_message=True).endswith("<|assistant|>\nHel")


def test_a_manifest_brings_its_own_template() -> None:
    own = encoder(prompt_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    assert own.render([{"role": "user", "content": "x"}]) == "[user] x "


def test_a_template_that_is_not_jinja_is_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="not valid Jinja"):
        encoder(prompt_template="{% for %}")


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(DeltaError, match="cannot render"):
        encoder(prompt_template="{{ messages.__class__.__mro__ }}").render(CHAT)


def test_bos_comes_once_and_eos_never() -> None:
    tokenizer = sentencepiece_bpe()
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    by_default = PromptEncoder(tokenizer, DeltaManifest()).encode("x")
    assert by_default.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in by_default
    without = PromptEncoder(tokenizer, DeltaManifest(bos=False)).encode("x")
    assert tokenizer.bos_token_id not in without
    written = PromptEncoder(tokenizer, DeltaManifest()).encode(f"{tokenizer.bos_token}x")
    assert written.count(tokenizer.bos_token_id) == 1


def test_a_manifest_cannot_ask_for_a_bos_that_is_not_there() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.bos_token = None
    with pytest.raises(DeltaError, match="no bos token"):
        PromptEncoder(tokenizer, DeltaManifest(bos=True))


@pytest.mark.parametrize(
    "text",
    ['{"format_version": 2}', '{"strenght": 1}', '{"advised_range": [2, 1]}', "[]", "{", '{"default_strength": 1e999}'],
)
def test_a_bad_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cmc_delta.json").write_text(text)
    with pytest.raises(DeltaError, match=r"cmc_delta\.json"):
        DeltaManifest.read(tmp_path)


def test_a_manifest_survives_writing(tmp_path: Path) -> None:
    manifest = DeltaManifest(name="x", advised_range=(0.5, 2), training={"seed": 1}, unmapped="preserve")
    manifest.write(tmp_path)
    assert DeltaManifest.read(tmp_path) == manifest
