"""The folder that an edit writes: complete or not there at all, with everything that belongs to a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmc_server.editing.checkpoint import INDEX, read_object
from cmc_server.editing.parts import settle
from cmc_server.editing.places import TEMPLATES, check_not_read, check_replaceable
from cmc_server.errors import EditingError

#: Of a delta folder; its ``training`` field is free, and the edits are listed there.
MANIFEST_FILE = "cmc_delta.json"
#: Of any other checkpoint.
PROVENANCE_FILE = "cmc_edit.json"
#: Weights in whatever format: the source's own would be stale beside edited ones.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_WEIGHT_INDEXES = (INDEX, "pytorch_model.bin.index.json")


def check_output(output: Path, read: Iterable[Path | None], *, force: bool, dry_run: bool) -> None:
    """Refuse an output folder that must not be written, before anything is computed.

    Args:
        output: the folder to write.
        read: everything that is read meanwhile, files and folders; what was not given is None.
        force: whether a checkpoint that lies there may be replaced.
        dry_run: leave what a killed run has left as it is, too.

    Raises:
        EditingError: it is or holds something that is read, it exists, it would be replaced though it is no
            checkpoint, or another run is writing it.
    """
    try:
        check_not_read(output, (file for path in read if path is not None for file in _with_files(path)))
        if not dry_run:
            settle(output)
        check_replaceable(output, force=force)
    except OSError as error:
        raise EditingError(f"The output folder {output} cannot be written: {error}.") from None


def _with_files(path: Path) -> list[Path]:
    """A path and, of a folder, its files as well: they may be links to elsewhere."""
    return [path, *(file for file in sorted(path.iterdir()) if file.is_file())] if path.is_dir() else [path]


def copy_companions(source: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, chat templates, licence and the like."""
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in _WEIGHT_SUFFIXES and path.name not in _WEIGHT_INDEXES:
            shutil.copyfile(path, target / path.name)
    templates = source / TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def check_record(folder: Path) -> None:
    """Refuse a checkpoint whose record cannot take another edit, before it is copied.

    Args:
        folder: whose companions are to be copied.

    Raises:
        EditingError: a manifest or an earlier record is no JSON object, or its edits are no list.
    """
    _read_record(folder)


def write_provenance(folder: Path, edit: dict[str, Any]) -> None:
    """Say in the output how it was made: in the delta's manifest, or in a file of its own where there is none.

    An edit of an edited checkpoint is appended to those before it.

    Args:
        folder: the output, companions copied.
        edit: JSON values.

    Raises:
        EditingError: see :func:`check_record`.
    """
    path, content, edits = _read_record(folder)
    edits.append(edit)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> tuple[Path, dict[str, Any], list[Any]]:
    """The file that lists the edits of a checkpoint, its content, and the list within that content."""
    is_delta = (folder / MANIFEST_FILE).is_file()
    path = folder / (MANIFEST_FILE if is_delta else PROVENANCE_FILE)
    content = read_object(path) if path.is_file() else {}
    holder = content.setdefault("training", {}) if is_delta else content
    if not isinstance(holder, dict):
        raise EditingError(f"{path} must hold a JSON object under 'training'; correct or remove it.")
    edits = holder.setdefault("edits", [])
    if not isinstance(edits, list):
        raise EditingError(f"{path} must list earlier edits under 'edits'; correct or remove it.")
    return path, content, edits
