"""deploy/systemd: the unit, checked by systemd's own verifier where there is one, and by the server's parsers."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from env_sample import sample
from serve_arguments import parse_serve

UNIT = Path(__file__).parents[1] / "deploy" / "systemd" / "cmc-server.service"
PROGRAM = "/opt/cmc-server/.venv/bin/cmc-server"

with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def service() -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text("utf-8"))
    return dict(parser["Service"])


def test_service_starts_with_arguments_that_the_server_knows() -> None:
    command = service()["ExecStart"]
    for name, value in sample().items():
        command = command.replace(f"${{{name}}}", shlex.quote(value)).replace(f"${name}", value)
    program, *words = shlex.split(command)
    assert program == PROGRAM
    settings, arguments = parse_serve(words)
    assert (arguments.host, arguments.port) == ("127.0.0.1", 8000)
    assert [delta.name for delta in settings.deltas] == ["concise"]
    assert int(service()["TimeoutStopSec"]) >= arguments.shutdown_timeout + 20


def test_service_comes_back_whatever_ended_it_but_a_mistake_in_its_settings() -> None:
    assert service()["Restart"] == "always"
    assert service()["RestartPreventExitStatus"] == "2"


def test_service_may_write_its_cache_only() -> None:
    assert service()["DynamicUser"] == "yes"
    assert service()["ProtectSystem"] == "strict"
    assert service()["Environment"] == f"HOME=%C/{service()['CacheDirectory']}"
    assert not {"ReadWritePaths", "StateDirectory", "User", "AmbientCapabilities"} & set(service())
    assert service()["CapabilityBoundingSet"] == ""


@pytest.fixture
def startable(tmp_path: Path) -> Path:
    """The unit with a program that exists here, which is all that the verifier would miss."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text("utf-8").replace(PROGRAM, sys.executable), "utf-8")
    return path


@with_systemd
def test_systemd_accepts_the_unit(startable: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(startable)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@with_systemd
def test_systemd_finds_little_exposed(startable: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(startable)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert level
    assert float(level[1]) <= 2.5
