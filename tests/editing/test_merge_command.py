"""`cmc-server merge` from the command line: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Weights, rewrite, shard, weights_of
from tiny_family import Family
from torch import Tensor
from transformers import AutoModelForCausalLM

from cmc_server.cli import main
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.editing import stream
from cmc_server.editing.gradient_matching import gradient_matching, guarded

METHODS = ["task-arithmetic", "ties", "fisher", "regmean", "gradient-matching"]


def differences(left: Path, right: Path) -> float:
    first, second = weights_of(left), weights_of(right)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model_with_its_history(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    DeltaManifest(name="tiny").write(family.folders["one"])
    output = tmp_path / "some" / "merged"
    capsys.readouterr()
    assert main([*family.words(method), "-o", str(output)]) == 0
    shown = capsys.readouterr()
    assert f"{method}: merged 2 models, 21 tensors (0 copied), 38,304 delta parameters" in shown.out
    assert f"written to {output}" in shown.out and "merge: 100%" in shown.err
    (record,) = DeltaManifest.read(output).training["edits"]
    assert record["method"] == method and [model["folder"] for model in record["models"]] == [
        "family-one",
        "family-two",
    ]
    assert ("curvature" in record) == (method not in ("task-arithmetic", "ties"))
    assert all(one["file"].endswith(".safetensors") for one in record.get("curvature", []))
    AutoModelForCausalLM.from_pretrained(output)
    assert differences(output, family.folders["base"]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_models_and_shards_does_not_matter(family: Family, tmp_path: Path, method: str) -> None:
    assert main([*family.words(method), "-o", str(tmp_path / "merged")]) == 0
    assert main([*family.words(method, models=("two", "one")), "-o", str(tmp_path / "turned")]) == 0
    assert differences(tmp_path / "merged", tmp_path / "turned") < 1e-5


@pytest.mark.parametrize("method", ["fisher", "gradient-matching"])
def test_pieces_make_no_difference(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert main([*family.words(method), "-o", str(tmp_path / "merged")]) == 0
    monkeypatch.setattr(stream, "PIECE", 100)
    assert main([*family.words(method), "-o", str(tmp_path / "pieces")]) == 0
    assert differences(tmp_path / "merged", tmp_path / "pieces") == 0


def test_sharded_bases_are_read(family: Family, tmp_path: Path) -> None:
    assert main([*family.words("task-arithmetic"), "-o", str(tmp_path / "merged")]) == 0
    sharded = shard(family.folders["base"], tmp_path / "sharded")
    assert main([*family.words("task-arithmetic", base=str(sharded)), "-o", str(tmp_path / "again")]) == 0
    assert differences(tmp_path / "merged", tmp_path / "again") == 0


def whole(family: Family, weights: list[float]) -> Weights:
    """Gradient matching of the family on whole state dicts in float64."""
    base, *models = (weights_of(family.folders[name]) for name in ("base", "one", "two"))
    base_hessian, *hessians = (family.hessian(name) for name in ("base", "one", "two"))

    def merged(name: str) -> Tensor:
        deltas = [model[name].double() - base[name].double() for model in models]
        stiffness = base_hessian[name].double() + 1e-12
        guard, _ = guarded([hessian[name].double() for hessian in hessians], weights, stiffness, 0.1)
        return base[name].double() + gradient_matching(deltas, guard, weights, stiffness)

    return {name: merged(name) for name in base}


@pytest.mark.parametrize("remove", [False, True])
def test_streaming_is_what_whole_models_give(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], remove: bool
) -> None:
    words = [*family.words("gradient-matching"), "--weights", "0.5", "2", *(["--remove"] if remove else [])]
    assert main([*words, "-o", str(tmp_path / "merged"), "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out.splitlines()[-1])
    assert report["options"]["weights"] == ([-0.5, -2.0] if remove else [0.5, 2.0])
    assert (report["result"]["clamped"] > 0) == remove
    assert ("H0 is not far enough above alpha Ht for" in shown.err) == remove
    expected = whole(family, report["options"]["weights"])
    for name, tensor in weights_of(tmp_path / "merged").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["task-arithmetic", "fisher", "regmean"])
def test_other_methods_give_their_formulas(family: Family, tmp_path: Path, method: str) -> None:
    assert main([*family.words(method), "--weights", "1", "3", "-o", str(tmp_path / "merged")]) == 0
    base, one, two = (weights_of(family.folders[name]) for name in ("base", "one", "two"))
    fishers = [family.hessian(name) for name in ("one", "two")]
    grams = [load_file(family.file(name, "gram")) for name in ("one", "two")]

    def expected(name: str) -> Tensor:
        if method == "task-arithmetic":
            return one[name] + 3 * two[name] - 3 * base[name]
        if method == "fisher":
            first, second = (fisher[name].double() + 1e-12 for fisher in fishers)
            return ((first * one[name] + 3 * second * two[name]) / (first + 3 * second)).float()
        if name not in grams[0]:  # embeddings and norms
            return (one[name] + 3 * two[name]) / 4
        shrunk = [3 * (0.9 * gram[name] + 0.1 * gram[name].diagonal().diag()).double() for gram in grams]
        right = shrunk[0] @ one[name].T.double() + 3 * shrunk[1] @ two[name].T.double()
        return torch.linalg.solve(shrunk[0] + 3 * shrunk[1], right).T.float()

    for name, tensor in weights_of(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, expected(name), rtol=1e-3, atol=1e-4)


def test_removal_keeps_the_types_and_the_layout_of_the_base(family: Family, tmp_path: Path) -> None:
    base = shard(family.folders["base"], tmp_path / "sharded")
    rewrite(family.folders["one"], lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    words = ["merge", str(base), str(family.folders["one"]), "--method", "task-arithmetic", "--remove"]
    assert main([*words, "-o", str(tmp_path / "without")]) == 0
    names = [path.name for path in sorted(base.glob("*.safetensors*"))]
    assert [path.name for path in sorted((tmp_path / "without").glob("*.safetensors*"))] == names
    before, one = weights_of(base), weights_of(family.folders["one"])
    for name, tensor in weights_of(tmp_path / "without").items():
        assert tensor.dtype == before[name].dtype == torch.float32
        assert torch.equal(tensor, before[name] - (one[name].float() - before[name]))


def test_the_majority_of_ties_is_that_of_the_model(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded, so that what is added and taken off sums to exactly 0.
    rewrite(family.folders["base"], lambda weights: {name: weights[name].bfloat16().float() for name in weights})
    base = weights_of(family.folders["base"])
    change = {name: torch.where(torch.rand_like(tensor) < 0.3, 2.0, -2.0) for name, tensor in base.items()}
    for name, sign in (("one", 1), ("two", -1)):  # every sum is 0 but those of the embeddings
        rewrite(
            family.folders[name],
            lambda weights, sign=sign: {
                key: base[key] + (1 if "embed" in key else sign) * change[key] for key in weights
            },
        )
    monkeypatch.setattr(stream, "PIECE", 100)
    words = [*family.words("ties", models=("one", "two")), "--drop", "0", "-o", str(tmp_path / "merged")]
    assert main(words) == 0
    for name, tensor in weights_of(tmp_path / "merged").items():
        expected = change[name] if "embed" in name else torch.full_like(tensor, -2.0)
        torch.testing.assert_close(tensor - base[name], expected, rtol=0, atol=1e-6)


def test_removal_leaves_the_base_with_its_own_files(family: Family, tmp_path: Path) -> None:
    (family.folders["base"] / "README.md").write_text("of the base", "utf-8")
    DeltaManifest(name="tiny").write(family.folders["one"])
    words = [*family.words("task-arithmetic", models=("one",)), "--remove", "-o", str(tmp_path / "without")]
    assert main(words) == 0
    assert (tmp_path / "without" / "README.md").is_file() and not (tmp_path / "without" / "cmc_delta.json").exists()
    base, one = (weights_of(family.folders[name]) for name in ("base", "one"))
    for name, tensor in weights_of(tmp_path / "without").items():
        torch.testing.assert_close(tensor, 2 * base[name] - one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_averages_do_not_depend_on_the_base(family: Family, tmp_path: Path, method: str) -> None:
    assert main([*family.words(method), "-o", str(tmp_path / "merged")]) == 0
    assert main([*family.words(method, base="zero"), "-o", str(tmp_path / "zero")]) == 0
    assert differences(tmp_path / "merged", tmp_path / "zero") < 1e-4


def test_gradient_matching_without_a_base_is_fisher_averaging(family: Family, tmp_path: Path) -> None:
    assert main([*family.words("fisher", base="zero"), "-o", str(tmp_path / "fisher")]) == 0
    words = [*family.words("gradient-matching", base="zero"), "--damping", "1e-12"]
    assert main([*words, "-o", str(tmp_path / "matched")]) == 0
    touched = {
        name: (family.hessian("one")[name] + family.hessian("two")[name]) > 1e-6 for name in family.hessian("one")
    }
    one, other = weights_of(tmp_path / "fisher"), weights_of(tmp_path / "matched")
    for name, mask in touched.items():
        torch.testing.assert_close(one[name][mask], other[name][mask], rtol=1e-4, atol=1e-5)


def test_a_dry_run_says_the_same_and_writes_nothing(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = [*family.words("gradient-matching"), "--json"]
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)["result"]
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*words, "-o", str(tmp_path / "merged")]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == dry
    assert main([*words, "-o", str(tmp_path / "merged")]) == 2
    assert "exists; give another one, or --force" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "merged"), "--force"]) == 0


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("no", [], "choose among task-arithmetic, ties, fisher, regmean, gradient-matching"),
        ("task-arithmetic", ["--weights", "1"], "--weights has 1 numbers for 2 models"),
        ("task-arithmetic", ["--weights", "nan", "1"], "finite number"),
        ("fisher", ["--weights", "1", "-1"], "greater than 0"),
        ("fisher", ["--damping", "0"], "greater than 0"),
        ("ties", ["--weights", "1", "1"], "--weights is no option of --method ties, which has --drop, --factor"),
        ("ties", ["--off-diagonal", "1"], "--off-diagonal is no option of --method ties"),
        ("regmean", ["--remove"], "--method regmean has no --remove"),
        ("fisher", ["--curvature", "x"], "needs --curvature, a fisher file for each of the 2 models"),
        ("fisher", ["--base-curvature", "x"], "--base-curvature is for --method gradient-matching"),
        ("task-arithmetic", ["--curvature", "x"], "reads no --curvature"),
        ("task-arithmetic", ["--remove", "--weights", "1", "-1"], "--remove makes all weights negative"),
        ("gradient-matching", ["--floor", "1"], "less than 1"),
        ("gradient-matching", ["--floor", "0.2"], "--floor is for removals: --remove, or negative --weights"),
        ("gradient-matching", ["--floor", "1e-9", "--remove"], "--floor must be at least 1e-06"),
        ("gradient-matching", ["--damping", "1e-46"], "--damping must lie in [1e-30, 1e+30]"),
        ("fisher", ["--damping", "1e39"], "--damping must lie in [1e-30, 1e+30]"),
        ("task-arithmetic", ["--alphas", "1"], "--alphas measures losses: give --data too"),
        ("task-arithmetic", ["--alphas", "1", "--data", "x"], "--data has 1 files for 2 models"),
        ("task-arithmetic", ["--data", "x", "y"], "The data file x cannot be read"),
        ("fisher", ["--alphas", "1", "--data", "x", "y"], "on which --method fisher does not depend"),
        ("task-arithmetic", ["--against", "missing"], "There is no folder missing"),
    ],
)
def test_mistakes(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, more: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main([*family.words(method), *more, "-o", str(tmp_path / "merged")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "merged").exists()


def test_what_a_base_of_zero_forbids(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*family.words("task-arithmetic", base="zero"), "-o", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "adds whole weights up; give --weights" in capsys.readouterr().err
    assert main([*words, "--remove", "--weights", "1", "1"]) == 2
    assert "BASE, which must be a folder" in capsys.readouterr().err
    assert main([*words, "--weights", "0.5", "0.5"]) == 0
    matching = family.words("gradient-matching", base="zero")
    capsys.readouterr()
    assert main([*matching, "--dry-run"]) == 2
    assert "needs --base-curvature, or --damping" in capsys.readouterr().err
    assert main([*matching, "--dry-run", "--base-curvature", str(family.file("base"))]) == 2
    assert "BASE that is a folder, not zero" in capsys.readouterr().err


def test_curvature_that_does_not_fit(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *files: Path) -> None:
        words = ["merge", str(family.folders["base"]), str(family.folders["one"]), "--method", "fisher"]
        capsys.readouterr()
        assert main([*words, "--curvature", *map(str, files), "-o", str(tmp_path / "merged")]) == 2
        error = capsys.readouterr().err
        assert message in error and not (tmp_path / "merged").exists()

    refused("was not measured on the weights in", family.file("two"))
    refused("holds gram curvature, where fisher is needed", family.file("one", "gram"))
    refused("is no curvature file", family.folders["one"] / "model.safetensors")
    refused("is not a valid safetensors file", tmp_path / "missing.safetensors")
    refused("is a folder; give a curvature file", family.folders["one"])

    def changed(name: str, tensors: Weights, **metadata: str) -> Path:
        with safe_open(family.file("one"), framework="pt") as opened:
            save_file(tensors, tmp_path / name, opened.metadata() | metadata)
        return tmp_path / name

    own = load_file(family.file("one"))
    for size in ("0", "-3", str(10**30)):
        refused(f"its data set has {size} texts", changed("sized", own, dataset_size=size))
    refused(
        "that no curvature has", changed("many", own | {k: v + 1e30 for k, v in own.items()}, dataset_size="1" * 18)
    )
    norm = "model.norm.weight"
    refused("no curvature that fits", changed("lacking", {k: v for k, v in own.items() if k != norm}))
    refused("no curvature that fits", changed("shaped", own | {norm: own[norm][:3].clone()}))
    refused(f"numbers for {norm} that no curvature has", changed("below", own | {norm: own[norm] - 1e9}))
    refused(f"numbers for {norm} that no curvature has", changed("nan", own | {norm: own[norm] * torch.nan}))


def test_losses_that_are_not_finite_choose_no_alpha(
    family: Family, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*family.words("task-arithmetic"), "--data", str(data), str(data), "--json", "-o", str(tmp_path / "merged")]
    capsys.readouterr()
    assert main([*words, "--alphas", "0.5", "1e18"]) == 2
    shown = capsys.readouterr()
    assert "metrics.robustness.points[1].losses[0] came out as nan" in shown.err and not shown.out
    assert not (tmp_path / "merged").exists()


def test_the_floor_counts_where_only_an_alpha_removes(family: Family, data: Path) -> None:
    words = [*family.words("gradient-matching"), "--floor", "0.2", "--dry-run"]
    assert main([*words, "--data", str(data), str(data), "--alphas", "-0.1"]) == 0


def test_models_that_differ(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = "model.norm.weight"
    rewrite(family.folders["two"], lambda weights: {k: v for k, v in weights.items() if k != norm})
    assert main([*family.words("task-arithmetic"), "-o", str(tmp_path / "merged")]) == 2
    assert f"lacks tensors of {family.folders['base']}: {norm}" in capsys.readouterr().err
    rewrite(family.folders["one"], lambda weights: weights | {norm: weights[norm] * torch.nan})
    assert main([*family.words("task-arithmetic", models=("one",)), "-o", str(tmp_path / "merged")]) == 2
    assert f"{norm} of {family.folders['one']} holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_singular_regression_is_named(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        path = family.file(name, "gram")
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        lopsided = {key: torch.full_like(gram, -1.0).fill_diagonal_(1.0) for key, gram in load_file(path).items()}
        save_file(lopsided, path, metadata)
    words = [*family.words("regmean"), "--off-diagonal", "1", "-o", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "are singular; give --off-diagonal below 1" in capsys.readouterr().err
