"""``cmc-server map``: build the map between two vocabularies, show what it covers and, if asked, keep it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmc_server.errors import MapError
from cmc_server.vocab.special import read_overrides
from cmc_server.vocab.stats import KIND_NAMES, map_statistics
from cmc_server.vocab.surface import load_tokenizer, load_vocabulary, read_generation_config, read_vocabulary
from cmc_server.vocab.vocab_map import build_map

_NUM_SCRIPTS = 12
_log = logging.getLogger(__name__)


def run_map(
    user: str, delta: str, output: Path | None, overrides: Path | None, sample: Path | None, as_json: bool
) -> int:
    """Build and report the map from ``user`` to ``delta``.

    Args:
        user: folder or hub id of the user LLM.
        delta: folder or hub id of the delta model.
        output: where to write the map; None writes nothing.
        overrides: file of overrides, see :func:`cmc_server.vocab.special.read_overrides`.
        sample: UTF-8 text for the statistics by token frequency.
        as_json: print one JSON object instead of tables.

    Returns:
        The exit code 0.

    Raises:
        MapError: anything the caller can correct.
    """
    pairs = None if overrides is None else read_overrides(overrides)
    text = None if sample is None else _read_sample(sample)
    _log.info("Reading the tokenizers of %s and %s", user, delta)
    user_tokenizer = load_tokenizer(user)
    user_vocabulary = read_vocabulary(user_tokenizer, read_generation_config(user))
    delta_vocabulary = load_vocabulary(delta)
    start = time.perf_counter()
    vocabulary_map = build_map(user_vocabulary, delta_vocabulary, pairs)
    seconds = time.perf_counter() - start
    if output is not None:
        vocabulary_map.save(output)
        _log.info("Wrote %s", output)
    sample_ids = None
    if text is not None:
        tokenizer = user_tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        sample_ids = tokenizer.encode(text, add_special_tokens=False).ids
    report = {
        "user": user,
        "delta": delta,
        "output": None if output is None else str(output),
        "build_seconds": round(seconds, 4),
        "user_fingerprint": vocabulary_map.user_fingerprint,
        "delta_fingerprint": vocabulary_map.delta_fingerprint,
        "algorithm_version": vocabulary_map.algorithm_version,
        **map_statistics(vocabulary_map, user_vocabulary, delta_vocabulary, sample_ids),
    }
    sys.stdout.write(json.dumps(report) + "\n" if as_json else _tables(report))
    return 0


def _read_sample(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MapError(f"The sample text {path} cannot be read as UTF-8: {error}.") from None


def _tables(report: Mapping[str, Any]) -> str:
    identity = ", the same tokenizer on both sides" if report["identity"] else ""
    lines = [
        f"user   {report['user']}: {report['user_tokens']:,} tokens, {report['ordinary']:,} of them ordinary",
        f"delta  {report['delta']}: {report['delta_tokens']:,} tokens{identity}",
        f"coverage of the ordinary tokens: {report['coverage']:.1%}, built in {report['build_seconds']:.2f} s",
        "",
        *(f"{name:<24}{count:>9,}" for name, count in report["match"].items()),
        "",
        *_rows("script", list(report["scripts"].items())[:_NUM_SCRIPTS]),
        *_more(len(report["scripts"]) - _NUM_SCRIPTS),
        "",
        *(f"{_quoted(user)} -> {_quoted(delta)}" for user, delta in report["special"].items()),
    ]
    if "sample" in report:
        lines += ["", *_sample_lines(report["sample"])]
    if report["output"]:
        lines += ["", f"written to {report['output']}"]
    return "\n".join(lines) + "\n"


def _sample_lines(sample: Mapping[str, Any]) -> list[str]:
    bands = [(f"ranks {band['ranks'][0]:,}-{band['ranks'][1]:,}", band) for band in sample["bands"]]
    lines = _rows("occurrences in the sample", [*bands, ("all", sample)], total="occurrences")
    for title in ("most_frequent_unmapped", "most_frequent_inexact"):
        tokens = ", ".join(f"{_quoted(token)} {count:,}" for token, count in sample[title].items())
        lines.append(f"{title.replace('_', ' ')}: {tokens or 'none'}")
    return lines


def _rows(title: str, rows: list[tuple[str, Mapping[str, Any]]], total: str = "tokens") -> list[str]:
    kinds = KIND_NAMES[:4]
    lines = [f"{title:<26}{total:>12}{'coverage':>10}" + "".join(f"{kind:>11}" for kind in kinds)]
    for name, row in rows:
        numbers = "".join(f"{row[kind]:>11,}" for kind in kinds)
        lines.append(f"{name:<26}{row[total]:>12,}{row['coverage']:>10.1%}{numbers}")
    return lines


def _more(hidden: int) -> list[str]:
    return [f"and {hidden} more (all with --json)"] if hidden > 0 else []


def _quoted(content: str | None) -> str:
    return "unmapped" if content is None else json.dumps(content, ensure_ascii=False)
