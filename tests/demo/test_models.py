from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cmc_server.demo import models
from cmc_server.demo.models import SOURCE_FILE, demo_model, main
from cmc_server.errors import UserError

if TYPE_CHECKING:
    from conftest import DemoModels

QUESTION = {"role": "user", "content": "What is the capital of France?"}
CHAT = [QUESTION, {"role": "assistant", "content": " Paris. "}, {"role": "user", "content": "And of Italy?"}]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Download and conversion reduced to writing a file; returns the names as they are converted."""
    converted: list[str] = []

    def convert(name: str, gguf_file: Path, folder: Path) -> None:
        converted.append(name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "fetch_file", lambda source, target, licence_dir: target.write_bytes(b"GGUF"))
    monkeypatch.setattr(models, "convert", convert)
    return converted


def test_makes_a_model_once(light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMC_SERVER_CACHE", str(tmp_path))
    folder = demo_model("smollm2")
    assert folder == tmp_path / "models" / "smollm2-0.1.2"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SOURCE_FILE]
    assert demo_model("smollm2") == folder
    assert light == ["smollm2"]
    leftovers = {path.name for path in folder.parent.iterdir()} - {folder.name, f".{folder.name}.lock"}
    assert not leftovers


def test_makes_a_model_anew_after_the_conversion_changed(light: list[str], tmp_path: Path) -> None:
    folder = demo_model("gemma3", tmp_path / "out")
    record = json.loads((folder / SOURCE_FILE).read_text())
    (folder / SOURCE_FILE).write_text(json.dumps(record | {"conversion": 0}))
    demo_model("gemma3", tmp_path / "out")
    assert light == ["gemma3", "gemma3"]
    assert json.loads((folder / SOURCE_FILE).read_text()) == record


def test_a_failure_leaves_nothing_behind(light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model("smollm2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_never_overwrites_another_folder(light: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        demo_model("smollm2", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_waits_for_a_process_that_makes_the_same_model(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=demo_model, args=("smollm2", tmp_path / "out"))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert light == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join(10)
    assert light == ["smollm2"]
    assert "waiting for it" in capsys.readouterr().err


def test_command_prints_the_folder_alone_on_stdout(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["smollm2", "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert "[1/3]" in captured.err


def test_command_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt5"]) == 2
    assert "There is no demo model 'gpt5'; there are smollm2, gemma3." in capsys.readouterr().err


@pytest.mark.slow
class TestRealModels:
    """The converted folders, as transformers reads them."""

    def test_smollm2_answers(self, demo_models: DemoModels) -> None:
        tokenizer, model = load(demo_models.smollm2)
        prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
        assert "capital of France is Paris" in generate(tokenizer, model, prompt, special=False)

    def test_smollm2_splits_digits(self, demo_models: DemoModels) -> None:
        tokenizer, _ = load(demo_models.smollm2, weights=False)
        assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]

    def test_gemma_completes(self, demo_models: DemoModels) -> None:
        tokenizer, model = load(demo_models.gemma3)
        prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
        assert "Paris" in generate(tokenizer, model, prompt, special=False)

    def test_gemma_reads_bos_exactly_once(self, demo_models: DemoModels) -> None:
        tokenizer, _ = load(demo_models.gemma3, weights=False)
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
        for ids in (tokenizer("Hello")["input_ids"], chat):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1

    def test_gemma_chat(self, demo_models: DemoModels) -> None:
        tokenizer, _ = load(demo_models.gemma3, weights=False)
        text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        first = "<bos>Question: What is the capital of France?\nAnswer: Paris.\n\n"
        assert text == f"{first}Question: And of Italy?\nAnswer:"
        partial = tokenizer.apply_chat_template(CHAT[:2], continue_final_message=True, tokenize=False)
        assert partial == first.rstrip()

    def test_ends_of_text(self, demo_models: DemoModels) -> None:
        assert generation_config(demo_models.smollm2)["eos_token_id"] == 2
        assert generation_config(demo_models.gemma3)["eos_token_id"] == [1, 106]

    def test_keeps_the_licences(self, demo_models: DemoModels) -> None:
        assert (demo_models.smollm2 / "LICENSE").is_file()
        assert (demo_models.gemma3 / "GEMMA_TERMS.html").is_file()


def load(folder: Path, weights: bool = True):  # type: ignore[no-untyped-def]  # what AutoModel returns
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder) if weights else None


def generate(tokenizer, model, prompt: str, special: bool) -> str:  # type: ignore[no-untyped-def]
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def generation_config(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "generation_config.json").read_text()))
