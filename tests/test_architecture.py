"""The house keeps its plan: who imports whom, one line of documentation a module, small files, one test command."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cmc_server"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAX_LINES = 400

# Areas of the package that an area may import, itself aside. `cli`, `__main__` and `demo` may import all of them, but
# only inside functions. Nobody else imports those three.
MAY_IMPORT = {
    "__init__": set(),  # the version, which everybody may import
    "errors": set(),
    "config": {"errors"},
    "locks": {"errors"},
    "vocab": {"errors", "config"},
    "delta": {"errors", "config", "vocab"},
    "fusion": {"errors", "config", "vocab", "delta"},
    "integrations": {"errors", "config", "vocab", "delta", "fusion"},
    "training": {"errors", "config", "locks", "vocab", "delta", "fusion"},
    "evaluation": {"errors", "config", "vocab", "delta", "fusion"},
    "editing": {"errors", "config", "locks", "vocab"},
    "api": {"errors", "config", "vocab", "delta", "integrations"},
}
LAZY = {"cli", "__main__", "demo"}
DELTA_WITH_TORCH = {"attention", "graphs", "head", "llama", "packed", "pieces", "runner", "transfer"}
ONLY_IN = {"vllm": {"integrations", "api"}, "fastapi": {"api"}}


@dataclass(frozen=True)
class Import:
    """One imported module, as written."""

    name: str
    line: int
    in_function: bool
    type_only: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def area(module: str) -> str:
    """The part of the package that a module belongs to; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text("utf-8")), in_function=False, type_only=False))


def _walk(node: ast.AST, *, in_function: bool, type_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function, type_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: import by the full name"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                own = name.startswith("cmc_server.") and is_module(name)
                yield Import(name if own else str(child.module), child.lineno, in_function, type_only)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _walk(ast.Module(child.body, []), in_function=in_function, type_only=True)
            yield from _walk(ast.Module(child.orelse, []), in_function=in_function, type_only=type_only)
        else:
            inner = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, in_function=inner, type_only=type_only)


def module_file(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def own_imports(path: Path) -> list[Import]:
    return [found for found in imports(path) if found.top == "cmc_server"]


def is_torch_free_delta(module: str) -> bool:
    return area(module) == "delta" and module.rpartition(".")[2] not in DELTA_WITH_TORCH


each_module = pytest.mark.parametrize("path", MODULES, ids=module_name)


@each_module
def test_imports_follow_the_table(path: Path) -> None:
    own = area(module_name(path))
    if own in LAZY:
        return
    allowed = MAY_IMPORT[own] | {own, "__init__"}
    wrong = [f"line {found.line}: {found.name}" for found in own_imports(path) if area(found.name) not in allowed]
    assert not wrong, f"{own} may import only {sorted(allowed)}"


@each_module
def test_command_and_demos_import_lazily(path: Path) -> None:
    own = area(module_name(path))
    if own not in LAZY:
        return
    free = {"errors", "__init__", own} | ({"cli"} if own == "__main__" else set())
    wrong = [
        f"line {found.line}: {found.name}"
        for found in imports(path)
        if not (found.in_function or found.type_only or found.top in sys.stdlib_module_names)
        and not (found.top == "cmc_server" and area(found.name) in free)
    ]
    assert not wrong, "import these inside functions"


@each_module
def test_engine_and_web_framework_stay_in_their_place(path: Path) -> None:
    own = area(module_name(path))
    wrong = [
        f"line {found.line}: {found.name}"
        for found in imports(path)
        if own not in LAZY and own not in ONLY_IN.get(found.top, {own})
    ]
    assert not wrong


@each_module
def test_torch_stays_out_of_the_front_door(path: Path) -> None:
    module = module_name(path)
    if area(module) != "api" and not is_torch_free_delta(module):
        return
    wrong = [
        f"line {found.line}: {found.name}" for found in imports(path) if found.top == "torch" and not found.type_only
    ]
    assert not wrong, "this module must work without torch"
    for found in own_imports(path):
        if area(found.name) == "delta":
            assert is_torch_free_delta(found.name), f"line {found.line}: {found.name} needs torch"


def test_front_door_reaches_no_torch_through_what_it_imports() -> None:
    seen: set[str] = set()
    todo = [module_name(path) for path in MODULES if area(module_name(path)) == "api"]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        loaded = [found for found in imports(module_file(module)) if not (found.in_function or found.type_only)]
        assert "torch" not in {found.top for found in loaded}, f"{module} imports torch and is reached from api"
        todo += [found.name for found in loaded if found.top == "cmc_server"]


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`", text, re.MULTILINE)
    present = [str(path.relative_to(PACKAGE)) for path in MODULES if path.name != "__init__.py"]
    assert sorted(listed) == sorted(present)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    num_lines = len(path.read_text("utf-8").splitlines())
    assert num_lines <= MAX_LINES


def test_ci_runs_the_test_command_of_the_readme_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["bash deploy/test.sh"]
    assert re.search(r"^bash deploy/test\.sh$", readme, re.MULTILINE), "the README names another test command"
    assert re.search(r"^bash deploy/quickstart\.sh$", readme, re.MULTILINE)
