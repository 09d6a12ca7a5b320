"""No pinned package has a known vulnerability, as far as advisories can be reached from here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"
NOT_FOUND = "not found"


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-dev.txt"])
def test_no_known_vulnerability(name: str) -> None:
    words = ["--requirement", str(DEPLOY / name), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *words, "--progress-spinner", "off", "--timeout", "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout and "onnection" in done.stderr:
        pytest.skip(f"the advisories cannot be reached: {done.stderr.strip()[-300:]}")
    assert done.stdout, done.stderr
    packages = json.loads(done.stdout)["dependencies"]
    # Without its database the tool calls every package unknown, and says that nothing was found.
    if all(NOT_FOUND in package.get("skip_reason", "") for package in packages):
        pytest.skip("the advisories cannot be reached: every package is unknown there")
    found = {
        f"{package['name']} {package['version']}": [advisory["id"] for advisory in package["vulns"]]
        for package in packages
        if package.get("vulns")
    }
    assert not found, "raise these pins in deploy/"
