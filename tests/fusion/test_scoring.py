"""Scores equal the token-by-token oracle: tiny models of unequal vocabularies, then the real ones."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import Steered
from tiny_template import make_template
from transformers import AutoTokenizer

import cmc_server.demo
from cmc_server.config import Unmapped
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import Message
from cmc_server.errors import ConfigError
from cmc_server.fusion import generation, scoring, states
from cmc_server.fusion.encoding import Chat
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.scoring import FusedLM, Pair

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
STRENGTHS = [{}, {"same": 1.0}, {"other": 2.0}, {"words": 1.0, "other": -0.5}, {"same": 0.0, "other": 1.0}]
TEXTS = (
    " jumps over the lazy dog, again and again.",
    "naïve café déjà vu 👩‍👩‍👧‍👦🇩🇪 e\u0301 你好，世界！ Привет, как дела? مرحبا",
    "\tfor (i = 0; i < 10; ++i)\n\n\n    {x['a'] += 1;}  <|im_end|> <think>",
)
CHAT: list[Message] = [{"role": "user", "content": "What is rain?"}]


@pytest.fixture(scope="module")
def fused(steered: Steered) -> FusedLM:
    """Keeps no states, so that every test computes what it compares."""
    fused = FusedLM.load(steered.user, steered.deltas)
    for model in (fused.model, *(delta.model for delta in fused.loaded.values())):
        model.kept_bytes = 0
    return fused


@pytest.fixture(scope="module")
def oracle(steered: Steered) -> ReferenceFusedLM:
    return ReferenceFusedLM(steered.user, steered.deltas)


def by_oracle(
    oracle: ReferenceFusedLM,
    prompt: Sequence[int],
    response: Sequence[int],
    strengths: dict[str, float],
    unmapped: Unmapped = "zero",
    delta_prompts: dict[str, list[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and whether it is the best one, one step after the other."""
    steps = oracle.steps(prompt, response, strengths, delta_prompts=delta_prompts, unmapped=unmapped)
    rows = [(logits.log_softmax(-1)[token], logits.argmax() == token) for logits, token in zip(steps, response)]  # noqa: B905
    return torch.tensor([row[0] for row in rows]), torch.tensor([bool(row[1]) for row in rows], dtype=torch.bool)


def assert_oracle(
    fused: FusedLM,
    oracle: ReferenceFusedLM,
    pairs: Sequence[Pair],
    strengths: dict[str, float],
    unmapped: Unmapped = "zero",
) -> None:
    found = fused.token_scores(pairs, strengths, unmapped=unmapped)
    assert len(found) == len(pairs)
    for scores, (prompt, text) in zip(found, pairs, strict=True):
        response = fused.encode_continuation(text)
        log_probs, greedy = by_oracle(oracle, fused.encode_prompt(prompt), response, strengths, unmapped)
        torch.testing.assert_close(scores.log_probs, log_probs, **TOLERANCE)
        assert torch.equal(scores.greedy, greedy)
        assert scores.log_probs.dtype == torch.float32


@pytest.mark.parametrize("unmapped", ["zero", "preserve"])
@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_texts(fused: FusedLM, oracle: ReferenceFusedLM, strengths: dict[str, float], unmapped: Unmapped) -> None:
    pairs: list[Pair] = [("The quick brown fox", text) for text in TEXTS] + [("Привет", ""), ("1", "2")]
    assert_oracle(fused, oracle, pairs, strengths, unmapped)


def test_the_manifest_decides_about_unmapped_tokens(steered: Steered, fused: FusedLM, tmp_path: Path) -> None:
    shutil.copytree(steered.deltas["words"], tmp_path / "words")
    manifest = DeltaManifest.read(tmp_path / "words").model_copy(update={"unmapped": "preserve"})
    manifest.write(tmp_path / "words")
    own, strengths = FusedLM.load(steered.user, {"words": tmp_path / "words"}), {"words": 2.0}
    pair: Pair = ("The quick brown fox", TEXTS[0])
    preserved = fused.score(*pair, strengths, unmapped="preserve")
    assert torch.equal(own.score(*pair, strengths), preserved)
    assert not torch.allclose(fused.score(*pair, strengths), preserved)  # its manifest says nothing: zero
    assert torch.equal(own.score(*pair, strengths, unmapped="zero"), fused.score(*pair, strengths))
    assert torch.equal(own.step_logits(pair, strengths), fused.step_logits(pair, strengths, unmapped="preserve"))
    answers = own.generate([pair[0]], strengths, max_tokens=12)
    assert answers == fused.generate([pair[0]], strengths, max_tokens=12, unmapped="preserve")


def test_the_texts_force_spelling_anew(fused: FusedLM) -> None:
    delta = fused.loaded["other"]
    continuation = fused.encode_continuation(TEXTS[1])
    stretches = delta.stretches(delta.prompt_ids("1", fused.encode_prompt("1")), continuation)
    assert 1 < len(stretches) < len(continuation)


def test_any_tokens_beyond_the_window(fused: FusedLM, oracle: ReferenceFusedLM) -> None:
    """The context of ``other`` is 48: the window moves several times, and one prompt begins beyond it."""
    draw = random.Random(0)
    size = fused.vocabulary.size
    lengths = ((5, 90), (130, 20), (1, 1), (40, 0), (17, 45))
    pairs: list[Pair] = [
        ([draw.randrange(size) for _ in range(prompt)], [draw.randrange(size) for _ in range(response)])
        for prompt, response in lengths
    ]
    assert_oracle(fused, oracle, pairs, {"other": 1.0, "words": 0.5})


def test_a_prompt_that_the_delta_does_not_read(fused: FusedLM, oracle: ReferenceFusedLM) -> None:
    """``words`` has no bos, and drops that of the user LLM: there is nothing to read before the first step."""
    assert fused.vocabulary.bos_id is not None
    prompt = [fused.vocabulary.bos_id]
    delta = fused.loaded["words"]
    assert delta.prompt_ids(prompt, prompt) == []
    for unmapped in ("zero", "preserve"):
        assert_oracle(fused, oracle, [(prompt, TEXTS[0])], {"words": 1.0}, unmapped)


def test_small_budgets_change_nothing(fused: FusedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[Pair] = [("The quick", text) for text in TEXTS] * 2 + [("Say it in one sentence", "!")]
    whole = fused.score_batch(pairs, {"other": 1.0})
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 1)
    monkeypatch.setattr(scoring, "GROUP_TOKENS", 40)
    monkeypatch.setattr(states, "MAX_TOKENS", 30)
    for one, other in zip(whole, fused.score_batch(pairs, {"other": 1.0}), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_kept_states_change_nothing(fused: FusedLM, steered: Steered) -> None:
    pairs: list[Pair] = [("The quick", text) for text in TEXTS]
    keeping = FusedLM.load(steered.user, steered.deltas)
    for strength in (0.0, 1.0, 1.0, -0.5):
        kept = keeping.score_batch(pairs, {"other": strength})
        for one, other in zip(kept, fused.score_batch(pairs, {"other": strength}), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_strength_zero_is_the_model_itself(fused: FusedLM) -> None:
    pairs: list[Pair] = [("The quick", TEXTS[0]), ("It", " is")]
    for off, base in zip(fused.score_batch(pairs, {"other": 0.0}), fused.score_batch(pairs, {}), strict=True):
        assert torch.equal(off, base)
    ids = fused.encode_prompt("The quick") + fused.encode_continuation(TEXTS[0])
    start = len(fused.encode_prompt("The quick"))
    logits = fused.model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    plain = logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    torch.testing.assert_close(fused.score("The quick", TEXTS[0], {}), plain, **TOLERANCE)


def test_one_is_what_it_is_in_a_batch(fused: FusedLM) -> None:
    alone = fused.score("The quick", TEXTS[1], {"other": 1.0})
    batched = fused.score_batch([("x", TEXTS[2]), ("The quick", TEXTS[1])], {"other": 1.0})[1]
    torch.testing.assert_close(alone, batched, **TOLERANCE)
    assert fused.score_batch([], {"other": 1.0}) == []


def test_each_reads_a_chat_in_its_own_template(steered: Steered, tmp_path: Path) -> None:
    user = make_template(tmp_path)
    fused, oracle = FusedLM.load(user, steered.deltas), ReferenceFusedLM(user, steered.deltas)
    strengths = {"other": 1.0, "words": 0.5}
    prompt = fused.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    prompt_ids = fused.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    delta_prompts = {name: oracle.deltas[name].encoder.encode_messages(CHAT) for name in strengths}
    response = fused.encode_continuation("It is rain.</s>")
    assert response[-1] == fused.tokenizer.eos_token_id
    expected, _ = by_oracle(oracle, prompt_ids, response, strengths, delta_prompts=delta_prompts)
    torch.testing.assert_close(fused.score(CHAT, "It is rain.</s>", strengths), expected, **TOLERANCE)
    answer = oracle.generate(prompt_ids, strengths, max_tokens=6, delta_prompts=delta_prompts)
    assert fused.generate([CHAT], strengths, max_tokens=6, stop_ids=[]) == [
        fused.tokenizer.decode(answer, skip_special_tokens=True)
    ]


def test_the_beginning_of_an_answer(steered: Steered, tmp_path: Path) -> None:
    user = make_template(tmp_path)
    # A template that ends a turn behind its content, and so can be continued.
    tokenizer = AutoTokenizer.from_pretrained(user)
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(user)
    fused, oracle = FusedLM.load(user, {"other": steered.deltas["other"]}), ReferenceFusedLM(user, steered.deltas)
    chat = Chat([*CHAT, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    assert fused.render(chat) == "<s>What is rain?</s><s>It is"
    prompt_ids = oracle.deltas["other"].encoder.encode_messages(chat.messages, continue_final_message=True)
    expected, _ = by_oracle(
        oracle,
        fused.tokenizer("<s>What is rain?</s><s>It is", add_special_tokens=False)["input_ids"],
        fused.encode_continuation(" rain."),
        {"other": 1.0},
        delta_prompts={"other": prompt_ids},
    )
    torch.testing.assert_close(fused.score(chat, " rain.", {"other": 1.0}), expected, **TOLERANCE)


def test_controls_that_are_none(steered: Steered, fused: FusedLM) -> None:
    with pytest.raises(ConfigError, match="unmapped must be 'zero' or 'preserve', not 'Preserve'"):
        fused.score("The", " fox", {}, unmapped="Preserve")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="it must be a number from -1000 to 1000"):
        fused.score("The", " fox", {"same": 1e9})
    with pytest.raises(ConfigError, match="name"):
        fused.with_deltas({"not a name": steered.deltas["same"]})


def test_a_chat_without_a_template(fused: FusedLM) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        fused.score(CHAT, "x", {})


def test_bfloat16(steered: Steered, fused: FusedLM) -> None:
    """Everything runs in the type asked for; the scores stay float32 and near those of float32."""
    low = FusedLM.load(steered.user, {"other": steered.deltas["other"]}, dtype="bfloat16")
    scores = low.score("The quick", TEXTS[0], {"other": 0.5}, unmapped="preserve")
    assert scores.dtype == torch.float32
    exact = fused.score("The quick", TEXTS[0], {"other": 0.5}, unmapped="preserve")
    assert float((scores - exact).abs().mean()) < 0.2
    assert low.generate(["The quick"], {"other": 0.5}, max_tokens=3, stop_ids=[]) != [""]


class TestGenerate:
    """Batched greedy decoding; every token is the oracle's best."""

    @pytest.mark.parametrize("strengths", [{}, {"other": 2.0}, {"words": 1.0, "same": -0.5}], ids=str)
    def test_equals_the_oracle(
        self, fused: FusedLM, oracle: ReferenceFusedLM, strengths: dict[str, float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "GENERATED_ROWS", 3)
        prompts = ["The quick brown fox", "1", "Привет", "x = y", "It"]
        answers = fused.generate(prompts, strengths, max_tokens=9)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = oracle.generate(
                fused.encode_prompt(prompt), strengths, max_tokens=9, end_ids=fused.vocabulary.eos_ids
            )
            assert answer == fused.tokenizer.decode(ids, skip_special_tokens=True)

    def test_answers_that_end_early_leave_the_batch(
        self, fused: FusedLM, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some answers end at once, some late, and those that go on are the oracle's to their end."""
        left: list[int] = []
        select = generation._Feeder.select
        monkeypatch.setattr(
            generation._Feeder, "select", lambda self, rows: (left.append(len(rows)), select(self, rows))[1]
        )
        prompts, strengths = ["The quick brown fox", "1", "Привет", "x = y", "It", "a", "The", "of"], {"other": 2.0}
        whole = [oracle.generate(fused.encode_prompt(one), strengths, max_tokens=9, end_ids=()) for one in prompts]
        ends = [whole[0][0], whole[1][1], whole[2][3], whole[4][5]]
        answers = fused.generate(prompts, strengths, max_tokens=9, stop_ids=ends)
        lengths = [next((at for at, one in enumerate(ids) if one in ends), len(ids)) for ids in whole]
        assert len(set(lengths)) > 2 and left
        for ids, length, answer in zip(whole, lengths, answers, strict=True):
            assert answer == fused.tokenizer.decode(ids[:length], skip_special_tokens=True)

    def test_other_deltas_beside_the_same_user_llm(self, steered: Steered, fused: FusedLM) -> None:
        bare = FusedLM.load(steered.user, {})
        other = bare.with_deltas({"other": steered.deltas["other"]})
        assert bare.deltas == () and other.deltas == ("other",) and other.model is bare.model
        expected = fused.score("The quick", TEXTS[0], {"other": 0.5})
        torch.testing.assert_close(other.score("The quick", TEXTS[0], {"other": 0.5}), expected)

    def test_ends(self, fused: FusedLM) -> None:
        (whole,) = fused.generate(["The"], {"other": 1.0}, max_tokens=40, stop_ids=[])
        # A random model writes broken characters, which are shown as U+FFFD: no text to stop at.
        at = [place for place, character in enumerate(whole) if character != "\ufffd"]
        assert len(at) > 3
        for stop in (whole[at[2]], whole[at[0]], whole[at[-1]]):
            (cut,) = fused.generate(["The"], {"other": 1.0}, max_tokens=40, stop_ids=[], stop=["\0never", stop])
            assert cut == whole[: whole.index(stop)]
        every = range(fused.model.num_logits)
        assert fused.generate(["The"], {"other": 1.0}, max_tokens=12, stop_ids=every) == [""]
        assert fused.generate(["The"], {}, max_tokens=0) == [""]


class TestRefused:
    def test_what_the_caller_got_wrong(self, fused: FusedLM) -> None:
        with pytest.raises(ConfigError, match=r"no delta 'nope'; choose from \['other', 'same', 'words'\]"):
            fused.score("a", "b", {"nope": 1.0})
        with pytest.raises(ConfigError, match="a number from -1000 to 1000"):
            fused.score("a", "b", {"same": float("nan")})
        with pytest.raises(ConfigError, match="Token ids are whole numbers"):
            fused.score([1, 1.5], " fox", {})  # type: ignore[list-item]
        with pytest.raises(ConfigError, match="Token id 99999 does not exist"):
            fused.score("a", [99999], {})
        with pytest.raises(ConfigError, match="no tokens"):
            fused.score([], "b", {})

    def test_no_model(self, tmp_path: Path, steered: Steered) -> None:
        fused_tokenizer = steered.user / "tokenizer.json"
        (tmp_path / "tokenizer.json").write_bytes(fused_tokenizer.read_bytes())
        (tmp_path / "tokenizer_config.json").write_bytes((steered.user / "tokenizer_config.json").read_bytes())
        with pytest.raises(ConfigError, match="cannot be loaded"):
            FusedLM.load(tmp_path, {})


def test_capped_and_scaled_logits(steered: Steered) -> None:
    """A head whose logits are capped or scaled afterwards is followed; one that does something else is refused."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.5)).eval()
    states.SplitModel(capped, "capped")
    states.SplitModel(GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=3.0)).eval(), "scaled")
    model = AutoModelForCausalLM.from_pretrained(steered.user).eval()
    model.config.logits_scaling = 2.0  # the config says so, the model does not
    with pytest.raises(ConfigError, match="behind the output head"):
        states.SplitModel(model, "The user LLM x")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("user", ["smollm2", "gemma3"])
def test_real_models(demo_models: Any, user: str) -> None:
    """The two demo LLMs with the shipped delta; 1e-4 nats, float32, batched against one token at a time."""
    path, concise = getattr(demo_models, user), Path(cmc_server.demo.__file__).parent / "concise"
    fused, oracle = FusedLM.load(path, {"concise": concise}), ReferenceFusedLM(path, {"concise": concise})
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    pairs: list[Pair] = [
        ("The capital of France is", " Paris, which lies on the Seine."),
        ("Emoji test: ", "🎉🚀 naïve 你好，世界 42"),
        (chat, "Because air scatters blue light more than red light.\n\n- *Rayleigh*"),
    ]
    for strengths, unmapped in (({"concise": 1.0}, "zero"), ({"concise": 0.5}, "preserve")):
        found = fused.token_scores(pairs, strengths, unmapped=unmapped)
        for scores, (prompt, text) in zip(found, pairs, strict=True):
            given = {"concise": oracle.deltas["concise"].encoder.encode_messages(chat)} if prompt is chat else None
            response = fused.encode_continuation(text)
            expected, greedy = by_oracle(
                oracle, fused.encode_prompt(prompt), response, strengths, unmapped, delta_prompts=given
            )
            torch.testing.assert_close(scores.log_probs, expected, atol=1e-4, rtol=1e-5)
            assert torch.equal(scores.greedy, greedy)
