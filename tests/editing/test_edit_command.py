"""`cmc-server edit` from the command line: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupts import heed_interrupts
from safetensors.torch import save_file
from tiny_checkpoints import rewrite, shard, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmc_server.cli import main
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.packed import load_packed
from cmc_server.editing import stream


def test_the_output_is_a_checkpoint_with_its_history(
    base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DeltaManifest(name="tiny", training={"seed": 3}).write(post)
    (post / "pytorch_model.bin").write_bytes(b"stale")
    (post / "README.md").write_text("read me", "utf-8")
    output = tmp_path / "some" / "edited"
    words = ["edit", str(base), str(post), "--method", "dare", "--drop", "0.5", "--seed", "4", "-o", str(output)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert f"written to {output}" in shown.out and "38,304 delta parameters" in shown.out and "edit: 100%" in shown.err
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in post.iterdir()} - {"pytorch_model.bin"}
    manifest = DeltaManifest.read(output)
    assert manifest.name == "tiny" and manifest.training["seed"] == 3
    (edit,) = manifest.training["edits"]
    assert (edit["method"], edit["seed"], edit["options"]) == ("dare", 4, {"drop": 0.5, "k": 0.0})
    assert edit["post"]["folder"] == "post" and edit["result"]["copied_tensors"] == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(post).get_vocab()
    assert all(torch.equal(tensor, weights_of(output)[name]) for name, tensor in model.state_dict().items())


def test_sharded_checkpoints_keep_their_layout(
    base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded, output = shard(post, tmp_path / "sharded"), tmp_path / "edited"
    assert main(["edit", str(base), str(sharded), "--method", "expo", "-o", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"] == {"alpha": 0.3} and report["output"] == str(output) and "seed" not in report
    index = "model.safetensors.index.json"
    assert (output / index).read_bytes() == (sharded / index).read_bytes()
    assert json.loads((output / "cmc_edit.json").read_text("utf-8"))["edits"][0]["method"] == "expo"
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("method", ["dare", "magnitude", "bitdelta", "ties", "expo"])
def test_pieces_and_the_threads_that_read_them_make_no_difference(
    base: Path, post: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["edit", str(base), str(post), "--method", method]
    assert main([*words, "-o", str(tmp_path / "at-once")]) == 0
    monkeypatch.setattr(stream, "PIECE", 100)
    threads = torch.get_num_threads()
    assert main([*words, "-o", str(tmp_path / "in-pieces")]) == 0
    at_once, in_pieces = weights_of(tmp_path / "at-once"), weights_of(tmp_path / "in-pieces")
    assert all(torch.equal(tensor, in_pieces[name]) for name, tensor in at_once.items())
    rewrite(post, lambda weights: {name: tensor.mul(torch.inf) for name, tensor in weights.items()})
    assert main([*words, "-o", str(tmp_path / "refused")]) == 2
    assert torch.get_num_threads() == threads


def test_a_dry_run_computes_everything_and_writes_nothing(
    base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ["edit", str(base), str(post), "--method", "magnitude", "--drop", "0.25", "--json"]
    assert main([*words, "--dry-run", "-o", str(tmp_path / "edited")]) == 0
    dry = json.loads(capsys.readouterr().out)["result"]
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*words, "-o", str(tmp_path / "edited")]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == dry
    first, second = weights_of(base), weights_of(post)
    delta = torch.cat([(second[name].float() - first[name].float()).flatten() for name in second])
    assert dry["delta_parameters"] == delta.numel()
    assert dry["norm_before"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert 0.9 < dry["norm_after"] / dry["norm_before"] < 1


def test_ties_merges_several_models(base: Path, post: Path, tmp_path: Path, made: Path) -> None:
    other = tmp_path / "other"
    shard(post, other, 2)
    output = tmp_path / "merged"
    words = ["edit", str(base), str(post), "--with", str(other), "--method", "ties", "-o", str(output)]
    assert main(words) == 0
    # Two equal models: their mean is what trimming one of them leaves.
    assert main(["edit", str(base), str(post), "--method", "ties", "-o", str(tmp_path / "trimmed")]) == 0
    for name, tensor in weights_of(tmp_path / "trimmed").items():
        assert torch.equal(weights_of(output)[name], tensor)


def test_force_replaces(base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["edit", str(base), str(post), "--method", "expo", "-o", str(tmp_path / "edited")]
    assert main(words) == 0
    before = weights_of(tmp_path / "edited")
    assert main([*words, "--alpha", "-1"]) == 2
    assert "exists" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(tmp_path / "edited").items())
    assert main([*words, "--alpha", "-1", "--force"]) == 0
    assert all(torch.equal(tensor, weights_of(base)[name]) for name, tensor in weights_of(tmp_path / "edited").items())
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post", "edited"}


def test_bad_numbers_in_the_middle_leave_nothing(
    base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(post, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan})
    assert main(["edit", str(base), str(post), "--method", "expo", "-o", str(tmp_path / "edited")]) == 2
    assert "model.norm.weight of" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "dare", "--drop", "1"], "drop: Input should be less than or equal to 0.99999"),
        (["--method", "dare", "--drop", "-0.5"], "drop: Input should be greater than or equal to 0"),
        (["--method", "expo", "--drop", "0.5"], "--drop is no option of --method expo"),
        (["--method", "no"], "choose among dare, magnitude, bitdelta, twin, ties, expo"),
        (["--method", "expo", "--packed"], "--packed stores signs, levels and their scales"),
        (["--method", "dare", "--with", "x"], "--with merges further models"),
        (["--method", "twin", "--calibrate", "x"], "--calibrate trains the scales"),
        (["--method", "dare", "--mask-seeds", "1"], "--mask-seeds must be at least 2"),
        (["--method", "expo", "--analyse", "missing"], "The data file missing cannot be read"),
        (["--method", "expo", "--only", "nothing*"], "No tensor of"),
        (["--method", "expo", "--exclude", "*"], "--method expo takes none of the tensors"),
        (["--method", "twin", "--only", "*norm*"], "--method twin takes none of the tensors"),
        (["--method", "bitdelta", "--calibration-steps", "5"], "--calibration-steps is for --calibrate."),
        (["--method", "bitdelta", "--calibration-rate", "0.1"], "--calibration-rate is for --calibrate."),
        (["--method", "dare", "--analyse-examples", "5"], "--analyse-examples is for --analyse."),
        (["--method", "dare", "--mask-seeds", "5"], "--mask-seeds is for --analyse of a method that draws."),
        (["--method", "expo", "--analyse", "x", "--mask-seeds", "5"], "--mask-seeds is for --analyse of a method"),
    ],
)
def test_mistakes(
    base: Path, post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["edit", str(base), str(post), "-o", str(tmp_path / "edited"), *more]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "edited").exists()


def test_somewhere_to_write_is_needed(base: Path, post: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", str(base), str(post), "--method", "expo"]) == 2
    assert "Give the folder to write with -o, or --dry-run" in capsys.readouterr().err


def test_calibrated_scales_bring_the_logits_closer(post: Path, data: Path, tmp_path: Path) -> None:
    words = ["edit", "zero", str(post), "--method", "bitdelta", "--packed"]
    assert main([*words, "-o", str(tmp_path / "plain")]) == 0
    more = ["--calibrate", str(data), "--calibration-steps", "60", "--calibration-rate", "3e-3"]
    assert main([*words, *more, "-o", str(tmp_path / "calibrated")]) == 0
    assert main([*words, *more, "-o", str(tmp_path / "again")]) == 0
    ids = AutoTokenizer.from_pretrained(post)("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(post, dtype=torch.float32)
    errors = {}
    with torch.no_grad():
        wanted = model(**ids).logits
        for name in ("plain", "calibrated"):
            model.load_state_dict({key: tensor.float() for key, tensor in load_packed(tmp_path / name).items()})
            errors[name] = float((model(**ids).logits - wanted).square().mean())
    assert errors["calibrated"] < 0.8 * errors["plain"]
    weights = [load_packed(tmp_path / name) for name in ("calibrated", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_numbers_that_are_not_finite_are_not_reported(
    base: Path, post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ["edit", str(base), str(post), "--method", "expo", "--json", "-o", str(tmp_path / "edited")]
    assert main([*words, "--alpha=-1e30"]) == 2
    shown = capsys.readouterr()
    assert "result.norm_after came out as inf" in shown.err and "--alpha, --factor or --k nearer" in shown.err
    assert main([*words, "--alpha", "1e18", "--analyse", str(data)]) == 2
    assert "analysis.total.exact.mean came out as nan" in capsys.readouterr().err
    assert not shown.out and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_run_that_is_stopped_leaves_no_checkpoint(tmp_path: Path, signal_number: signal.Signals, code: int) -> None:
    for name in ("base", "post"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", "utf-8")
        save_file({f"w{number}": torch.ones(256, 4096) for number in range(40)}, tmp_path / name / "model.safetensors")
    words = [str(tmp_path / "base"), str(tmp_path / "post"), "--method", "twin", "-o", str(tmp_path / "edited")]
    command = [sys.executable, "-m", "cmc_server", "edit", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts) as process:
        part = tmp_path / ".edited.part" / "model.safetensors"
        deadline = time.monotonic() + 120
        while not (part.exists() and part.stat().st_size > 10_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal_number)
        assert process.wait(60) == code
    assert not (tmp_path / "edited").exists()
    assert (tmp_path / ".edited.part").exists() == (signal_number == signal.SIGKILL)
