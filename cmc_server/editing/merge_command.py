"""``cmc-server merge``: merge checkpoints that were trained from one base, or take the training of one out again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmc_server import __version__
from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.curvature import CurvatureFile
from cmc_server.editing.merge_inputs import Merge
from cmc_server.editing.merge_methods import Guard
from cmc_server.editing.merge_options import MergeOptions
from cmc_server.editing.runs import check_finite, identity, output_folder, progress, result_of, run_dry, write_weights
from cmc_server.editing.sources import Sources
from cmc_server.editing.stream import Edit
from cmc_server.editing.writing import check_output, check_record

_TOO_LARGE = "the merged weights are too large to be measured; give --weights, --alphas or --factor nearer to 0"


def run_merge(options: MergeOptions, as_json: bool = False) -> int:
    """Merge checkpoints. Progress and warnings go to stderr, the report to stdout.

    Args:
        options: what to do.
        as_json: print the report as one JSON object instead of as text.

    Returns:
        The exit code, 0.

    Raises:
        EditingError: a checkpoint or a curvature file cannot be used, or the output not be written.
        ConfigError: data cannot be used.
    """
    sources = Sources(
        base=None if options.zero_base else Checkpoint(Path(options.base)),
        posts=tuple(Checkpoint(path) for path in options.models),
        # What is left of a base is that base; what is merged is presented as the first model is.
        as_base=options.remove and not options.zero_base,
    )
    target = None if options.against is None else Checkpoint(options.against)
    if options.output is not None:
        files = [options.against, *options.data, *options.curvature, options.base_curvature]
        read = [*(one.folder for one in sources.checkpoints), *files]
        check_output(options.output, read, force=options.force, dry_run=options.dry_run)
    check_record(sources.layout.folder)
    merge = Merge(options, sources)
    report = _describe(options, merge)
    if target is not None or options.data:
        from cmc_server.editing.merge_evaluation import evaluate_merge

        report["metrics"] = evaluate_merge(merge, target)
        check_finite(report["metrics"], _TOO_LARGE, "metrics")
    edit = merge.edit()
    if options.dry_run or options.output is None:
        run_dry(edit)
        report["result"] = _result(edit, merge.guard)
    else:
        folder = output_folder(sources.layout, options.output, report, force=options.force)
        with folder as part, progress(sources, "merge") as advance:
            write_weights(edit, part, advance)
            report["result"] = _result(edit, merge.guard)
    _warn(report)
    sys.stdout.write(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n" if as_json else _text(report))
    return 0


def _describe(options: MergeOptions, merge: Merge) -> dict[str, Any]:
    """What is done to what: with the result, the provenance of the output."""
    described: dict[str, Any] = {
        "cmc_server": __version__,
        "method": options.method,
        "removed": options.remove,
        "options": options.build().model_dump(mode="json"),
        "base": identity(merge.sources.base),
        "models": [identity(model) for model in merge.sources.posts],
    }
    if merge.files:
        described["curvature"] = [_measured(file) for file in merge.files]
    if merge.base_file is not None:
        described["base_curvature"] = _measured(merge.base_file)
    return described


def _measured(file: CurvatureFile) -> dict[str, Any]:
    origin = file.origin
    return {
        "file": file.path.name,
        "made": origin.made,
        "num_examples": origin.num_examples,
        "dataset_size": origin.dataset_size,
    }


def _result(edit: Edit, guard: Guard) -> dict[str, Any]:
    result = result_of(edit)
    del result["norm_before"]  # of the first model alone
    check_finite(result, _TOO_LARGE, "result")
    return result | {"clamped": guard.num_clamped}


def _warn(report: Mapping[str, Any]) -> None:
    clamped, total = report["result"]["clamped"], report["result"]["delta_parameters"]
    if clamped:
        sys.stderr.write(
            f"cmc-server: warning: H0 is not far enough above alpha Ht for {clamped:,} of {total:,} weights "
            f"({clamped / total:.1%}); their Ht was scaled down (--floor {report['options']['floor']}).\n"
        )


def _text(report: Mapping[str, Any]) -> str:
    result, count = report["result"], len(report["models"])
    what = "removed" if report["removed"] else "merged"
    metrics: list[str] = []
    if "metrics" in report:
        from cmc_server.editing.merge_evaluation import metrics_table

        metrics = ["", *metrics_table(report["metrics"], [model["folder"] for model in report["models"]])]
    lines = [
        f"{report['method']}: {what} {count} model{'' if count == 1 else 's'}, {result['edited_tensors']} tensors "
        f"({result['copied_tensors']} copied), {result['delta_parameters']:,} delta parameters, "
        f"norm {result['norm_after']:.6g}",
        *metrics,
        "",
        f"written to {report['output']}" if "output" in report else "dry run: nothing was written",
    ]
    return "\n".join(lines) + "\n"
