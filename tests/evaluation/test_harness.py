"""The lm-evaluation-harness over local files, against scores taken directly and against its own ``hf`` model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import Steered
from tiny_template import make_template

from cmc_server.errors import ConfigError
from cmc_server.evaluation import harness
from cmc_server.fusion.encoding import Chat
from cmc_server.fusion.scoring import FusedLM

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the eval extra")

QUESTIONS = [
    {"question": "The quick brown fox", "choices": ["jumps over the dog", "café 你好 👩‍👩‍👧‍👦", "1234"], "answer": 0},
    {"question": "Привет, как", "choices": ["дела?", "x", "e\u0301tude"], "answer": 1},
    {"question": "def f(x):\n", "choices": ["    return {'a': 1}", "no", "yes"], "answer": 2},
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    "task": "tiny_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[0]}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
ANSWER = {
    "task": "tiny_answer",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "bleu"}],
}
TASKS = (CHOICE, ROLLING, ANSWER)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files over one local file of questions."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), "utf-8")
    for task in TASKS:
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(questions)}},
            "test_split": "test",
        }
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**task, **data}), "utf-8")  # JSON is YAML
    return folder


def run(tasks: Path, out: Path, model: str, model_args: str, *options: str) -> dict[str, list[dict[str, Any]]]:
    """Samples by task, in the order of the questions, each with its arguments and responses."""
    command = [sys.executable, "-m", "cmc_server.evaluation.harness", "--model", model, "--model_args", model_args]
    names = ",".join(str(task["task"]) for task in TASKS)
    command += [
        "--tasks",
        names,
        "--include_path",
        str(tasks),
        "--output_path",
        str(out),
        "--log_samples",
        "--device",
        "cpu",
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task['task']}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        found[str(task["task"])] = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return found


def log_likelihoods(samples: list[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    return [[(float(resp[0][0]), str(resp[0][1]) == "True") for resp in sample["resps"]] for sample in samples]


def totals(fused: FusedLM, prompt: Any, texts: list[str], strengths: dict[str, float]) -> list[tuple[float, bool]]:
    scores = fused.token_scores([(prompt, text) for text in texts], strengths)
    return [(float(one.log_probs.sum()), bool(one.greedy.all())) for one in scores]


def assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [one[1] for one in found] == [one[1] for one in expected]
    values = [torch.tensor([one[0] for one in side]) for side in (found, expected)]
    torch.testing.assert_close(*values, atol=2e-3, rtol=1e-4)


def continuation(fused: FusedLM, prompt: str, text: str) -> list[int]:
    """The harness's split: what the prompt and the text have together beyond the prompt."""
    return fused.encode_prompt(prompt + text)[len(fused.encode_prompt(prompt)) :]


@needs_harness
@pytest.mark.slow
def test_what_the_harness_gets_is_what_scoring_gives(steered: Steered, tasks: Path, tmp_path: Path) -> None:
    deltas = f"other={steered.deltas['other']}@0.5;words={steered.deltas['words']}"
    found = run(tasks, tmp_path, "cmc", f"user={steered.user},delta={deltas}")
    strengths = {"other": 0.5, "words": 1.0}
    fused = FusedLM.load(steered.user, steered.deltas)
    bos = fused.vocabulary.bos_id
    assert bos is not None
    for question, sample in zip(QUESTIONS, log_likelihoods(found["tiny_choice"]), strict=True):
        prompt = str(question["question"])
        stripped = prompt.rstrip()  # the harness scores white space at the end with the continuation
        texts = [f"{prompt[len(stripped) :]} {choice}" for choice in question["choices"]]  # type: ignore[attr-defined]
        pairs = [continuation(fused, stripped, text) for text in texts]
        assert_close(sample, totals(fused, stripped, pairs, strengths))  # type: ignore[arg-type]
    for question, sample in zip(QUESTIONS, found["tiny_rolling"], strict=True):
        text = f"{question['question']} {question['choices'][0]}"  # type: ignore[index]
        ids = fused.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert float(sample["resps"][0][0]) == pytest.approx(float(fused.score([bos], ids, strengths).sum()), abs=2e-3)
    answers = fused.generate([str(one["question"]) for one in QUESTIONS], strengths, max_tokens=8, stop=["e"])
    assert [sample["resps"][0][0] for sample in found["tiny_answer"]] == answers


@needs_harness
@pytest.mark.slow
def test_strength_zero_is_plain_transformers(steered: Steered, tasks: Path, tmp_path: Path) -> None:
    """The harness's own model for transformers gives the same, without any of this package's code."""
    off = run(tasks, tmp_path / "off", "cmc", f"user={steered.user},delta=other={steered.deltas['other']}@0")
    plain = run(tasks, tmp_path / "plain", "hf", f"pretrained={steered.user},dtype=float32")
    for one, other in zip(*(log_likelihoods(side["tiny_choice"]) for side in (off, plain)), strict=True):
        assert_close(one, other)
    for one, other in zip(off["tiny_rolling"], plain["tiny_rolling"], strict=True):
        assert float(one["resps"][0][0]) == pytest.approx(float(other["resps"][0][0]), abs=2e-3)
    answers = [[sample["resps"][0][0] for sample in side["tiny_answer"]] for side in (off, plain)]
    assert answers[0] == answers[1]


@needs_harness
@pytest.mark.slow
def test_chats(steered: Steered, tasks: Path, tmp_path: Path) -> None:
    """The delta reads the chat itself, not the user LLM's rendering of it."""
    user = make_template(tmp_path / "user")
    delta = steered.deltas["other"]
    found = run(
        tasks, tmp_path / "out", "cmc", f"user={user},delta=other={delta}@2,max_length=200", "--apply_chat_template"
    )
    fused = FusedLM.load(user, {"other": delta})
    chats = [Chat([{"role": "user", "content": str(question["question"])}]) for question in QUESTIONS]
    for chat, question, sample in zip(chats, QUESTIONS, log_likelihoods(found["tiny_choice"]), strict=True):
        assert_close(sample, totals(fused, chat, question["choices"], {"other": 2.0}))  # type: ignore[arg-type]
    answers = fused.generate(chats, {"other": 2.0}, max_tokens=8, stop=["e"])
    assert [sample["resps"][0][0] for sample in found["tiny_answer"]] == answers


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'cmc-server\[eval\]'"):
        harness.register()
    assert harness.main() == 2
    assert capsys.readouterr().err.startswith("error: The evaluation harness is not installed")


@pytest.fixture(scope="module")
def model(steered: Steered) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own imports are not what is tested
        made = harness.register()
    return made(str(steered.user), f"other={steered.deltas['other']}@0.5", max_length=20, batch_size=1)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@needs_harness
def test_what_is_longer_than_the_model(model: Any) -> None:
    prompt, text = "The quick brown fox jumps over." * 4, " Say it"
    ids = model.fused.encode_continuation(text)
    expected = model.fused.score(model.tok_encode(prompt)[len(ids) - 21 :], ids, {"other": 0.5})  # reads 20 tokens
    ((found, _),) = model.loglikelihood(instances("loglikelihood", (prompt, text)), disable_tqdm=True)
    assert found == pytest.approx(float(expected.sum()), abs=1e-3)
    with pytest.raises(ConfigError, match="longer than the user LLM's 20"):
        model.loglikelihood(instances("loglikelihood", ("a", prompt)), disable_tqdm=True)
    whole = model.loglikelihood_rolling(instances("loglikelihood_rolling", (prompt,)), disable_tqdm=True)
    tokens = model.tok_encode(prompt, add_special_tokens=False)
    first = model.fused.score([model.prefix_token_id], tokens[:20], {"other": 0.5})
    later = [
        model.fused.score(tokens[start - 1 : start], tokens[start : start + 20], {"other": 0.5})
        for start in range(20, len(tokens) - 20, 20)
    ]
    rest = len(tokens) % 20 or 20
    last = model.fused.score(tokens[-21:-rest], tokens[-rest:], {"other": 0.5})
    assert whole[0] == pytest.approx(float(sum(part.sum() for part in (first, *later, last))), abs=1e-3)


@needs_harness
def test_no_context(model: Any) -> None:
    ((found, _),) = model.loglikelihood(instances("loglikelihood", ("", "It is")), disable_tqdm=True)
    expected = model.fused.score([model.prefix_token_id], "It is", {"other": 0.5})
    assert found == pytest.approx(float(expected.sum()), abs=1e-3)
    assert model.generate_until(
        instances("generate_until", ("", {"max_gen_toks": 3}), ("", {"until": "e", "max_tokens": 4})), disable_tqdm=True
    ) == [
        *model.fused.generate([[model.prefix_token_id]], {"other": 0.5}, max_tokens=3),
        *model.fused.generate([[model.prefix_token_id]], {"other": 0.5}, max_tokens=4, stop=["e"]),
    ]


@needs_harness
def test_refused(model: Any, steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unmapped is 'maybe' and must be one of zero, preserve"):
        type(model)(str(steered.user), unmapped="maybe")
    for options in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ConfigError, match="answers greedily"):
            model.generate_until(instances("generate_until", ("x", options)), disable_tqdm=True)
    monkeypatch.setattr(model, "_expects_chats", True)
    with pytest.raises(ConfigError, match="--cache_requests"):
        model.loglikelihood(instances("loglikelihood", ("x", "y")), disable_tqdm=True)
