"""Results on disk: one JSON file with everything, one CSV file with every figure in a row of its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmc_server.errors import ConfigError
from cmc_server.evaluation.tofu import FORGET, SetScores

RESULTS_JSON = "results.json"
RESULTS_CSV = "results.csv"
FORMAT_VERSION = 1
_COLUMNS = ("suite", "strength", "metric", "mean", "low", "high")
#: Keys below which there are no figures for the CSV.
_NOT_TABULATED = {"items", "answers", "strength"}


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and ``results.csv``.

    Raises:
        OSError: a file cannot be written.
    """
    # allow_nan=False: what is not a number is a bug, and no valid JSON.
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS_JSON).write_text(text + "\n", encoding="utf-8")
    with (folder / RESULTS_CSV).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows(results))


def rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every figure: suite, strength, metric (its path in the JSON), mean and, where there is one, its interval."""
    for suite, content in results["suites"].items():
        for entry in content.get("by_strength", ()):
            for metric, value in _figures(entry, ""):
                yield {"suite": suite, "strength": entry["strength"], "metric": metric, **value}
        rest = {key: value for key, value in content.items() if key in ("deltas", "comparisons")}
        for metric, value in _figures(rest, ""):
            yield {"suite": suite, "strength": "", "metric": metric, **value}


def _figures(value: Any, path: str) -> Iterator[tuple[str, dict[str, float]]]:
    if isinstance(value, Mapping):
        if set(value) == {"mean", "low", "high"}:
            yield path, dict(value)
            return
        for key, inner in value.items():
            if key not in _NOT_TABULATED:
                yield from _figures(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, {"mean": value}


def read_forget_scores(path: Path, user: str) -> SetScores:
    """The figures of a retain-only model on the forget set: those at strength 0 of an earlier evaluation.

    Args:
        path: its ``results.json``.
        user: the user LLM under evaluation, which must be another one.

    Raises:
        ConfigError: the file cannot be used, or is about the same user LLM.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        same = results["user"] == user
        entry = next(one for one in results["suites"]["tofu"]["by_strength"] if one["strength"] == 0)["sets"][FORGET]
        scores = SetScores(name=FORGET, questions=entry["questions_sha256"], **entry["items"])
    except FileNotFoundError:
        raise ConfigError(f"The retain-only results {path} do not exist.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise ConfigError(
            f"{path} holds no TOFU results at strength 0; give the results.json of cmc-server eval --suite tofu for "
            "the retain-only model."
        ) from None
    if same:
        raise ConfigError(
            f"{path} was made from the same user LLM, {user}; forget quality compares with another model, one that was "
            "trained without the forget set."
        )
    return scores
