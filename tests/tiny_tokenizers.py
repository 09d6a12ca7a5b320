"""One small tokenizer of each family, trained on the fly: ``from tiny_tokenizers import FAMILIES``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the other foxes jumped over it too.",
    "def f(x):\n    return {'a': [1, 2, 3]}  # a comment\n\n\n\tend",
    "你好，世界！今天天气很好。 Привет, как дела? مرحبا بالعالم",
    "naïve café, coöperation, déjà vu; 1234 5678 90",
] * 3
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _fast(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def byte_level_bpe() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"]
    )
    _train(backend, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False)])
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return _fast(backend, unk_token="<|endoftext|>", **roles)


def _sentencepiece_decoder() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def _with_byte_tokens(trained: Tokenizer) -> models.BPE:
    """The trained BPE with the byte tokens behind the special ones, as SentencePiece orders them."""
    state = json.loads(trained.to_str())["model"]
    pieces = [piece for piece in state["vocab"] if piece not in SPECIAL]
    vocab = {content: token for token, content in enumerate([*SPECIAL, *BYTE_TOKENS, *pieces])}
    merges = [(left, right) for left, right in state["merges"]]
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _train(backend: Tokenizer, trainer: trainers.Trainer, corpus: Sequence[str] = CORPUS) -> Tokenizer:
    backend.train_from_iterator(corpus, trainer)
    return backend


def sentencepiece_bpe() -> PreTrainedTokenizerBase:
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=220, limit_alphabet=60, special_tokens=SPECIAL)
    trained = _train(plain, trainer, [word for line in CORPUS for word in line.split()])
    backend = Tokenizer(_with_byte_tokens(trained))
    backend.normalizer = trained.normalizer
    backend.decoder = _sentencepiece_decoder()
    return _sentencepiece(backend)


def metaspace_bpe() -> PreTrainedTokenizerBase:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    trained = _train(plain, trainers.BpeTrainer(vocab_size=200, limit_alphabet=60, special_tokens=SPECIAL))
    backend = Tokenizer(_with_byte_tokens(trained))
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _sentencepiece(backend)


def unigram() -> PreTrainedTokenizerBase:
    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    trained = _train(plain, trainer, [line for line in CORPUS if line.isascii()])
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    vocab = [(piece, score) for piece, score in pieces] + [(name, -99.0) for name in BYTE_TOKENS]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = _sentencepiece_decoder()
    return _sentencepiece(backend)


def _sentencepiece(backend: Tokenizer) -> PreTrainedTokenizerBase:
    backend.add_special_tokens(SPECIAL)
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return _fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _train(backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    return _fast(backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level_bpe": byte_level_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "metaspace_bpe": metaspace_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
