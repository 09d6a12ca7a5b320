"""Where a delta may be written: refused at the start, kept when a run fails, and no more touched than needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import make_delta

from cmc_server.cli import main
from cmc_server.errors import ConfigError
from cmc_server.training.command import run_train
from cmc_server.training.output_folder import CURVATURE_FILE, check_output
from cmc_server.training.template import FrozenTemplate
from cmc_server.training.trainer import DeltaTrainer

Values = dict[str, Any]


def write(folder: Path, values: Values) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    return path


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as its LLMs fails otherwise than by a ConfigError."""

    def load(*_: Any) -> None:
        raise AssertionError("an LLM is loaded")

    monkeypatch.setattr(FrozenTemplate, "load", load)


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("read", ["template", "start_from", "tuned", "data", "dataset", "checkpoint"])
def test_what_is_read_is_never_written_over(
    tmp_path: Path, recipe_values: Values, template_folder: Path, read: str
) -> None:
    output = tmp_path / "delta"
    kept = output if read != "checkpoint" else tmp_path / ".delta.training" / "checkpoint-8"
    shutil.copytree(template_folder, kept)
    (kept / "train.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "link").symlink_to(kept)
    changes: dict[str, Values] = {
        "template": {"template": "delta"},
        "start_from": {"delta": {"start_from": "link"}},
        "tuned": {"objective": {"name": "logit_shift", "tuned": "delta"}},
        "data": {"data": {"train": "delta/train.jsonl"}},
        "dataset": {"data": {"train": {"dataset": "delta"}}},
        "checkpoint": {"delta": {"start_from": str(kept)}},
    }
    before = content(tmp_path)
    path = write(tmp_path, recipe_values | changes[read])
    with pytest.raises(ConfigError, match=r"delta would destroy .*, which the training reads; give another output"):
        run_train(path)
    after = content(tmp_path)
    del after[path]
    assert after == before


@pytest.mark.usefixtures("nothing_slow")
def test_an_output_that_cannot_be_a_folder_is_refused_at_the_start(tmp_path: Path, recipe_values: Values) -> None:
    (tmp_path / "file").write_text("precious", "utf-8")
    (tmp_path / "circle").symlink_to("circle")
    path = write(tmp_path, recipe_values)
    for name in ("file", "file/delta"):
        with pytest.raises(ConfigError, match="file is a file; give another"):
            run_train(path, output=tmp_path / name)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="nowhere, which does not exist; give another"):
        run_train(path, output=tmp_path / "dangling")
    with pytest.raises(ConfigError, match=r"circle.*cannot be used"):
        run_train(path, output=tmp_path / "circle" / "delta")
    assert (tmp_path / "file").read_text("utf-8") == "precious"


def test_an_output_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="cannot be written"):
        check_output(tmp_path / "a" / "b", [])


def test_what_lies_beside_what_is_read_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    check_output(tmp_path / "template" / "delta", [tmp_path / "template", tmp_path / "template" / "delta" / "none"])
    check_output(tmp_path / "temp", [tmp_path / "template"])


def test_a_run_that_diverges_leaves_the_earlier_delta(
    tmp_path: Path, recipe_values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "model.safetensors").write_text("good", "utf-8")
    before = content(tmp_path / "delta")
    recipe_values["optimisation"] |= {"learning_rate": 1e30}
    path = write(tmp_path, recipe_values)
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr()
    assert "at step 4, where the loss is nan; nothing was written: lower optimisation.learning_rate" in said.err
    assert "Traceback" not in said.err and said.out == ""
    assert content(tmp_path / "delta") == before
    recipe_values["optimisation"] |= {"learning_rate": 1e-3, "epochs": 1}
    assert main(["train", str(write(tmp_path, recipe_values)), "--restart"]) == 0  # what the sentence says to do


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float32", "weights that are not finite"),
        (1e6, "float16", "weights too large for output.dtype: float16"),
        (1e30, "float32", "a delta whose train loss is (nan|inf)"),
    ],
)
def test_weights_that_went_astray_in_the_last_step_are_not_stored(
    tmp_path: Path, recipe_values: Values, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str, reason: str
) -> None:
    def train(self: DeltaTrainer, **_: Any) -> None:
        with torch.no_grad():
            for weights in self.model.delta.base_model.layers.parameters():
                weights.fill_(value)

    monkeypatch.setattr(DeltaTrainer, "train", train)
    recipe_values["output"]["dtype"] = dtype
    with pytest.raises(ConfigError, match=f"ended with {reason}; nothing was written: lower"):
        run_train(write(tmp_path, recipe_values))
    assert not (tmp_path / "delta").exists()


def test_only_what_is_written_changes_its_mode(tmp_path: Path, recipe_values: Values) -> None:
    output = tmp_path / "delta"
    (output / "notes").mkdir(parents=True, mode=0o755)
    (output / "secret.txt").write_text("mine", "utf-8")
    (output / "secret.txt").chmod(0o600)
    (tmp_path / "other.txt").write_text("mine", "utf-8")
    (tmp_path / "other.txt").chmod(0o600)
    (output / "link").symlink_to(tmp_path / "other.txt")
    recipe_values["optimisation"]["epochs"] = 1
    recipe_values["output"]["curvature"] = "optimiser"
    path = write(tmp_path, recipe_values)
    for _ in range(2):  # the second one finds the folder curvature
        run_train(path)
        modes = {one.name: one.stat().st_mode & 0o777 for one in output.iterdir()}
        assert modes["notes"] == 0o755 and modes["curvature"] & 0o111
        assert modes["secret.txt"] == modes["link"] == 0o600
        assert modes["model.safetensors"] == modes["config.json"] == modes["cmc_delta.json"] == 0o644


def test_one_run_at_a_time(tmp_path: Path, recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    path, train = write(tmp_path, recipe_values), DeltaTrainer.train

    def train_twice(self: DeltaTrainer, **more: Any) -> None:
        with pytest.raises(ConfigError, match=r"Another run is writing .*delta; wait for its end"):
            run_train(path, restart=True)
        train(self, **more)

    monkeypatch.setattr(DeltaTrainer, "train", train_twice)
    run_train(path)
    assert {one.name for one in tmp_path.iterdir() if one.name.startswith(".")} == set()


def test_nothing_of_the_delta_before_stays(tmp_path: Path, recipe_values: Values) -> None:
    recipe_values["output"]["curvature"] = "optimiser"
    run_train(write(tmp_path, recipe_values))
    (tmp_path / "delta" / "packed.safetensors").write_text("other weights", "utf-8")
    (tmp_path / "delta" / "notes.txt").write_text("mine", "utf-8")
    recipe_values["output"]["curvature"] = "none"
    run_train(write(tmp_path, recipe_values))
    assert {"model.safetensors", "notes.txt"} <= {path.name for path in (tmp_path / "delta").iterdir()}
    assert (
        not (tmp_path / "delta" / "packed.safetensors").exists() and not (tmp_path / "delta" / CURVATURE_FILE).exists()
    )


def test_a_delta_that_cannot_be_written_whole_is_not_written(
    tmp_path: Path, recipe_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(write(tmp_path, recipe_values))
    before = content(tmp_path / "delta")

    def draw_losses(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("cmc_server.training.curves.draw_losses", draw_losses)
    with pytest.raises(OSError, match="No space left"):
        run_train(write(tmp_path, recipe_values | {"seed": 8}))
    assert content(tmp_path / "delta") == before
    assert not (tmp_path / ".delta.part").exists()


@pytest.mark.parametrize("length", [4, 200, -100])
def test_cut_weights_are_a_mistake_of_the_user(
    tmp_path: Path, recipe_values: Values, template_folder: Path, length: int
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(template_folder, cut)
    start = make_delta(tmp_path / "start", template_folder, hidden=16, layers=1)
    for folder in (cut, start):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"The template LLM .*cut cannot be loaded"):
        run_train(write(tmp_path, recipe_values | {"template": "cut"}))
    with pytest.raises(ConfigError, match=r"delta.start_from .*start cannot be loaded"):
        run_train(write(tmp_path, recipe_values | {"delta": {"start_from": "start"}}))
