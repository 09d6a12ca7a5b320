"""The frozen LLMs' hidden states, computed once: kept in memory, or in safetensors files that later runs find again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from cmc_server.errors import ConfigError, one_line
from cmc_server.training.template import FrozenTemplate
from cmc_server.vocab.vocab_map import default_cache_dir

#: Raised whenever the states are computed differently, so that older files are not used.
VERSION = 1
_GIB = 2**30
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HiddenCache:
    """Keeps hidden states of one run within a budget.

    Args:
        mode: ``memory``, ``disk``, or ``none``, which keeps nothing.
        budget_gib: most that the states of this run may take. On disk the files of earlier runs go first, the one that
            was not used for longest before the others, until all fit into the budget together.
        folder: of the files; None is ``hidden`` in the package's cache.
    """

    def __init__(self, mode: Literal["memory", "disk", "none"], budget_gib: float, folder: Path | None = None) -> None:
        self._mode, self._budget = mode, int(budget_gib * _GIB)
        self._folder = default_cache_dir().with_name("hidden") if folder is None else folder
        self._used = 0
        self._mine: set[Path] = set()

    def states(
        self, template: FrozenTemplate, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[Tensor] | None:
        """What :meth:`FrozenTemplate.hidden_states` yields, in the order of the sequences.

        Args:
            template: any frozen LLM.
            sequences: token ids.
            starts: the first position wanted of each.

        Returns:
            One [length - start, H] per sequence; from disk they are mapped, and read when they are used. None where
            nothing is kept.

        Raises:
            ConfigError: they exceed the budget, or the file cannot be written.
        """
        if self._mode == "none":
            return None
        lengths = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        size = sum(lengths) * template.hidden_size * template.dtype.itemsize
        self._used += size
        if self._used > self._budget:
            raise ConfigError(
                f"The template LLM's hidden states take at least {self._used / _GIB:.3g} GiB, more than "
                f"data.cache_budget_gib = {self._budget / _GIB:.3g}; raise it, lower data.max_length, or choose "
                + ("data.cache: disk or none." if self._mode == "memory" else "data.cache: none.")
            )
        if self._mode == "memory":
            kept: list[Tensor] = [torch.empty(0)] * len(sequences)
            for index, states in _progress(template, sequences, starts):
                kept[index] = states
            return kept
        path = self._folder / f"{states_key(template, sequences, starts)}.safetensors"
        self._mine.add(path)
        with _locked(path) as part:
            if not _is_sound(path, template, sum(lengths)):
                self._make_room(size)
                _write(part, path, template, sequences, starts)
            hidden = load_file(path)["hidden"]
        with suppress(OSError):  # another user's file
            path.touch()  # the time of the last use
        return list(hidden.split(lengths))

    def _make_room(self, size: int) -> None:
        others = [path for path in self._folder.glob("*.safetensors") if path not in self._mine]
        others.sort(key=lambda path: path.stat().st_mtime)
        total = size + sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        while total > self._budget and others:
            # A process that has the file mapped keeps what it mapped.
            oldest = others.pop(0)
            total -= oldest.stat().st_size
            oldest.unlink()


def states_key(template: FrozenTemplate, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> str:
    """Hash of all that decides the states: weights and configuration, type, kind of device, and the ids themselves.

    The ids stand for data, tokenizer, chat template and length limit at once.
    """
    digest = hashlib.sha256()
    parts = [VERSION, template.fingerprint, str(template.dtype), template.model.device.type, list(starts)]
    digest.update(json.dumps([*parts, [list(ids) for ids in sequences]]).encode())
    return digest.hexdigest()


def _progress(
    template: FrozenTemplate, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    with tqdm(total=sum(map(len, sequences)), desc="template LLM", unit="token", file=sys.stderr) as bar:
        for index, states in template.hidden_states(sequences, starts):
            bar.update(len(sequences[index]))
            yield index, states


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The unfinished file beside ``path``, held by one process at a time; what a killed one left is overwritten."""
    part = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    except OSError as error:
        raise ConfigError(f"The cache {path.parent} cannot be written ({error}); set data.cache_folder.") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        # Once the finished file is there, nobody writes to this one again.
        part.unlink(missing_ok=True)


def _is_sound(path: Path, template: FrozenTemplate, count: int) -> bool:
    """Whether the file is there and whole; what is not goes, with a warning.

    Args:
        path: of a finished file.
        template: whose states it should hold.
        count: how many.
    """
    if not path.exists():
        return False
    try:
        hidden = load_file(path)["hidden"]
        if hidden.dtype == template.dtype and hidden.shape == (count, template.hidden_size):
            return True
        reason = f"unexpected {hidden.dtype} {tuple(hidden.shape)}"
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = one_line(error)
    warnings.warn(f"The cached hidden states {path} are broken ({reason}) and computed again.", stacklevel=3)
    with suppress(OSError):  # the new file takes its place in any case
        path.unlink()
    return False


def _write(
    part: IO[bytes],
    path: Path,
    template: FrozenTemplate,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> None:
    """Write states as they come, each to its place; only a complete file gets the name that is looked for."""
    width = template.hidden_size * template.dtype.itemsize
    offsets = [0]
    for ids, start in zip(sequences, starts, strict=True):
        offsets.append(offsets[-1] + (len(ids) - start) * width)
    shape = [offsets[-1] // width, template.hidden_size]
    entry = {"dtype": _DTYPES[template.dtype], "shape": shape, "data_offsets": [0, offsets[-1]]}
    header = json.dumps({"hidden": entry}).encode()
    header += b" " * (-len(header) % 8)
    first = 8 + len(header)
    try:
        part.truncate(0)
        # A full disk is found now, not after hours of computing.
        os.posix_fallocate(part.fileno(), 0, first + offsets[-1])
        part.write(struct.pack("<Q", len(header)) + header)
        for index, states in _progress(template, sequences, starts):
            part.seek(first + offsets[index])
            part.write(states.reshape(-1).view(torch.uint8).numpy().data)
        part.flush()
        os.fsync(part.fileno())
        _part_of(path).replace(path)
    except OSError as error:
        part.truncate(0)  # not removed: another process may wait for its lock
        raise ConfigError(
            f"The hidden states ({offsets[-1] / _GIB:.3g} GiB) cannot be written to {path.parent} ({error.strerror}); "
            "free some room, or set data.cache_folder or data.cache: none."
        ) from None


def _part_of(path: Path) -> Path:
    return path.with_suffix(".part")
