"""The scripts in ``benchmarks/``, for tests: run as they are, or imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def import_benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/`` that imports no other one there."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def run_benchmark(name: str, *words: str | Path, timeout: float = 900, **environment: str) -> Any:
    """Run a script, which must end well; the JSON object that it prints last. Engines may log behind it."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, words)]
    finished = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return json.loads([line for line in finished.stdout.splitlines() if line.startswith("{")][-1])
