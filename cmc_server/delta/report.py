"""``cmc-server inspect``: what a delta is, and how well it fits a user LLM."""

from __future__ import annotations

import json
import sys
from typing import Any

from cmc_server.config import DeltaSource
from cmc_server.delta.prompt import DEFAULT_TEMPLATE
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.vocab.surface import load_vocabulary
from cmc_server.vocab.vocab_map import cached_map


def run_inspect(delta: str, user: str | None, as_json: bool) -> int:
    """Report on a delta.

    Args:
        delta: folder or hub id.
        user: folder or hub id of a user LLM to map to, or None.
        as_json: print one JSON object instead of lines.

    Returns:
        The exit code, 0.

    Raises:
        UserError: the delta or the user LLM cannot be read.
    """
    artifact = open_delta(DeltaSource(name="delta", path=delta))
    artifact.tokenizer()
    report = describe(artifact)
    report["name"] = artifact.manifest.name or artifact.path.name
    if user is not None:
        vocab_map = cached_map(load_vocabulary(user), load_vocabulary(str(artifact.path)))
        report["map"] = {"user": user, "coverage": vocab_map.coverage, **vocab_map.counts}
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n" if as_json else _as_lines(report))
    return 0


def describe(artifact: DeltaArtifact) -> dict[str, Any]:
    """What a delta says of itself, with the defaults filled in; JSON-able."""
    manifest = artifact.manifest
    return {
        "name": artifact.name,
        "version": artifact.version,
        "description": manifest.description,
        "template_llm": manifest.template_llm,
        "objective": manifest.objective,
        "strength": artifact.strength,
        "advised_range": manifest.advised_range,
        "unmapped": manifest.unmapped or "zero",
        "context_length": artifact.context_length,
        "vocab_size": artifact.vocab_size,
        "weight_bytes": artifact.weight_bytes,
        "prompt_template": manifest.prompt_template or DEFAULT_TEMPLATE,
        "license": manifest.license,
        "training": manifest.training,
    }


def _as_lines(report: dict[str, Any]) -> str:
    lines = []
    for key, value in report.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple, str)) else value
        lines.append(f"{key:>16}  {shown}\n")
    return "".join(lines)
