"""Incremental spelling equals spelling everything, for every pair of tokenizer families and for the real ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES
from transformers import PreTrainedTokenizerBase

from cmc_server.delta.continuation import read_continuation
from cmc_server.delta.spelling import DeltaInput, Speller
from cmc_server.vocab.pm_mined import MatchKind
from cmc_server.vocab.surface import load_tokenizer, load_vocabulary, read_vocabulary
from cmc_server.vocab.vocab_map import build_map

TEXTS = (
    "Hello world, it's a nice day. I've 123456 reasons, he'll say: 'don't'!  \n\n  x = y  + 3\t\n",
    "你好，世界。这是一个很长的句子没有空格也没有标点继续继续继续",
    "Привет, мир! Как дела?  مرحبا بالعالم  สวัสดีชาวโลก นี่คือข้อความ 한국어 문장입니다",
    "👩‍👩‍👧‍👦🇩🇪 emoji ✨🔥 e\u0301e\u0301 zalgo\u0300\u0301\u0302\u0303 ﬁ ①",
    'for(int i=0;i<10;++i){printf("%d\\n",i);}  <|im_end|> </s> [SEP] <0x41> <think> ▁▁',
)
PAIRS = [(user, delta) for user in FAMILIES for delta in FAMILIES]


@pytest.fixture(scope="module")
def speller(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> Callable[[str, str], Speller]:
    made: dict[tuple[str, str], Speller] = {}

    def make(user: str, delta: str) -> Speller:
        if (user, delta) not in made:
            user_vocabulary = read_vocabulary(tokenizers_by_family[user])
            tokenizer = tokenizers_by_family[delta]
            vocabulary = read_vocabulary(tokenizer)
            vocab_map = build_map(user_vocabulary, vocabulary)
            made[user, delta] = Speller(user_vocabulary, vocabulary, vocab_map, tokenizer)
        return made[user, delta]

    return make


@pytest.fixture(scope="module", params=["gemma3-smollm2", "smollm2-gemma3", "smollm2-smollm2"])
def real(request: pytest.FixtureRequest, demo_models: Any) -> tuple[Speller, PreTrainedTokenizerBase]:
    user, delta = (str(getattr(demo_models, name)) for name in request.param.split("-"))
    vocabularies = load_vocabulary(user), load_vocabulary(delta)
    made = Speller(*vocabularies, build_map(*vocabularies), load_tokenizer(delta))
    return made, load_tokenizer(user)


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_keep_their_ids_and_special_ones_are_text(
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase], family: str
) -> None:
    tokenizer = tokenizers_by_family[family]
    vocabulary = read_vocabulary(tokenizer)
    spelled = read_continuation(tokenizer, vocabulary).tokenizer
    unsaid = set(vocabulary.special_ids) - {vocabulary.unk_id}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        ids = spelled.encode(token.content, add_special_tokens=False).ids
        assert token_id in vocabulary.special_ids or ids == [token_id]
        for text in (token.content, "\U0010ffff" + token.content):
            assert not unsaid & set(spelled.encode(text, add_special_tokens=False).ids)


def assert_incremental_is_whole(speller: Speller, user_ids: list[int], sizes: list[int] | None = None) -> None:
    prompt = [1, 0]
    delta_input = DeltaInput(speller, prompt)
    done = 0
    for size in sizes or [1] * len(user_ids):
        before = list(delta_input.ids)
        keep = delta_input.extend(user_ids[done : done + size])
        done += size
        assert before[:keep] == delta_input.ids[:keep]
        assert delta_input.ids == speller.delta_input(prompt, user_ids[:done])


@pytest.mark.parametrize(("user", "delta"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tokens(speller: Callable[[str, str], Speller], user: str, delta: str, data: st.DataObject) -> None:
    made = speller(user, delta)
    # Ids beyond the vocabulary stand for padding columns of the logits.
    user_ids = data.draw(st.lists(st.integers(0, len(made.follows) + 3), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=40, max_size=40))
    assert_incremental_is_whole(made, user_ids, sizes)


@pytest.mark.parametrize(("user", "delta"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(
    speller: Callable[[str, str], Speller],
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase],
    user: str,
    delta: str,
    text: str,
) -> None:
    assert_incremental_is_whole(speller(user, delta), tokenizers_by_family[user](text)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("user", "delta"), PAIRS)
def test_written_text(
    speller: Callable[[str, str], Speller],
    tokenizers_by_family: dict[str, PreTrainedTokenizerBase],
    user: str,
    delta: str,
    text: str,
) -> None:
    assert_incremental_is_whole(speller(user, delta), tokenizers_by_family[user](text * 2)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
def test_written_text_between_real_vocabularies(real: tuple[Speller, PreTrainedTokenizerBase], text: str) -> None:
    speller, tokenizer = real
    assert_incremental_is_whole(speller, tokenizer(text * 2, add_special_tokens=False)["input_ids"])


def test_random_tokens_between_real_vocabularies(real: tuple[Speller, PreTrainedTokenizerBase]) -> None:
    speller, _ = real
    draw = random.Random(0)
    for _ in range(60):
        assert_incremental_is_whole(speller, [draw.randrange(len(speller.follows) + 9) for _ in range(30)])


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80), cut=st.integers(0, 80))
def test_any_unicode_between_real_vocabularies(
    real: tuple[Speller, PreTrainedTokenizerBase], text: str, cut: int
) -> None:
    speller, tokenizer = real
    user_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert_incremental_is_whole(speller, user_ids[cut:] + user_ids[:cut])


def test_a_long_answer_is_spelled_a_few_tokens_at_a_time(real: tuple[Speller, PreTrainedTokenizerBase]) -> None:
    """The cost per token does not grow with the length: what is encoded again stays short, in any script."""
    speller, tokenizer = real
    encoded: list[int] = []
    encode = speller.encode
    for text in (*TEXTS[:3], "31415926535897932384626433832795028841971693993751"):
        user_ids = tokenizer(text * 60, add_special_tokens=False)["input_ids"]
        delta_input = DeltaInput(speller, [])
        encoded.clear()
        speller.encode = lambda part: (encoded.append(len(part)), encode(part))[1]  # type: ignore[method-assign, func-returns-value]
        try:
            for at in range(0, len(user_ids), 2):
                delta_input.extend(user_ids[at : at + 2])
        finally:
            speller.encode = encode  # type: ignore[method-assign]
        late = encoded[len(encoded) // 2 :]
        if late:
            assert max(late) < 400
            assert sum(late) / len(late) < 2 * sum(encoded) / len(encoded)


def test_an_emoji_cut_in_the_middle(demo_models: Any) -> None:
    """Parts of a character are read as byte tokens until something has to be spelled; then it is spelled as a whole."""
    user, delta = load_vocabulary(str(demo_models.smollm2)), load_vocabulary(str(demo_models.gemma3))
    vocab_map = build_map(user, delta)
    speller = Speller(user, delta, vocab_map, load_tokenizer(str(demo_models.gemma3)))
    user_ids = load_tokenizer(str(demo_models.smollm2))("😀", add_special_tokens=False)["input_ids"]
    assert len(user_ids) > 1
    delta_input = DeltaInput(speller, [])
    read = b""
    for user_id in user_ids:
        delta_input.extend([user_id])
        read += speller.surface(user_id)
        assert delta_input.ids == [delta.byte_ids[byte] for byte in read]
    inexact = next(at for at, kind in enumerate(vocab_map.match) if kind == MatchKind.PREFIX and user.surfaces[at])
    assert delta_input.extend([inexact]) == 0
    assert delta_input.ids[0] == delta.ids_by_content["😀"]


def test_without_byte_tokens_half_a_character_is_held_back(speller: Callable[[str, str], Speller]) -> None:
    made = speller("byte_level_bpe", "wordpiece")
    ids = {made.surface(user_id): user_id for user_id in range(len(made.follows)) if made.surface(user_id)}
    first, *rest = (ids[bytes([byte])] for byte in "é".encode())
    delta_input = DeltaInput(made, [])
    delta_input.extend([first])
    assert delta_input.ids == []
    delta_input.extend(rest)
    assert delta_input.ids != []


def test_special_tokens_inside_text_are_text(
    speller: Callable[[str, str], Speller], tokenizers_by_family: dict[str, PreTrainedTokenizerBase]
) -> None:
    made = speller("byte_level_bpe", "sentencepiece_bpe")
    plain = tokenizers_by_family["byte_level_bpe"]("a</s>b", split_special_tokens=True)["input_ids"]
    assert tokenizers_by_family["sentencepiece_bpe"].eos_token_id not in made.spell(plain)
