"""The report: one file, nothing outside it, and nothing of a model's answer taken for markup."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from cmc_server.evaluation.report import Sample, Section, Table, render_report


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"\x89PNG picture")
    section = Section(
        "TOFU",
        "It forgets.",
        "What it means.",
        [Table(["strength", "P"], [["0", "0.9 [0.8, 1.0]"]], "numbers")],
        plot,
        [Sample("Who?", [("0", "<script>alert(1)</script>"), ("1", "")])],
    )
    page = render_report("concise on llm", [("User LLM", "llm & friends")], [section])
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "llm &amp; friends" in page and "(nothing)" in page
    assert base64.b64encode(plot.read_bytes()).decode() in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#s\d)', page)
    assert "http" not in page
    for text in ("It forgets.", "What it means.", "numbers", "0.9 [0.8, 1.0]", "Who?"):
        assert text in page
