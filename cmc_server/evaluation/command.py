"""``cmc-server eval``: measure what a delta does to a user LLM, and write results, plots and a report."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cmc_server
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.errors import ConfigError, UserError
from cmc_server.evaluation.engine import Measurement
from cmc_server.evaluation.options import EvalOptions
from cmc_server.evaluation.plots import require_matplotlib
from cmc_server.evaluation.prompts import NEUTRAL_TEXTS, Task, alpaca_records, read_tasks
from cmc_server.evaluation.report import render_report
from cmc_server.evaluation.results import FORMAT_VERSION, RESULTS_JSON, read_forget_scores, write_results
from cmc_server.evaluation.rouge import require_rouge
from cmc_server.evaluation.sections import build_sections
from cmc_server.evaluation.shift_run import shift_suite
from cmc_server.evaluation.suites import (
    alpaca_suite,
    coverage_suite,
    retained_suite,
    sweep_suite,
    tofu_suite,
)
from cmc_server.evaluation.sweep import UNLEARNING, write_advised_range
from cmc_server.evaluation.tofu import FORGET, SetScores, check_questions, questions_hash
from cmc_server.evaluation.tofu_data import TofuItem, read_tofu
from cmc_server.fusion.scoring import FusedLM

REPORT_HTML = "report.html"


@dataclass(frozen=True)
class _Inputs:
    """Everything that is read before the models are."""

    artifacts: list[DeltaArtifact]
    tofu: dict[str, list[TofuItem]]
    retain_only: SetScores | None
    texts: list[Task]
    tasks: list[Task]
    effect: str | None


def run_eval(options: EvalOptions, as_json: bool = False) -> int:
    """``cmc-server eval``: progress goes to stderr, the summary to stdout.

    Args:
        options: what to measure.
        as_json: print the results as one JSON object instead of the summary.

    Returns:
        The exit code, 0.

    Raises:
        UserError: an input cannot be used, or the output folder cannot be written.
    """
    results = evaluate(options)
    if as_json:
        sys.stdout.write(json.dumps(results, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        sys.stdout.write(f"{options.output / REPORT_HTML}\n")
    return 0


def evaluate(options: EvalOptions, user: FusedLM | None = None) -> dict[str, Any]:
    """Evaluate, and write everything into the output folder.

    Args:
        options: what to measure.
        user: the user LLM where it is loaded already; what it has kept of the texts is used again.

    Returns:
        The results, as they are in ``results.json``.

    Raises:
        UserError: an input cannot be used, or the output folder cannot be written.
    """
    inputs = _read(options)
    for sentence in options.idle:
        sys.stderr.write(f"cmc-server: warning: {sentence}\n")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The output folder {options.output} cannot be made: {error.strerror}.") from None
    deltas = {delta.name: delta.path for delta in options.deltas}
    user = user or FusedLM.load(options.user, {}, dtype=options.dtype, device=options.device)
    model = user.with_deltas(deltas)
    measurement = _measurement(options, model, inputs.artifacts)
    results = _header(options, inputs.artifacts) | {"finished": False, "suites": {}}
    try:
        for suite, content in _measure(options, inputs, measurement, model):
            results["suites"][suite] = content
            # What took long is not lost if a later suite fails.
            write_results(results, options.output)
        results["finished"] = True
        _write(options, results)
    except OSError as error:
        raise ConfigError(f"The results cannot be written to {options.output}: {error.strerror}.") from None
    return results


def _read(options: EvalOptions) -> _Inputs:
    """Every file but the models, so that a mistake costs seconds."""
    require_matplotlib()
    _check_device(options.device)
    chosen = set(options.suites)
    artifacts = [open_delta(source) for source in options.deltas]
    effect = _effect(options, artifacts) if "sweep" in chosen else None
    if "tofu" in chosen:
        require_rouge()
    if options.retain_only is not None and options.retain_only.resolve() == (options.output / RESULTS_JSON).resolve():
        raise ConfigError(f"--retain-only {options.retain_only} is the file that this run would write; move it first.")
    needs_tofu = "tofu" in chosen or effect == "forget"
    needs_prompts = bool({"alpaca", "coverage", "shift"} & chosen) or effect in ("target", "length")
    tasks = read_tasks(options.prompts_file, options.limit) if needs_prompts else []
    if effect == "target" and (options.prompts is None or any(task.reference is None for task in tasks)):
        raise ConfigError(
            "The sweep's effect is the likelihood of reference answers; give --prompts with an answer to every prompt, "
            "or choose --effect length or --effect forget."
        )
    tofu = read_tofu(options.tofu, options.forget, options.limit) if needs_tofu else {}
    retain_only = None if options.retain_only is None else read_forget_scores(options.retain_only, options.user)
    if retain_only is not None:
        check_questions(questions_hash([item.question for item in tofu[FORGET]]), retain_only)
    return _Inputs(
        artifacts=artifacts,
        tofu=tofu,
        retain_only=retain_only,
        texts=read_tasks(NEUTRAL_TEXTS, options.limit),
        tasks=tasks,
        effect=effect,
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter where torch was built without it
        raise ConfigError(f"There is no device {device!r} here; choose another --device, such as cpu.") from None


def _effect(options: EvalOptions, artifacts: Sequence[DeltaArtifact]) -> str:
    unlearned = artifacts[0].manifest.objective in UNLEARNING
    return options.effect or ("forget" if unlearned else "target")


def _measurement(options: EvalOptions, model: FusedLM, artifacts: Sequence[DeltaArtifact]) -> Measurement:
    if model.tokenizer.chat_template is None:
        raise ConfigError(
            f"The tokenizer of {options.user} has no chat template, which every question needs; add one to its folder."
        )
    if model.tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer of {options.user} has no eos token, which ends every answer; set one.")
    own = {artifact.name: artifact.strength for artifact in artifacts}

    def strengths(strength: float) -> Mapping[str, float]:
        return own | {artifacts[0].name: strength} if artifacts else own

    return Measurement(model, strengths, batch_size=options.batch_size)


def _measure(
    options: EvalOptions, inputs: _Inputs, measurement: Measurement, model: FusedLM
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chosen suites with what they found, one after the other."""
    chosen = set(options.suites)
    if "tofu" in chosen:
        yield "tofu", tofu_suite(options, measurement, inputs.tofu, inputs.retain_only)
    if chosen & {"retained", "sweep"}:
        retained, losses = retained_suite(options, measurement, inputs.texts)
        if inputs.effect is not None:
            forget = inputs.tofu.get(FORGET, [])
            yield "sweep", sweep_suite(options, measurement, inputs.effect, inputs.tasks, forget, losses)
        yield "retained", retained
    if "alpaca" in chosen:
        alpaca, answers = alpaca_suite(options, measurement, inputs.tasks)
        _write_alpaca(options, alpaca, inputs.tasks, answers)
        yield "alpaca", alpaca
    if "coverage" in chosen:
        folders = {artifact.name: str(artifact.path) for artifact in inputs.artifacts}
        yield "coverage", coverage_suite(options, folders, _texts(inputs))
    if "shift" in chosen:
        yield "shift", shift_suite(options, measurement, model, inputs.tasks)


def _texts(inputs: _Inputs) -> list[str]:
    """Everything that this evaluation gives the LLM to read."""
    tofu = [f"{item.question}\n{item.answer}" for items in inputs.tofu.values() for item in items]
    return tofu + [f"{task.instruction}\n{task.reference or ''}" for task in [*inputs.texts, *inputs.tasks]]


def _write_alpaca(
    options: EvalOptions, suite: dict[str, Any], tasks: Sequence[Task], answers: Mapping[float, Sequence[str]]
) -> None:
    first, others = options.deltas[:1], [f"+{delta.name}" for delta in options.deltas[1:]]
    for entry in suite["by_strength"]:
        strength = entry["strength"]
        # At strength 0 the delta under study is not there.
        studied = [f"+{delta.name}@{strength:g}" for delta in first if strength]
        generator = "".join([_short_name(options.user), *studied, *others])
        file = f"alpaca_{re.sub('[^A-Za-z0-9.+@-]', '_', generator)}.json"
        records = alpaca_records(tasks, answers[strength], generator, options.prompts_file.stem)
        text = json.dumps(records, indent=1, ensure_ascii=False)
        (options.output / file).write_text(text + "\n", encoding="utf-8")
        entry["file"] = file
    suite["samples"] = [
        {
            "prompt": tasks[index].instruction,
            "answers": [[f"{strength:g}", some[index]] for strength, some in answers.items()],
        }
        for index in range(0, len(tasks), max(1, len(tasks) // 5))
    ]


def _header(options: EvalOptions, artifacts: Sequence[DeltaArtifact]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "software": {"cmc_server": cmc_server.__version__}
        | {name: version(name) for name in ("torch", "transformers", "numpy")},
        "user": options.user,
        "deltas": [
            {"name": one.name, "version": one.version, "strength": one.strength, "objective": one.manifest.objective}
            for one in artifacts
        ],
        "strengths": options.measured_strengths,
        "limit": options.limit,
        "dtype": options.dtype,
        "seed": options.seed,
    }


def _write(options: EvalOptions, results: dict[str, Any]) -> None:
    sections = build_sections(results, options.output)
    studied = options.deltas[0].name if options.deltas else None
    limit = "all questions" if options.limit is None else f"only the first {options.limit} of each kind"
    facts = [
        ("User LLM", options.user),
        ("Deltas", ", ".join(f"{one['name']} (version {one['version']})" for one in results["deltas"]) or "none"),
        ("Strengths", ", ".join(f"{strength:g}" for strength in results["strengths"])),
        ("Data", limit),
        ("Computed in", f"{options.dtype}, greedy decoding, cmc-server {cmc_server.__version__}"),
    ]
    user = _short_name(options.user)
    title = f"{studied} on {user}" if studied else f"{user}, no delta"
    report = render_report(title, facts, sections)
    (options.output / REPORT_HTML).write_text(report, encoding="utf-8")
    write_results(results, options.output)
    if options.write_manifest:
        _write_manifest(options, results["suites"]["sweep"])


def _short_name(user: str) -> str:
    """The last part of a folder or hub id, such as for ``.`` too."""
    return Path(user).name or Path(user).resolve().name


def _write_manifest(options: EvalOptions, sweep: Mapping[str, Any]) -> None:
    if sweep["advised_range"] is None:
        sys.stderr.write(f"The manifest is left as it was. {sweep['reason']}\n")
        return
    folder = Path(options.deltas[0].path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--write-manifest needs a delta in a local folder, and {options.deltas[0].path} is none.")
    low, high = sweep["advised_range"]
    write_advised_range(folder, (low, high))
