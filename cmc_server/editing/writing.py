"""The folder that an edit writes: complete or not there at all, with everything that belongs to a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmc_server.editing.checkpoint import INDEX, Checkpoint, read_object
from cmc_server.errors import EditingError

#: Of a delta folder; its ``training`` field is free, and the edits are listed there.
MANIFEST_FILE = "cmc_delta.json"
#: Of any other checkpoint.
PROVENANCE_FILE = "cmc_edit.json"
#: Weights in whatever format: the source's own would be stale beside edited ones.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_WEIGHT_INDEXES = (INDEX, "pytorch_model.bin.index.json")


def check_output(output: Path, sources: Sequence[Checkpoint], *, force: bool) -> None:
    """Refuse an output folder that must not be written.

    Args:
        output: the folder to write.
        sources: checkpoints that are read meanwhile.
        force: whether a checkpoint that lies there may be replaced.

    Raises:
        EditingError: it exists, is a source, or would be replaced though it is no checkpoint.
    """
    if any(output.resolve() == source.folder.resolve() for source in sources):
        raise EditingError(f"The output {output} is one of the checkpoints that are read; give another folder.")
    if not output.exists():
        return
    if not force:
        raise EditingError(f"The output folder {output} exists; give another one, or --force to replace it.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise EditingError(f"{output} is not a checkpoint folder, so that --force does not replace it.")


@contextmanager
def part_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, which takes its place once everything is written.

    After an error or an interruption it is removed. If the process was killed it stays, hidden, until the next run of
    the same output.

    Args:
        output: as :func:`check_output` allowed it; a checkpoint that lies there is replaced at the end.

    Raises:
        EditingError: the folder cannot be written.
    """
    output = output.absolute()
    part, old = (output.with_name(f".{output.name}.{kind}") for kind in ("part", "old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not output.exists():  # a run was killed between the two renamings below
            old.rename(output)
        shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                _synchronise(path)
        if output.exists():
            output.rename(old)
        part.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise EditingError(f"The output folder {output} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _synchronise(path: Path) -> None:
    """Wait until a file is on the disk, so that not even a power failure leaves half of it under the final name."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def copy_companions(source: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, chat templates, licence and the like."""
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in _WEIGHT_SUFFIXES and path.name not in _WEIGHT_INDEXES:
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def write_provenance(folder: Path, edit: dict[str, Any]) -> None:
    """Say in the output how it was made: in the delta's manifest, or in a file of its own where there is none.

    An edit of an edited checkpoint is appended to those before it.

    Args:
        folder: the output, companions copied.
        edit: JSON values.

    Raises:
        EditingError: a manifest or an earlier record is no JSON object, or its edits are no list.
    """
    path = folder / MANIFEST_FILE
    is_delta = path.exists()
    if not is_delta:
        path = folder / PROVENANCE_FILE
    content = read_object(path) if path.exists() else {}
    holder = content.setdefault("training", {}) if is_delta else content
    edits = holder.setdefault("edits", []) if isinstance(holder, dict) else None
    if not isinstance(edits, list):
        raise EditingError(f"{path} must list earlier edits under 'edits'; correct or remove it.")
    edits.append(edit)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
