"""The container files, checked without a container engine: linter, schema, and the CPU target's own commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import Instruction, arguments, replay, stages
from env_sample import ENV_EXAMPLE, sample
from serve_arguments import parse_serve, vllm_variables

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"

each_stage = pytest.mark.parametrize("stage", ["cpu", "gpu"])


def only(stage: list[Instruction], keyword: str) -> Instruction:
    (found,) = [instruction for instruction in stage if instruction.keyword == keyword]
    return found


def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text("utf-8"))["services"])


def test_dockerfile_passes_the_linter() -> None:
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_is_the_default_target() -> None:
    assert list(stages(DOCKERFILE)) == ["cpu", "gpu"]


def test_base_images_are_pinned_and_named_once() -> None:
    images = arguments(DOCKERFILE)
    assert set(images) == {"VLLM_IMAGE", "PYTHON_IMAGE"}
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images.values())


def test_gpu_image_holds_the_supported_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (requirement,) = project["optional-dependencies"]["gpu"]
    tag = arguments(DOCKERFILE)["VLLM_IMAGE"].partition(":")[2]
    assert requirement == f"vllm=={tag.removeprefix('v')}"


@each_stage
def test_image_serves_as_an_unprivileged_user(stage: str) -> None:
    instructions = stages(DOCKERFILE)[stage]
    assert only(instructions, "USER").value == "10001"
    assert only(instructions, "VOLUME").value == "/cache"
    assert only(instructions, "ENTRYPOINT").words == ["cmc-server"]
    assert "/health" in only(instructions, "HEALTHCHECK").value
    assert "HOME=/cache" in only(instructions, "ENV").words


@each_stage
def test_image_copies_what_exists_and_no_secrets(stage: str) -> None:
    for instruction in stages(DOCKERFILE)[stage]:
        if instruction.keyword == "COPY":
            assert all((ROOT / source).exists() for source in instruction.words[:-1])
        if instruction.keyword in ("ENV", "ARG"):
            assert not re.search(r"key|token|secret|password", instruction.value, re.IGNORECASE)


def test_compose_file_fits_the_compose_specification() -> None:
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_starts_the_gpu_service_alone_by_default() -> None:
    default = [name for name, service in services().items() if "profiles" not in service]
    assert default == ["server"]
    (device,) = services()["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert services()["server-cpu"]["profiles"] == ["cpu"]


@pytest.mark.parametrize(("name", "target"), [("server", "gpu"), ("server-cpu", "cpu")])
def test_compose_service(name: str, target: str) -> None:
    service = services()[name]
    assert service["build"]["target"] == target
    mounts = {volume.rpartition(":/")[2]: volume for volume in service["volumes"]}
    assert set(mounts) == {"cache", "deltas:ro", "models:ro"}
    assert mounts["cache"] == "cache:/cache"
    assert service["tmpfs"] == ["/tmp:exec,mode=1777"], "what is compiled there must be loadable from there"
    assert service["ports"][0].startswith("${CMC_SERVER_BIND:-127.0.0.1}")
    image_check = only(stages(DOCKERFILE)[target], "HEALTHCHECK").value.partition(" CMD ")[2]
    assert service["healthcheck"]["test"] == ["CMD", *json.loads(image_check)]


@pytest.mark.parametrize("name", ["server", "server-cpu"])
def test_compose_service_starts_with_arguments_that_the_server_knows(name: str) -> None:
    service = services()[name]
    settings, arguments = parse_serve(shlex.split(interpolated(service["command"])))
    (delta,) = settings.deltas
    assert (ROOT / Path(delta.path).relative_to("/opt/cmc-server") / "config.json").exists()
    (port,) = service["ports"]
    assert interpolated(port) == f"127.0.0.1:8000:{arguments.port}"
    assert str(arguments.port) == only(stages(DOCKERFILE)["gpu"], "EXPOSE").value
    assert seconds(service["stop_grace_period"]) >= arguments.shutdown_timeout + 20


def test_compose_services_are_hardened() -> None:
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert all(re.match(r"\$\{\w+_BIND:-127\.0\.0\.1\}:", port) for port in service.get("ports", []))


def test_sample_settings_are_complete_and_each_is_used() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text("utf-8")))
    unit = (ROOT / "deploy" / "systemd" / "cmc-server.service").read_text("utf-8")
    assert used | set(re.findall(r"^[^#]*\$\{(\w+)\}", unit, re.MULTILINE)) <= set(sample())
    assert set(sample()) <= used | vllm_variables() | {"HF_TOKEN"}


def test_sample_settings_are_described_and_hold_no_secrets() -> None:
    for paragraph in ENV_EXAMPLE.read_text("utf-8").split("\n\n"):
        assert paragraph.startswith("# ")
    assert {name for name, value in sample().items() if not value} == {
        *("VLLM_API_KEY", "HF_TOKEN"),
        *("PROMETHEUS_IMAGE", "GRAFANA_IMAGE"),
    }
    # What the sample gives is also what holds without it.
    defaults = re.findall(r"\$\{(\w+):-([^}]+)\}", COMPOSE.read_text("utf-8"))
    assert all(sample()[name] in (value, "") for name, value in defaults)


def interpolated(text: str) -> str:
    """As compose writes it, with the sample settings."""
    return re.sub(r"\$\{(\w+)(?::[-?][^}]*)?\}", lambda match: sample()[match[1]], text)


def seconds(text: str) -> int:
    """A duration of the compose file."""
    return int(text.removesuffix("s"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CMC_TEST_CONTAINER") != "1", reason="set CMC_TEST_CONTAINER=1: takes minutes")
def test_commands_of_the_cpu_target_work_in_a_clean_directory(tmp_path: Path) -> None:
    clone, home, app, venv = (tmp_path / name for name in ("clone", "home", "app", "venv"))
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    home.mkdir()
    keep = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "PATH"}
    env = keep | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    stage = stages(DOCKERFILE)["cpu"]
    ran = replay(stage, clone, {"/opt/cmc-server": app, "/opt/venv": venv}, env)
    assert ran == [f"PIP_NO_CACHE_DIR=1 CMC_SERVER_ENGINE=cpu bash deploy/install.sh {venv}"]
    env["PATH"] = f"{venv}/bin:/usr/bin:/bin"
    entrypoint = [*only(stage, "ENTRYPOINT").words, *only(stage, "CMD").words]
    for command in (entrypoint, ["python3", "-c", "import vllm, cmc_server.integrations.vllm_processor"]):
        subprocess.run(command, cwd=home, env=env, check=True)
