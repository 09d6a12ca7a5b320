"""The scripts in deploy/, and that the pinned sets fit what the package asks for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = [*sorted(DEPLOY.glob("*.sh")), ROOT / ".ci" / "run"]


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DEPLOY / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


def pins(name: str) -> dict[str, str]:
    lines = (DEPLOY / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def extras(name: str) -> list[Requirement]:
    found = project()["optional-dependencies"]
    assert isinstance(found, dict)
    return [Requirement(text) for text in found[name]]


def dependencies() -> list[Requirement]:
    found = project()["dependencies"]
    assert isinstance(found, list)
    return [Requirement(text) for text in found]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_passes_the_linter(script: Path) -> None:
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_pinned_set_fits_the_package() -> None:
    installed = pins("requirements-cpu.txt")
    for requirement in [*dependencies(), *extras("train")]:
        assert requirement.specifier.contains(installed[canonicalize_name(requirement.name)]), requirement
    assert "vllm" not in installed, "vLLM's version is named in pyproject.toml"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(installed)


def test_pinned_test_tools_fit_the_package() -> None:
    installed = pins("requirements-cpu.txt") | pins("requirements-dev.txt")
    for requirement in extras("dev"):
        assert requirement.specifier.contains(installed[canonicalize_name(requirement.name)]), requirement
    assert not set(pins("requirements-cpu.txt")) & set(pins("requirements-dev.txt"))


def test_install_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\necho "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    done = run("install.sh", str(tmp_path / "venv"), PYTHON=str(old), CMC_SERVER_ENGINE="cpu")
    assert done.returncode == 2
    assert "is not a Python 3.11 to 3.14" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_install_says_that_no_python_was_found(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "cat", "grep"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run("install.sh", str(tmp_path / "venv"), PATH=str(tmp_path), CMC_SERVER_ENGINE="cpu", PYTHON="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11 to 3.14 was found")


def test_install_names_the_missing_venv_module(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    done = run("install.sh", str(tmp_path / "venv"), PYTHON=str(bare), CMC_SERVER_ENGINE="cpu")
    assert done.returncode == 2
    assert "lacks the venv module; install it" in done.stderr


def test_install_refuses_a_folder_that_is_no_environment(tmp_path: Path) -> None:
    done = run("install.sh", str(tmp_path), CMC_SERVER_ENGINE="cpu")
    assert done.returncode == 2
    assert "is not a virtual environment" in done.stderr


def test_install_never_mixes_engines(tmp_path: Path) -> None:
    (tmp_path / ".cmc-server-engine").write_text("cpu\n")
    done = run("install.sh", str(tmp_path), CMC_SERVER_ENGINE="gpu")
    assert done.returncode == 2
    assert "holds the cpu engine" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "env", "message"),
    [
        ("install.sh", ["--fast"], {}, "unknown option --fast"),
        ("install.sh", ["a", "b"], {}, "give one VENV"),
        ("install.sh", [], {"CMC_SERVER_ENGINE": "tpu"}, "must be gpu or cpu"),
        ("quickstart.sh", ["--fast"], {}, "unknown option --fast"),
        ("quickstart.sh", ["--check", "--stop"], {}, "the usage is"),
    ],
)
def test_wrong_use_is_one_sentence(script: str, arguments: list[str], env: dict[str, str], message: str) -> None:
    done = run(script, *arguments, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_stopping_without_a_server_is_no_error(tmp_path: Path) -> None:
    done = run("quickstart.sh", "--stop", CMC_SERVER_STATE=str(tmp_path))
    assert done.returncode == 0
    assert "no server of this script is running" in done.stderr


installed_by_script = pytest.mark.skipif(
    not Path(sys.prefix, ".cmc-server-installed").exists(), reason="needs an environment made by deploy/install.sh"
)


@installed_by_script
def test_second_installation_does_nothing() -> None:
    done = run("install.sh", "--dev", sys.prefix)
    assert done.returncode == 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@installed_by_script
def test_quickstart_says_that_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("quickstart.sh", CMC_SERVER_VENV=sys.prefix, CMC_SERVER_PORT=port, CMC_SERVER_STATE=str(tmp_path))
    assert done.returncode == 2
    assert f"port {port} is in use on 127.0.0.1" in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
@installed_by_script
def test_quickstart(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    done = run(
        "quickstart.sh", "--check", CMC_SERVER_VENV=sys.prefix, CMC_SERVER_PORT=port, CMC_SERVER_STATE=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[concise at strength") == 3
    assert not (tmp_path / "server.pid").exists()
