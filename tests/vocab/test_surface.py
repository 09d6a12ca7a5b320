from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cmc_server.errors import MapError
from cmc_server.vocab.surface import Vocabulary, load_tokenizer, load_vocabulary, read_vocabulary

TEXTS = [
    "Hello, world! It's a test of the tokenizer's surfaces.",
    "  leading and   runs\t\tof tabs\n\n\nnewlines \r\n end  ",
    "你好，世界！今天天气很好。",
    "Привет, как дела? Ёлка",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇫🇷 😀 naïve e\u0301 ﬁ",
    "def f(x):\n    return {'a': [1, 2, 3]}  # ok\n",
    "\x00\x01\x7f \u200b\u2028 ĠyĊ ## 123456 7.89e-10",
    "<table> <unused0 日本語 한국어 हिन्दी ไทย \U0010fffd",
]


def joined(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, text: str) -> bytes:
    surfaces = [vocabulary.surfaces[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert None not in surfaces
    return b"".join(surface for surface in surfaces if surface is not None)


def expected(text: str, family: str) -> tuple[bytes, ...]:
    """The text itself or, as SentencePiece tokenizers do, with a space in front."""
    return (text.encode(),) if family == "byte_level_bpe" else (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", ["byte_level_bpe", "sentencepiece_bpe", "metaspace_bpe", "unigram"])
def test_joined_surfaces_are_the_text(
    family: str, text: str, tokenizers_by_family: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers_by_family[family]
    assert joined(read_vocabulary(tokenizer), tokenizer, text) in expected(text, family)


@pytest.mark.parametrize("family", ["byte_level_bpe", "sentencepiece_bpe"])
def test_joined_surfaces_are_any_text(family: str, tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers_by_family[family]
    vocabulary = read_vocabulary(tokenizer)

    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
    @example("<0x41> is not a byte")
    def check(text: str) -> None:
        # A special token inside a text is not text; hypothesis hardly ever writes one.
        if not any(str(vocabulary.contents[token]) in text for token in vocabulary.special_ids):
            assert joined(vocabulary, tokenizer, text) in expected(text, family)

    check()


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real_tokenizer(request: pytest.FixtureRequest, demo_models: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(getattr(demo_models, request.param)))


def test_joined_surfaces_are_the_text_for_real_tokenizers(real_tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = read_vocabulary(real_tokenizer)
    for text in TEXTS:
        assert joined(vocabulary, real_tokenizer, text) == text.encode()


def test_one_surface_in_every_spelling(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    spellings = {"byte_level_bpe": "Ġthe", "sentencepiece_bpe": "▁the", "metaspace_bpe": "▁the", "wordpiece": "the"}
    for family, content in spellings.items():
        vocabulary = read_vocabulary(tokenizers_by_family[family])
        assert vocabulary.surfaces[vocabulary.ids_by_content[content]] == b" the"


def test_wordpiece_pieces(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers_by_family["wordpiece"]
    vocabulary = read_vocabulary(tokenizer)
    surface = {content: vocabulary.surfaces[token] for content, token in vocabulary.ids_by_content.items()}
    assert surface["##e"] == b"e"
    assert surface["a"] == b" a"
    assert surface["1"] == b" 1"
    assert surface[","] == b","
    assert surface["好"] == "好".encode()
    assert surface["，"] == "，".encode()
    assert joined(vocabulary, tokenizer, "The fox, the dog 你好") == " the fox, the dog你好".encode()


def test_byte_tokens(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    for family in ("sentencepiece_bpe", "metaspace_bpe", "unigram"):
        vocabulary = read_vocabulary(tokenizers_by_family[family])
        assert list(vocabulary.byte_ids) == list(range(256))
        for value, token in vocabulary.byte_ids.items():
            assert vocabulary.contents[token] == f"<0x{value:02X}>"
            assert vocabulary.surfaces[token] == bytes([value])
    assert read_vocabulary(tokenizers_by_family["byte_level_bpe"]).byte_ids == {}


def test_byte_tokens_flagged_special_are_text_all_the_same(
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase],
) -> None:
    backend = Tokenizer.from_str(tokenizers_by_family["metaspace_bpe"].backend_tokenizer.to_str())
    backend.add_special_tokens(["<0x0A>"])
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.surfaces[vocabulary.byte_ids[0x0A]] == b"\n"
    assert vocabulary.byte_ids[0x0A] not in vocabulary.special_ids


def test_a_complete_set_of_byte_tokens_needs_no_flag() -> None:
    names = [f"<0x{value:02X}>" for value in range(256)]
    for present in (256, 255):
        vocab = {name: token for token, name in enumerate([*names[:present], "▁a"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.decoder = decoders.Metaspace()
        vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
        assert len(vocabulary.byte_ids) == (256 if present == 256 else 0)
        assert vocabulary.surfaces[0] == (b"\x00" if present == 256 else b"<0x00>")


def test_special_tokens_have_no_surface_and_added_tokens_are_literal(
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase],
) -> None:
    vocabulary = read_vocabulary(tokenizers_by_family["byte_level_bpe"])
    special = {vocabulary.contents[token] for token in vocabulary.special_ids}
    assert special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert all(vocabulary.surfaces[token] is None for token in vocabulary.special_ids)
    assert vocabulary.surfaces[vocabulary.ids_by_content["<think>"]] == b"<think>"
    assert vocabulary.surfaces[vocabulary.ids_by_content["    "]] == b"    "
    assert vocabulary.ordinary_ids == tuple(i for i in range(vocabulary.size) if i not in vocabulary.special_ids)


def test_holes_have_neither_content_nor_surface() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    assert vocabulary.contents == ("a", None, None, "b", "[UNK]")
    assert vocabulary.surfaces == (b" a", None, None, b" b", None)


def test_word_end_marks() -> None:
    backend = Tokenizer(models.BPE(vocab={"t": 0, "he</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    assert read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend)).surfaces == (b"t", b"he ")


def _characters_only() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, " ": 1, "▁": 2}, merges=[]))


def test_without_any_spelling_the_content_is_the_text() -> None:
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=_characters_only()))
    assert vocabulary.surfaces == (b"a", b" ", "▁".encode())


def test_tokenizers_whose_text_is_unknown_are_refused() -> None:
    spaceless = _characters_only()
    spaceless.pre_tokenizer = pre_tokenizers.Whitespace()
    speech = _characters_only()
    speech.decoder = decoders.CTC()
    pattern = _characters_only()
    pattern.decoder = decoders.Replace(Regex("a+"), " ")
    for backend, message in ((spaceless, "drops spaces"), (speech, "CTC"), (pattern, "regular expression")):
        with pytest.raises(MapError, match=message):
            read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(MapError, match="no tokens"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    with pytest.raises(MapError, match="not a fast one"):
        read_vocabulary(object())


def test_fingerprint_survives_saving_and_use_and_tells_changes(
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_family["sentencepiece_bpe"]
    before = read_vocabulary(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    loaded(["a", "the fox"], padding=False, truncation=True, max_length=2)
    assert read_vocabulary(loaded).fingerprint == before.fingerprint
    with_end = read_vocabulary(loaded, {"eos_token_id": [before.ids_by_content["<unk>"]]})
    assert with_end.fingerprint == before.fingerprint
    assert with_end.roles_digest != before.roles_digest
    loaded.add_tokens(["<think>"])
    assert read_vocabulary(loaded).fingerprint != before.fingerprint


def test_load_vocabulary_reads_the_generation_config(
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = tokenizers_by_family["byte_level_bpe"]
    tokenizer.save_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    assert load_vocabulary(str(tmp_path)).eos_ids == (eos,)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, eos]}))
    assert load_vocabulary(str(tmp_path)).eos_ids == (eos, end)
    for broken in ("{", "[]", '{"eos_token_id": "x"}'):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(MapError, match=r"generation_config\.json"):
            load_vocabulary(str(tmp_path))


def test_missing_or_broken_tokenizers_are_map_errors(tmp_path: Path) -> None:
    with pytest.raises(MapError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(MapError, match="No tokenizer could be loaded from no/such"):
        load_tokenizer("no/such")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(MapError, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
