from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cmc_server.errors import MapError
from cmc_server.vocab.special import pair_special, read_overrides, resolve_overrides
from cmc_server.vocab.surface import Vocabulary, read_vocabulary

MakeVocabulary = Callable[..., Vocabulary]


def pairs(user: Vocabulary, delta: Vocabulary) -> dict[str | None, str | None]:
    return {user.contents[token]: delta.contents[found] for token, found in pair_special(user, delta).items()}


def test_roles_pair_whatever_their_names(make_vocabulary: MakeVocabulary) -> None:
    user = make_vocabulary(["a", "<bos>", "<eos>", "<eot>", "<unk>"], bos="<bos>", eos=["<eos>", "<eot>"], unk="<unk>")
    delta = make_vocabulary(["a", "<s>", "</s>", "<0>"], bos="<s>", eos=["</s>"], unk="<0>")
    assert pairs(user, delta) == {"<bos>": "<s>", "<eos>": "</s>", "<eot>": "</s>", "<unk>": "<0>"}


def test_equal_content_comes_first(make_vocabulary: MakeVocabulary) -> None:
    user = make_vocabulary(["<end>", "<x>"], eos=["<end>"], special=["<x>"])
    delta = make_vocabulary(["</s>", "<end>", "<y>"], eos=["</s>"], special=["<end>", "<y>"])
    assert pairs(user, delta) == {"<end>": "<end>"}


def test_equal_content_counts_among_special_tokens_only(make_vocabulary: MakeVocabulary) -> None:
    # <s> is the tag of struck-out text in some vocabularies.
    user = make_vocabulary(["<s>", "</s>"], bos="<s>", eos=["</s>"])
    delta = make_vocabulary(["<s>", "</s>", "<bos>", "<eos>"], bos="<bos>", eos=["<eos>"])
    assert pairs(user, delta) == {"<s>": "<bos>", "</s>": "<eos>"}


def test_roles_that_one_side_lacks_stay_unpaired(make_vocabulary: MakeVocabulary) -> None:
    user = make_vocabulary(["<bos>", "<eos>", "<unk>", "<pad>"], bos="<bos>", eos=["<eos>"], unk="<unk>", pad="<pad>")
    assert pairs(user, make_vocabulary(["a"])) == {}
    assert pairs(make_vocabulary(["a"]), user) == {}


@pytest.mark.parametrize("role", ["bos", "eos", "unk"])
def test_pad_pairs_only_with_a_pad_of_its_own(role: str, make_vocabulary: MakeVocabulary) -> None:
    user = make_vocabulary(["<pad>"], pad="<pad>")
    assert pairs(user, make_vocabulary(["[PAD]"], pad="[PAD]")) == {"<pad>": "[PAD]"}
    other = ["<x>"] if role == "eos" else "<x>"
    assert pairs(user, make_vocabulary(["<x>"], pad="<x>", **{role: other})) == {}


def test_roles_of_a_tokenizer(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    vocabulary = read_vocabulary(tokenizers_by_family["byte_level_bpe"])
    contents = vocabulary.contents
    assert vocabulary.bos_id is not None and contents[vocabulary.bos_id] == "<|im_start|>"
    assert [contents[token] for token in vocabulary.eos_ids] == ["<|im_end|>"]
    assert vocabulary.unk_id is not None and contents[vocabulary.unk_id] == "<|endoftext|>"
    assert vocabulary.pad_id == vocabulary.eos_ids[0]


def test_ends_in_order_and_by_name(tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers_by_family["byte_level_bpe"].backend_tokenizer, eos_token="<|endoftext|>"
    )
    ids = tokenizer.get_vocab()
    config = {"eos_token_id": [ids["<|im_start|>"], ids["Ċ"], ids["    "], ids["<think>"], 10**6]}
    vocabulary = read_vocabulary(tokenizer, config)
    # Text that a config lists as an end, such as a newline, stays text; tokens known by name are ends in any case.
    ends = ["<|endoftext|>", "<|im_start|>", "<think>", "<|im_end|>"]
    assert [vocabulary.contents[token] for token in vocabulary.eos_ids] == ends
    assert vocabulary.surfaces[ids["Ċ"]] == b"\n"
    assert ids["<think>"] in vocabulary.special_ids
    assert read_vocabulary(tokenizer, {"eos_token_id": ids["<|im_start|>"]}).eos_ids[1] == ids["<|im_start|>"]


def test_demo_models(demo_vocabularies: tuple[Vocabulary, Vocabulary]) -> None:
    gemma3, smollm2 = demo_vocabularies
    found = pairs(gemma3, smollm2)
    ends = {"<eos>": "<|im_end|>", "<end_of_turn>": "<|im_end|>"}
    # SmolLM2's pad is its eos, so Gemma's pad pairs with nothing.
    assert found == {"<bos>": "<|im_start|>", "<unk>": "<|endoftext|>", **ends}
    assert gemma3.surfaces[gemma3.ids_by_content["<s>"]] == b"<s>"


def test_overrides_files(tmp_path: Path) -> None:
    expected = {"<a>": "<b>", "<c>": None}
    (tmp_path / "pairs.json").write_text('{"<a>": "<b>", "<c>": null}')
    (tmp_path / "pairs.yaml").write_text('"<a>": "<b>"\n<c>: null\n')
    assert read_overrides(tmp_path / "pairs.json") == read_overrides(tmp_path / "pairs.yaml") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("o.json", "{", "cannot be read"),
        ("o.json", "[]", "one object"),
        ("o.yaml", "a: [", "cannot be read"),
        ("o.yaml", "", "one object"),
        ("o.yaml", "yes: <a>", "text to text"),
        ("o.json", '{"<a>": 3}', "text to text"),
    ],
)
def test_broken_overrides_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MapError, match=message):
        read_overrides(tmp_path / name)


def test_missing_overrides_file(tmp_path: Path) -> None:
    with pytest.raises(MapError, match="cannot be read"):
        read_overrides(tmp_path / "none.yaml")


def test_overrides_name_what_does_not_exist(make_vocabulary: MakeVocabulary) -> None:
    user, delta = make_vocabulary(["<a>", "<b>"]), make_vocabulary(["<x>"])
    assert resolve_overrides({"<a>": "<x>", "<b>": None}, user, delta) == {0: 0, 1: -1}
    with pytest.raises(MapError, match=r"'<c>' \(user\), '<y>' \(delta\)"):
        resolve_overrides({"<c>": "<x>", "<a>": "<y>"}, user, delta)
