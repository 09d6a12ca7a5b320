"""Just enough of a Dockerfile parser: the instructions of one stage, and running them outside a container."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction with its continuation lines joined."""

    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        return list(json.loads(self.value)) if self.value.startswith("[") else self.value.split()


def parse(path: Path) -> list[Instruction]:
    """All instructions of a Dockerfile, without comments."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    split = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [Instruction(keyword.upper(), " ".join(rest.split())) for keyword, rest in split]


def stages(path: Path) -> dict[str, list[Instruction]]:
    """The instructions of each named stage, in order."""
    found: dict[str, list[Instruction]] = {}
    for instruction in parse(path):
        if instruction.keyword == "FROM":
            current = found.setdefault(instruction.words[-1], [])
        elif found:
            current.append(instruction)
    return found


def arguments(path: Path) -> dict[str, str]:
    """The defaults of the build arguments before the first stage."""
    pairs = (i.value.partition("=") for i in parse(path) if i.keyword == "ARG")
    return {name: value for name, _, value in pairs}


def replay(stage: list[Instruction], context: Path, redirect: Mapping[str, Path], env: Mapping[str, str]) -> list[str]:
    """Carry out COPY, WORKDIR and RUN of a stage on this machine.

    Args:
        stage: its instructions.
        context: the build context.
        redirect: where absolute paths of the image lie here.
        env: the environment of the commands.

    Returns:
        The commands that were run. Package installation and user creation of the system are left out.
    """
    workdir = Path("/")
    ran = []
    for instruction in stage:
        if instruction.keyword == "WORKDIR":
            workdir = Path(_redirected(instruction.value, redirect))
            workdir.mkdir(parents=True, exist_ok=True)
        elif instruction.keyword == "COPY":
            _copy([context / word for word in instruction.words[:-1]], workdir, instruction.words[-1])
        elif instruction.keyword == "RUN" and not instruction.value.startswith("apt-get"):
            command = _redirected(instruction.value, redirect)
            subprocess.run(["/bin/sh", "-c", command], cwd=workdir, env=dict(env), check=True)
            ran.append(command)
    return ran


def _redirected(text: str, redirect: Mapping[str, Path]) -> str:
    for image, here in redirect.items():
        text = text.replace(image, str(here))
    return text


def _copy(sources: list[Path], workdir: Path, target: str) -> None:
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, workdir / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder = workdir / target if target.endswith(("/", ".")) else (workdir / target).parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder)
