"""A run that is killed goes on, and ends with the weights of an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cmc_server.errors import ConfigError
from cmc_server.training.checkpoints import last_checkpoint, open_folder, working_folder
from cmc_server.training.command import run_train


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state, "utf-8")
    return path


def test_the_newest_complete_checkpoint_is_found_and_the_others_go(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert last_checkpoint(work, "a") is None
    open_folder(work, "a", None)
    checkpoint(work, 8)
    newest = checkpoint(work, 16)
    checkpoint(work, 24, None)  # killed before the state was written
    checkpoint(work, 32, '{"epoch": ')  # killed while it was written
    assert last_checkpoint(work, "a") == newest
    open_folder(work, "a", newest)
    assert list(work.glob("checkpoint-*")) == [newest]


def test_another_run_is_refused_or_dropped(tmp_path: Path) -> None:
    open_folder(tmp_path, "a", None)
    assert last_checkpoint(tmp_path, "b") is None  # nothing is lost
    checkpoint(tmp_path, 8)
    with pytest.raises(ConfigError, match="--restart"):
        last_checkpoint(tmp_path, "b")
    assert last_checkpoint(tmp_path, "b", restart=True) is None
    open_folder(tmp_path, "b", None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_working_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigError, match="--output"):
        open_folder(tmp_path / "file" / "work", "a", None)


def values_for(unlearning_values: dict[str, Any], cache: Path) -> dict[str, Any]:
    data = unlearning_values["data"] | {"cache": "disk", "cache_folder": str(cache)}
    # Two steps an epoch and a checkpoint every seven: every other one lies within an epoch.
    optimisation = {"epochs": 60, "batch_size": 1, "learning_rate": 0.01}
    checkpoints = {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 1}
    output = {"folder": "delta", "dtype": "float32"}
    return unlearning_values | {
        "data": data,
        "optimisation": optimisation,
        "checkpoint": checkpoints,
        "output": output,
    }


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(tmp_path: Path, unlearning_values: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(unlearning_values, tmp_path / "cache")), "utf-8")
    run_train(path, output=tmp_path / "unbroken")

    work = working_folder(tmp_path / "broken")
    command = [sys.executable, "-m", "cmc_server", "train", str(path), "--output", str(tmp_path / "broken")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(work.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "broken").exists()
    states = list(work.glob("checkpoint-*/trainer_state.json"))
    done = max(int(state.parent.name.rpartition("-")[2]) for state in states)
    assert 0 < done < 120

    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "going on from" in resumed.stderr
    expected = load_file(tmp_path / "unbroken" / "model.safetensors")
    found = load_file(tmp_path / "broken" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    manifests = [json.loads((tmp_path / name / "cmc_delta.json").read_text("utf-8")) for name in ("unbroken", "broken")]
    assert manifests[0] == manifests[1]
    assert not work.exists()


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_every_checkpoint_is_a_place_to_go_on_from(
    tmp_path: Path, unlearning_values: dict[str, Any], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmc_server.training.trainer import DeltaTrainer

    values = values_for(unlearning_values, tmp_path / "cache")
    values["optimisation"] |= {"epochs": 4, "gradient_accumulation_steps": 1}
    values["checkpoint"] = {"save_strategy": strategy} | ({"save_steps": 3} if strategy == "steps" else {})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    run_train(path, output=tmp_path / "unbroken")
    expected = load_file(tmp_path / "unbroken" / "model.safetensors")

    class StoppedError(Exception):
        pass

    plain = DeltaTrainer._save_checkpoint
    for stop in (1, 2):
        saved = 0

        def save(self: Any, *arguments: Any, stop: int = stop, **named: Any) -> None:
            nonlocal saved
            plain(self, *arguments, **named)
            saved += 1
            if saved == stop:
                raise StoppedError

        output = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(DeltaTrainer, "_save_checkpoint", save)
            with pytest.raises(StoppedError):
                run_train(path, output=output)
        run_train(path, output=output)
        found = load_file(output / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_was_killed_after_its_last_step_records_what_an_unbroken_one_does(
    tmp_path: Path, unlearning_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_for(unlearning_values, tmp_path / "cache")
    values["optimisation"]["epochs"] = 4  # the last epoch retains other records than the first one
    values["checkpoint"] = {"save_strategy": "epoch"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    run_train(path, output=tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr("cmc_server.training.command._measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_train(path, output=tmp_path / "broken")
    run_train(path, output=tmp_path / "broken")
    manifests = [json.loads((tmp_path / name / "cmc_delta.json").read_text("utf-8")) for name in ("unbroken", "broken")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_broken_checkpoint(
    tmp_path: Path, unlearning_values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_for(unlearning_values, tmp_path / "cache")
    values["optimisation"]["epochs"] = 2
    values["checkpoint"] = {"save_strategy": "epoch"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("cmc_server.training.command._measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_train(path)
    ((broken,),) = (list(folder.glob(f"checkpoint-*/{name}")) for folder in [working_folder(tmp_path / "delta")])
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"checkpoint-\d+ cannot be read .*; begin again with --restart"):
        run_train(path)
    assert run_train(path, restart=True) == 0
