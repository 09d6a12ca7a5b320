"""`cmc-server sparsify` from the command line: what it writes, what it prints, and what it refuses."""

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
from interrupts import heed_interrupts
from tiny_checkpoints import rewrite, shard, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cmc_server.cli import main
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.editing.mask_file import MASKS, read_masks
from cmc_server.editing.sparsify_options import SparsifyOptions

WEIGHTS = 18_432  # of the linear layers in the tiny model's two blocks
TUNED = ["pooled", "lora", "masked-lora", "oracle"]


@pytest.fixture
def words(post: Path, data: Path, tmp_path: Path) -> list[str]:
    """A run without its method and its sparsity."""
    more = ["--calibrate", str(data), "--length", "8", "--heldout", str(data)]
    return ["sparsify", str(post), *more, "-o", str(tmp_path / "sparse")]


def check(output: Path, dense: Path, num_dropped: int) -> None:
    """Zeros where the masks say so and, of these weights, nowhere else; the rest as it was."""
    weights, before, masks = weights_of(output), weights_of(dense), read_masks(output)
    assert len(masks) == 14 and sum(mask.numel() for mask in masks.values()) == WEIGHTS
    assert sum(int((~mask).sum()) for mask in masks.values()) == num_dropped
    for name, weight in weights.items():
        assert weight.dtype == before[name].dtype and bool(weight.isfinite().all())
        if name in masks:
            assert not bool(weight[~masks[name]].any()) and bool(weight[masks[name]].all())
        else:
            assert torch.equal(weight, before[name])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_output_is_a_sparse_checkpoint_with_masks_and_history(
    words: list[str], post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    DeltaManifest(name="tiny", training={"seed": 3}).write(post)
    output = tmp_path / "sparse"
    assert main([*words, "--method", method, "--sparsity", "0.35"]) == 0
    shown = capsys.readouterr()
    assert f"{method}: 6,451 of 18,432 weights pruned (0.35; 0.1684 of the model), 14 tensors (7 copied)" in shown.out
    assert "calibrated on 3 sequences of 8 tokens" in shown.out and f"written to {output}" in shown.out
    assert "prune: 100%" in shown.err and "write: 100%" in shown.err
    check(output, post, round(0.35 * WEIGHTS))
    manifest = DeltaManifest.read(output)
    (record,) = manifest.training["edits"]
    assert manifest.training["seed"] == 3 and (record["method"], record["sparsity"]) == (method, 0.35)
    assert record["model"]["folder"] == "post" and record["calibration"]["data"] == "data.jsonl"
    assert record["result"]["dropped"] == 6451 and record["result"]["edited_tensors"] == 14
    assert all(abs(one["sparsity"] - 0.35) < 0.01 for one in record["result"]["layers"].values())
    assert record["result"]["losses"].keys() == {"dense", "sparse"}
    for name, mask in read_masks(output).items():
        if method == "wanda":
            counts = (~mask).sum(1)
            assert int(counts.max() - counts.min()) <= 1, name
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(post).get_vocab()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold_in_every_group(words: list[str], post: Path, tmp_path: Path, method: str) -> None:
    assert main([*words, "--method", method, "--pattern", "2:4"]) == 0
    check(tmp_path / "sparse", post, WEIGHTS // 2)
    for mask in read_masks(tmp_path / "sparse").values():
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("tuning", TUNED)
def test_tuned_models_are_as_sparse_as_they_should_be(
    words: list[str], post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tuning: str
) -> None:
    more = ["--tuning", tuning, "--tuning-data", str(data), "--iterations", "3", "--batch-size", "1"]
    assert main([*words, *more, "--sparsity", "0.6", "--learning-rate", "0.01", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check(tmp_path / "sparse", post, round(0.6 * WEIGHTS))
    result = report["result"]
    schedule = [0.6 * (1 - (1 - number / 3) ** 3) for number in (1, 2, 3)]
    assert [one["sparsity"] for one in result["rounds"]] == pytest.approx(schedule, abs=1e-4)
    last = result["rounds"][-1]
    assert (last["examples"], last["steps"]) == (3, 3) and 0 < last["dense_interference"] < 1
    assert (last["interference"] == 0) == (tuning != "lora")
    assert abs(last["merge_gap"]) > 1e-3 if tuning == "lora" else abs(last["merge_gap"]) < 1e-5
    assert tuning != "oracle" or last["parameters"] == WEIGHTS - round(0.6 * WEIGHTS)
    ranks = [one.get("rank") for one in result["layers"].values()]
    assert ranks == [None] * 14 if tuning == "oracle" else sum(ranks) == 140
    assert report["tuning"]["options"]["learning_rate"] == 0.01 and report["iterations"] == 3
    assert result["losses"]["sparse"] < result["losses"]["pruned"]


def test_losses_are_those_of_what_was_written(
    words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--sparsity", "0.5", "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["result"]["losses"]
    again = ["merge", "zero", str(tmp_path / "sparse"), "--method", "task-arithmetic", "--weights", "1", "--dry-run"]
    assert main([*again, "--data", str(data), "--json"]) == 0
    (loss,) = json.loads(capsys.readouterr().out)["metrics"]["losses"]
    assert losses["sparse"] == pytest.approx(loss, rel=1e-5)


def test_redundant_blocks_become_sparser(
    words: list[str], post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--sparsity", "0.5", "--allocation", "cka", "--spread", "0.1", "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["result"]["blocks"]
    check(tmp_path / "sparse", post, WEIGHTS // 2)
    sparsities = [one["sparsity"] for one in blocks.values()]
    assert sorted(sparsities) == pytest.approx([0.4, 0.6])
    masks = read_masks(tmp_path / "sparse")
    for name, one in blocks.items():
        own = [mask for key, mask in masks.items() if key.startswith(name)]
        dropped = sum(int((~mask).sum()) for mask in own)
        assert dropped == pytest.approx(one["sparsity"] * sum(mask.numel() for mask in own), abs=1)


def test_shards_gpt2_and_chosen_tensors(data: Path, post: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(post).save_pretrained(tmp_path / "whole")
    model = shard(tmp_path / "whole", tmp_path / "gpt2")
    run = ["sparsify", str(model), "--calibrate", str(data), "--pattern", "1:4", "--exclude", "*c_fc*"]
    assert main([*run, "-o", str(tmp_path / "sparse")]) == 0
    before, after, masks = weights_of(model), weights_of(tmp_path / "sparse"), read_masks(tmp_path / "sparse")
    assert {path.name for path in (tmp_path / "sparse").iterdir()} >= {path.name for path in model.iterdir()}
    assert len(masks) == 6 and not any("c_fc" in name for name in masks)
    for name, weight in after.items():
        if name in masks:  # kept as [in, out]: groups are along the first axis
            assert bool((masks[name].T.reshape(-1, 4).sum(1) == 1).all())
            assert torch.equal(weight, before[name].masked_fill(~masks[name], 0))
        else:
            assert torch.equal(weight, before[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_a_dry_run_writes_nothing_and_runs_repeat(
    words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    run = [*words, "--sparsity", "0.5", "--tuning", "pooled", "--tuning-data", str(data), "--iterations", "2", "--json"]
    assert main([*run, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)["result"]
    assert sorted(tmp_path.rglob("*")) == before
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["result"] == dry
    assert main([*run, "--force", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["losses"]["sparse"] != dry["losses"]["sparse"]


def test_an_output_is_replaced_only_with_force(
    words: list[str], post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--sparsity", "0.5"]) == 0
    assert main([*words, "--sparsity", "0.25"]) == 2
    assert "exists; give another one, or --force" in capsys.readouterr().err
    check(tmp_path / "sparse", post, WEIGHTS // 2)
    assert main([*words, "--sparsity", "0.25", "--force"]) == 0
    check(tmp_path / "sparse", post, WEIGHTS // 4)


def test_nothing_is_pruned_at_0(words: list[str], post: Path, tmp_path: Path) -> None:
    assert main([*words, "--sparsity", "0", "--method", "sparsegpt"]) == 0
    check(tmp_path / "sparse", post, 0)
    assert all(torch.equal(tensor, weights_of(post)[name]) for name, tensor in weights_of(tmp_path / "sparse").items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsity", "1"], "--sparsity must lie in [0, 1), not 1.0."),
        (["--sparsity", "-0.1"], "--sparsity must lie in [0, 1), not -0.1."),
        (["--sparsity", "nan"], "--sparsity must lie in [0, 1), not nan."),
        ([], "Give --sparsity, a share, or --pattern"),
        (["--sparsity", "0.5", "--pattern", "2:4"], "Give --sparsity, a share, or --pattern"),
        (["--pattern", "4:2"], "must be N:M with 1 <= N < M"),
        (["--pattern", "half"], "must be written N:M"),
        (
            ["--pattern", "2:3"],
            "The pattern 2:3 does not divide the 32 inputs of model.layers.0.self_attn.q_proj.weight",
        ),
        (["--sparsity", "0.5", "--method", "no"], "--method must be magnitude, wanda or sparsegpt, not no."),
        (["--sparsity", "0.5", "--tuning", "no"], "--tuning must be none, pooled, lora, masked-lora or oracle"),
        (["--sparsity", "0.5", "--allocation", "no"], "--allocation must be uniform or cka, not no."),
        (["--sparsity", "0.5", "--tuning", "lora"], "--tuning needs --tuning-data."),
        (["--sparsity", "0.5", "--tuning-data", "x"], "--tuning-data is for --tuning."),
        (["--sparsity", "0.5", "--rank", "4"], "--rank is for --tuning."),
        (["--sparsity", "0.5", "--tuning", "oracle", "--tuning-data", "x", "--rank", "4"], "--rank is for adapters"),
        (
            ["--sparsity", "0.5", "--tuning", "lora", "--tuning-data", "x", "--rank", "0"],
            "rank: Input should be greater",
        ),
        (["--sparsity", "0.5", "--tuning", "lora", "--tuning-data", "x"], "The data file x cannot be read"),
        (["--sparsity", "0.5", "--iterations", "3"], "--iterations prunes and tunes in turn"),
        (["--sparsity", "0.5", "--iterations", "0"], "--iterations must be at least 1."),
        (["--sparsity", "0.5", "--sequences", "0"], "--sequences must be at least 1."),
        (["--sparsity", "0.5", "--length", "0"], "--length must be at least 1."),
        (["--sparsity", "0.5", "--spread", "0.1"], "--spread is for --allocation cka."),
        (["--sparsity", "0.5", "--beta", "2"], "--beta is for --allocation cka."),
        (["--sparsity", "0.5", "--allocation", "cka", "--spread", "2"], "--spread must lie in [0, 1]."),
        (["--sparsity", "0.5", "--allocation", "cka", "--beta", "inf"], "--beta must be a finite number."),
        (["--sparsity", "0.5", "--allocation", "cka", "--sequences", "1"], "at least 2 --sequences"),
        (["--sparsity", "0.5", "--allocation", "cka", "--length", "500"], "has one, lower --length."),
        (["--pattern", "2:4", "--allocation", "cka"], "which a --pattern fixes"),
        (["--sparsity", "0.5", "--only", "nothing*"], "No tensor of"),
        (["--sparsity", "0.5", "--only", "*embed*"], "No weight that is to be pruned belongs to a linear layer"),
    ],
)
def test_mistakes(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*words, *more]) == 2
    shown = capsys.readouterr()
    said = [line for line in shown.err.splitlines() if line.startswith("cmc-server:")]
    assert len(said) == 1 and message in said[0] and not shown.out
    assert not (tmp_path / "sparse").exists()


def test_data_and_outputs_are_needed(post: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", str(post), "--sparsity", "0.5", "--dry-run"]) == 2
    assert "--method wanda needs --calibrate" in capsys.readouterr().err
    for name in ("--length", "--sequences"):
        idle = ["sparsify", str(post), "--sparsity", "0.5", "--method", "magnitude", "--dry-run", name, "8"]
        assert main(idle) == 2
        assert f"{name} is for --calibrate." in capsys.readouterr().err
    assert main(["sparsify", str(post), "--sparsity", "0.5", "--method", "magnitude"]) == 2
    assert "Give the folder to write with -o, or --dry-run" in capsys.readouterr().err
    assert main(["sparsify", str(post), "--sparsity", "0.5", "--method", "magnitude", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "9,216 of 18,432" in shown.out and "dry run: nothing was written" in shown.out
    run = ["sparsify", str(post), "--sparsity", "0.5", "--method", "magnitude", "--dry-run", "--tuning", "pooled"]
    assert main([*run, "--tuning-data", str(data)]) == 2
    assert "--budget loss needs --calibrate" in capsys.readouterr().err
    assert main([*run, "--tuning-data", str(data), "--budget", "uniform"]) == 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_are_refused_by_name(
    words: list[str], post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: float, name: str
) -> None:
    def break_one(weights: Any) -> Any:
        weights[name].view(-1)[5] = number
        return weights

    rewrite(post, break_one)
    assert main([*words, "--sparsity", "0.5"]) == 2
    assert f"{name} of {post} holds NaN or infinity." in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()


def test_options_hold_in_python() -> None:
    options = SparsifyOptions(model=Path("m"), pattern="1:4", calibrate=Path("c"), dry_run=True)
    assert options.final_sparsity == 0.75 and options.num_rounds == 1
    tuned = SparsifyOptions(
        model=Path("m"), sparsity=0.5, calibrate=Path("c"), dry_run=True, tuning="pooled", tuning_data=Path("t")
    )
    assert tuned.num_rounds == 5 and tuned.build_tuning().learning_rate == 2e-4


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_checkpoint(post: Path, tmp_path: Path, signal_number: signal.Signals) -> None:
    words = [str(post), "--sparsity", "0.5", "--method", "magnitude", "-o", str(tmp_path / "sparse")]
    # Writing stands still, so that the signal comes in the middle of it.
    script = (
        "import sys, time\nfrom cmc_server.editing import sparsify_command as command\n"
        "command.write_masks = lambda folder, masks: time.sleep(60)\n"
        "from cmc_server.cli import main\nsys.exit(main(['sparsify', *sys.argv[1:]]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts
    ) as process:
        part = tmp_path / ".sparse.part" / "model.safetensors"
        deadline = time.monotonic() + 120
        while not (part.exists() and part.stat().st_size > 10_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal_number)
        assert process.wait(60) != 0
    assert not (tmp_path / "sparse").exists()
    assert (tmp_path / ".sparse.part").exists() == (signal_number == signal.SIGKILL)


def test_masks_lie_where_no_engine_looks_for_weights(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--sparsity", "0.5"]) == 0
    assert [path.name for path in (tmp_path / "sparse").glob("*.safetensors")] == ["model.safetensors"]
    # An edit changes what masks are about, and leaves them behind.
    edit = ["edit", "zero", str(tmp_path / "sparse"), "--method", "magnitude", "-o", str(tmp_path / "edited")]
    assert main(edit) == 0
    assert (tmp_path / "sparse" / MASKS).exists() and not (tmp_path / "edited" / MASKS).exists()


def test_results_that_do_not_fit_their_type_are_refused(
    data: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(made / "float").half().save_pretrained(model)
    AutoTokenizer.from_pretrained(made / "float").save_pretrained(model)
    run = [
        "sparsify",
        str(model),
        "--sparsity",
        "0.5",
        "--method",
        "magnitude",
        "--tuning",
        "oracle",
        "--iterations",
        "1",
    ]
    more = ["--tuning-data", str(data), "--learning-rate", "1e6", "-o", str(tmp_path / "sparse")]
    assert main([*run, *more]) == 2
    assert "does not fit its type torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()
