"""``cmc-server eval`` from end to end on tiny models: files, figures, and every mistake in one sentence."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_lab import Lab, write_tofu
from tiny_template import write_jsonl

from cmc_server.cli import main
from cmc_server.config import DeltaSource
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.evaluation.engine import Measurement, chat
from cmc_server.evaluation.options import EvalOptions
from cmc_server.evaluation.prompts import NEUTRAL_TEXTS, read_tasks
from cmc_server.evaluation.retained import score_references
from cmc_server.evaluation.suites import effect_by_strength
from cmc_server.fusion.scoring import FusedLM

SUITES = ["tofu", "sweep", "retained", "alpaca", "coverage", "shift"]


def run(lab: Lab, output: Path, *words: object, delta: str | None = "same") -> int:
    deltas = [] if delta is None else ["--delta", f"d={getattr(lab, delta)}"]
    return main(["eval", str(lab.user), *deltas, "-o", str(output), "--max-tokens", "6", *map(str, words)])


@pytest.fixture(scope="module")
def everything(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every suite with the delta of another vocabulary."""
    pytest.importorskip("rouge_score")
    output = tmp_path_factory.mktemp("everything")
    words = ["--suite", *SUITES, "--strengths", 1, -0.5, "--tofu", lab.tofu, "--prompts", lab.prompts, "--limit", 3]
    code = run(lab, output, *words, "--tuned", lab.tuned, "--other", lab.user, lab.tuned, delta="other")
    assert code == 0
    return output


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text("utf-8")))


def test_all_files_are_there(everything: Path) -> None:
    names = {path.name for path in everything.iterdir()}
    assert {"results.json", "results.csv", "report.html"} < names
    plots = {"tofu.png", "sweep.png", "retained.png", "alpaca.png", "coverage.png"}
    assert plots < names
    assert all((everything / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert {name for name in names if name.startswith("alpaca_")} == {
        "alpaca_user.json",
        "alpaca_user+d@1.json",
        "alpaca_user+d@-0.5.json",
    }


def test_every_suite_measured_every_strength_0_first(everything: Path) -> None:
    suites = results(everything)["suites"]
    assert set(suites) == set(SUITES)
    for name in ("tofu", "sweep", "retained", "alpaca"):
        assert [entry["strength"] for entry in suites[name]["by_strength"]] == [0, -0.5, 1]
    assert set(suites["shift"]["comparisons"]) == {"delta at strength -0.5", "delta at strength 1", "other models"}
    # The "other" models are the very same two.
    same = suites["shift"]["comparisons"]["other models"]
    assert same["cosine"]["mean"] == pytest.approx(1) and same["sinkhorn"]["mean"] == pytest.approx(0, abs=1e-9)
    assert 0 < suites["coverage"]["deltas"]["d"]["coverage"] < 1


def test_changes_are_against_strength_0(everything: Path) -> None:
    suites = results(everything)["suites"]
    base, _, one = suites["tofu"]["by_strength"]
    for name in ("forget", "retain", "real_authors", "world_facts"):
        before, after = (entry["sets"][name]["summary"]["probability"]["mean"] for entry in (base, one))
        assert one["sets"][name]["change"]["probability"]["mean"] == pytest.approx(after - before)
        assert base["sets"][name]["change"]["probability"] == {"mean": 0, "low": 0, "high": 0}
    base, _, one = suites["retained"]["by_strength"]
    assert one["change"]["mean"] == pytest.approx(one["loss"]["mean"] - base["loss"]["mean"])
    assert one["change"] == suites["sweep"]["by_strength"][2]["loss"]


def test_the_table_holds_the_figures_of_the_json(everything: Path) -> None:
    with (everything / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = {(row["suite"], row["strength"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    entry = results(everything)["suites"]["tofu"]["by_strength"][2]
    row = found["tofu", "1.0", "sets.forget.summary.probability"]
    assert {key: float(row[key]) for key in ("mean", "low", "high")} == entry["sets"]["forget"]["summary"][
        "probability"
    ]
    assert ("coverage", "", "deltas.d.coverage") in found
    assert ("shift", "", "comparisons.other models.cosine") in found


def test_the_report_shows_all_of_it_and_needs_nothing_else(everything: Path) -> None:
    page = (everything / "report.html").read_text("utf-8")
    for title in ("TOFU (forget01)", "Strength sweep", "Retained ability", "Answers", "Coverage", "Logit shifts"):
        assert f">{title}</h2>" in page
    assert page.count("data:image/png;base64,") == 5
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#s\d)', page)
    assert str(everything) not in page


def test_alpaca_outputs(everything: Path, lab: Lab) -> None:
    records = json.loads((everything / "alpaca_user+d@1.json").read_text("utf-8"))
    assert [record["instruction"] for record in records] == [task.instruction for task in read_tasks(lab.prompts)]
    assert {record["generator"] for record in records} == {"user+d@1"}
    assert {record["dataset"] for record in records} == {"prompts"}
    fused = FusedLM.load(lab.user, {"d": lab.other})
    expected = fused.generate([chat(record["instruction"]) for record in records], {"d": 1.0}, max_tokens=6)
    assert [record["output"] for record in records] == expected


def test_json_is_all_of_stdout(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lab, tmp_path, "--suite", "retained", "--limit", 2, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == results(tmp_path)
    assert printed["strengths"] == [0, 0.5, 1, 1.5]


def test_a_strength_behind_the_path_is_the_one_measured(lab: Lab, tmp_path: Path) -> None:
    words = ["eval", str(lab.user), "--delta", f"d={lab.same}@0.75", "--suite", "retained", "--limit", "2"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    assert results(tmp_path)["strengths"] == [0, 0.75]


def test_further_deltas_keep_their_strength(lab: Lab, tmp_path: Path) -> None:
    words = ["--delta", f"e={lab.other}@0.5", "--suite", "retained", "--strengths", 2, "--limit", 3]
    assert run(lab, tmp_path, *words) == 0
    model = FusedLM.load(lab.user, {"d": lab.same, "e": lab.other})
    expected = score_references(
        Measurement(model, lambda strength: {"d": strength, "e": 0.5}, quiet=True),
        read_tasks(NEUTRAL_TEXTS, 3),
        2.0,
        "",
    )
    assert results(tmp_path)["suites"]["retained"]["by_strength"][1]["items"]["total"] == pytest.approx(
        expected.total, rel=1e-4
    )


def test_forget_quality_against_a_retain_only_model(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rouge_score")
    retain_only = tmp_path / "retain"
    tofu = ["--suite", "tofu", "--tofu", lab.tofu]
    assert main(["eval", str(lab.tuned), *map(str, tofu), "-o", str(retain_only)]) == 0
    file = retain_only / "results.json"
    assert run(lab, tmp_path / "a", *tofu, "--strengths", 1, "--retain-only", file) == 0
    base, one = results(tmp_path / "a")["suites"]["tofu"]["by_strength"]
    for entry in (base, one):
        assert set(entry["forget_quality"]) == {"geometric", "arithmetic"}
        assert 0 < entry["forget_quality"]["geometric"]["p_value"] <= 1
    assert "forget quality (p), geometric" in (tmp_path / "a" / "report.html").read_text("utf-8")

    capsys.readouterr()
    assert run(lab, tmp_path / "fewer", *tofu, "--limit", 1, "--retain-only", file) == 2
    assert "about other questions" in capsys.readouterr().err and not (tmp_path / "fewer").exists()
    assert run(lab, tmp_path / "b", *tofu, "--retain-only", tmp_path / "a" / "results.json") == 2
    assert "same user LLM" in capsys.readouterr().err
    assert run(lab, retain_only, *tofu, "--retain-only", file) == 2
    assert "is the file that this run would write" in capsys.readouterr().err
    # The same model under another path is found out by its numbers.
    shutil.copytree(lab.tuned, tmp_path / "copy")
    code = main(
        ["eval", str(tmp_path / "copy"), *map(str, tofu), "-o", str(tmp_path / "c"), "--retain-only", str(file)]
    )
    assert code == 2 and "comparing a run with itself" in capsys.readouterr().err
    other = write_tofu(tmp_path / "tofu", ["sun", "sea"])
    assert run(lab, tmp_path / "d", "--suite", "tofu", "--tofu", other, "--retain-only", file) == 2
    assert "other questions" in capsys.readouterr().err


def test_the_advised_range_goes_into_the_manifest(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(lab.same, delta)
    DeltaManifest(name="mine").write(delta)
    # Of some pairs of letters those that this random delta makes likelier.
    model = FusedLM.load(lab.user, {"d": delta})
    pairs = [("What is rain?", first + second) for first in "abcdefgh" for second in "stuvwxyz"]
    base, steered = (model.score_batch(pairs, {"d": strength}) for strength in (0.0, 1.0))
    gains = [float((after - before).mean()) for before, after in zip(base, steered, strict=True)]
    best = sorted(range(len(pairs)), key=lambda index: -gains[index])[:4]
    records = [{"prompt": pairs[index][0], "response": pairs[index][1]} for index in best]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    words = ["eval", str(lab.user), "--delta", f"d={delta}", "--suite", "sweep", "--prompts", str(prompts)]
    words += ["--strengths", "0.5", "1", "--limit", "4", "-o", str(tmp_path / "out"), "--write-manifest"]
    assert main([*words, "--max-loss", "1000"]) == 0
    sweep = results(tmp_path / "out")["suites"]["sweep"]
    assert sweep["effect"] == "target" and sweep["advised_range"][1] == 1
    assert DeltaManifest.read(delta) == DeltaManifest(name="mine", advised_range=tuple(sweep["advised_range"]))
    capsys.readouterr()
    before = (delta / "cmc_delta.json").read_bytes()
    assert main([*words, "--max-loss", "0"]) == 0
    assert "manifest is left as it was" in capsys.readouterr().err
    assert (delta / "cmc_delta.json").read_bytes() == before


def test_effects_have_their_sign(lab: Lab) -> None:
    model = FusedLM.load(lab.user, {"d": lab.same})
    options = EvalOptions(user=str(lab.user), deltas=(DeltaSource(name="d", path=str(lab.same)),), strengths=(1.0,))
    measured = Measurement(model, lambda strength: {"d": strength}, quiet=True)
    tasks = read_tasks(lab.prompts)
    gain = effect_by_strength(options, measured, "target", tasks, [])
    losses = {strength: score_references(measured, tasks, strength, "") for strength in (0.0, 1.0)}
    assert gain[1.0].mean == pytest.approx(losses[0.0].mean().mean - losses[1.0].mean().mean, abs=1e-5)
    assert gain[0.0].mean == 0 and gain[1.0].low <= gain[1.0].mean <= gain[1.0].high


def test_deltas_that_were_trained_to_forget_are_swept_for_it(lab: Lab, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(lab.same, delta)
    DeltaManifest(objective="grad_diff").write(delta)
    words = ["eval", str(lab.user), "--delta", f"d={delta}@1", "--suite", "sweep", "--tofu", str(lab.tofu)]
    assert main([*words, "--limit", "3", "-o", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["suites"]["sweep"]["effect"] == "forget"


MISTAKES = {
    "There is no suite 'tofuu'": ["--suite", "tofuu"],
    "finite numbers": ["--strengths", "nan"],
    "--limit must be": ["--limit", "0"],
    "--max-tokens must be": ["--max-tokens", "0"],
    "--batch-size must be": ["--batch-size", "0"],
    "--max-loss must be": ["--max-loss", "nan"],
    "--forget must be one of": ["--forget", "forget99"],
    "--effect must be one of": ["--effect", "niceness"],
    "--dtype must be": ["--dtype", "float8"],
    "--write-manifest needs --suite sweep": ["--write-manifest"],
    "--retain-only needs --suite tofu": ["--retain-only", "x.json"],
    "--suite shift needs --tuned": ["--suite", "shift"],
    "give --prompts with an answer to every prompt": ["--suite", "sweep"],
    "prompts file /nowhere.jsonl cannot be read": ["--suite", "alpaca", "--prompts", "/nowhere.jsonl"],
    "forget01_perturbed.json does not exist": ["--suite", "tofu", "--tofu", "/nowhere"],
    "retain-only results /nowhere.json do not exist": ["--suite", "tofu", "--retain-only", "/nowhere.json"],
    "must be written NAME=PATH": ["--delta", "nameless"],
    "same name": ["--delta", "d=/nowhere"],
    "delta folder /nowhere does not exist": ["--delta", "e=/nowhere"],
    "no device 'nonsense' here": ["--device", "nonsense", "--suite", "retained"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(lab: Lab, tmp_path: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lab, tmp_path / "out", *MISTAKES[sentence]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("cmc-server: ") and len(printed.err.strip().splitlines()) == 1


def test_settings_that_change_nothing_are_told(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--suite", "retained", "--limit", 2, "--strengths", 1, "--effect", "length", "--forget", "forget05"]
    assert run(lab, tmp_path, *words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: --" in line]
    assert said == [
        "cmc-server: warning: --forget changes nothing, since it is for --suite tofu or sweep.",
        "cmc-server: warning: --effect changes nothing, since it is for --suite sweep.",
        "cmc-server: warning: --max-tokens changes nothing, since it is for --suite alpaca or sweep or shift.",
    ]


def test_weights_of_the_user_llm_that_are_cut(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(lab.user, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert main(["eval", str(tmp_path / "cut"), "--suite", "retained", "-o", str(tmp_path / "out")]) == 2
    assert "cut cannot be loaded" in capsys.readouterr().err


def test_mistakes_about_the_user_llm(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "/nowhere", "--suite", "retained", "-o", str(tmp_path / "out")]) == 2
    assert "/nowhere" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(lab.user, bare)
    (bare / "chat_template.jinja").unlink()
    assert main(["eval", str(bare), "--suite", "retained", "-o", str(tmp_path / "out")]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["eval", str(lab.user), "--suite", "coverage", "-o", str(tmp_path / "out")]) == 2
    assert "need a --delta" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(lab, tmp_path / "file") == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert run(lab, tmp_path / "file" / "below", "--suite", "retained") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_tuned_model_of_another_vocabulary(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--suite", "shift", "--prompts", lab.prompts, "--strengths", 1]
    assert run(lab, tmp_path / "out", *words, "--tuned", lab.other) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_what_was_measured_stays_when_a_later_suite_fails(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmc_server.evaluation.command.coverage_suite", broken)
    with pytest.raises(KeyboardInterrupt):
        run(lab, tmp_path, "--suite", "retained", "coverage", "--strengths", 1, "--limit", 2)
    assert results(tmp_path)["finished"] is False and set(results(tmp_path)["suites"]) == {"retained"}


def test_a_sinkhorn_iteration_that_does_not_end_costs_its_figure_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmc_server.evaluation.sinkhorn._SWEEPS", 1)
    monkeypatch.setattr("cmc_server.evaluation.sinkhorn._MAX_SWEEPS", 1)
    words = ["--suite", "shift", "--tuned", lab.tuned, "--prompts", lab.prompts, "--strengths", 1, "--limit", 2]
    assert run(lab, tmp_path, *words) == 0
    (comparison,) = results(tmp_path)["suites"]["shift"]["comparisons"].values()
    assert comparison["sinkhorn"] is None and comparison["num_unconverged"] == 2
    assert "did not converge" in (tmp_path / "report.html").read_text("utf-8")
