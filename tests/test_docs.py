"""The documents for operators: links lead somewhere, figures follow their formulas, limits are those of the code."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest

from cmc_server.api.options import parse_options
from cmc_server.config import DeltaSource, EngineSettings
from cmc_server.delta.capacity import memory_needed
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.store import open_delta

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SCALING = (ROOT / "docs" / "scaling.md").read_text("utf-8")
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text("utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")
BUDGET = EngineSettings().delta_memory * 2**30


def table(text: str, head: str) -> list[list[str]]:
    """The cells below the heading row that begins with ``head``."""
    below = text[text.index(f"| {head}") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in below]


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


def headings(page: Path) -> set[str]:
    """As they are written in links."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text("utf-8")):
        target, _, heading = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), link
        assert not heading or heading in headings(page)


@pytest.mark.parametrize("path", [ROOT / "SECURITY.md", ROOT / "docs" / "deployment.md", ROOT / "docs" / "scaling.md"])
def test_named_files_exist(path: Path) -> None:
    places = (ROOT, ROOT / "cmc_server", ROOT / "deploy" / "kubernetes")
    for name in re.findall(r"`([\w./-]+/[\w./-]+\.\w+|(?:tests|deploy)/[\w./-]+)`", path.read_text("utf-8")):
        assert any((place / name).exists() for place in places), name


def test_table_of_delta_memory_follows_the_formula() -> None:
    for name, weights, shape, weight_bytes, row_bytes, rows in table(SCALING, "Delta | W"):
        layers, heads, size, context = (int(number(cell)) for cell in shape.split(", "))
        total = 2 * number(weights)
        per_row = 2 * 2 * layers * heads * size * 32 * math.ceil(context / 32)
        assert weight_bytes == f"{total / 1e6:.1f} MB"
        assert number(row_bytes) == pytest.approx(per_row / 1e6, abs=0.05)
        assert number(rows) == (BUDGET - total) // per_row
        shipped = re.match(r"`([\w-]+)`", name)
        if shipped:
            artifact = open_delta(DeltaSource(name="d", path=str(ROOT / "cmc_server" / "demo" / shipped[1])))
            assert artifact.num_weights == number(weights)
            assert memory_needed(artifact, 3, 2, False) == total + 3 * per_row


def test_table_of_broadcasts_follows_the_formula() -> None:
    for case, size, *times in table(SCALING, "D, rows"):
        vocabulary, rows = (number(cell) for cell in case.split(", "))
        assert size == f"{4 * rows * vocabulary / 1e6:.1f} MB"
        rates = (450e9, 64e9, 50e9, 12.5e9)
        assert times == [f"{4 * rows * vocabulary / rate * 1e3:.3f}" for rate in rates]


def test_table_of_shares_follows_the_formula() -> None:
    for model, ranks, *shares in table(SCALING, "Large model | N"):
        layers, width = (number(found) for found in re.match(r"(\d+) layers, h = ([\d,]+)", model).groups())  # type: ignore[union-attr]
        ring = 2 * (number(ranks) - 1) / number(ranks) * 2 * layers * 2 * width
        assert shares == [f"{4 * vocabulary / ring:.0%}".replace("%", " %") for vocabulary in (32_000, 49_152, 151_936)]


def test_limits_are_those_of_the_code() -> None:
    source = (ROOT / "cmc_server" / "api" / "middleware.py").read_text("utf-8")
    assert "MAX_BODY_BYTES: Final = 256 * 1024 * 1024" in source
    assert f"{256 * 2**20:,} bytes" in SECURITY
    template = DeltaManifest.model_json_schema()["properties"]["prompt_template"]["anyOf"][0]["maxLength"]
    assert f"at most {template:,} characters" in SECURITY
    settings = EngineSettings()
    assert f"`--max-deltas` deltas ({settings.max_deltas_per_request})" in SECURITY
    assert "`--strength-bounds` ({:g} to {:g})".format(*settings.strength_bounds) in SECURITY
    assert f"`--delta-memory` ({settings.delta_memory:g} GiB)" in SCALING
    assert f"`--delta-memory` ({settings.delta_memory:g} GiB)" in DEPLOYMENT


def test_paths_that_a_key_guards_are_those_that_vllm_guards() -> None:
    package = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    source = (package / "entrypoints" / "serve" / "middleware" / "authenticate.py").read_text("utf-8")
    guarded = re.findall(r'"(/\w+)"', re.search(r"GUARDED_PREFIX = \((.*)\)", source)[1])  # type: ignore[index]
    sentence = SECURITY[SECURITY.index("paths below") : SECURITY.index("want a key")]
    assert re.findall(r"`(/\w+)`", sentence) == guarded


def test_own_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    ours = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = {name for text in (SCALING, DEPLOYMENT, SECURITY) for name in re.findall(r"`(--[\w-]*delta[\w-]*)", text)}
    assert named <= ours
