"""How fast `cmc-server edit` and `merge` stream a checkpoint, beside a copy of the same bytes, and in what memory.

    python benchmarks/editing_stream.py [--gigabytes 2] [--folder DIR] [--output REPORT.json]

Makes a synthetic bfloat16 checkpoint and two trained copies of it in shards of half a gigabyte (a transformer's shapes:
embeddings and square and wide matrices), then, in rounds, edits a trained one with each method and merges it with the
other one (`task-arithmetic`), each time right beside a copy of the same files: in one round the copy comes first, in
the next one the method, since what ran before decides what memory costs. Every run is a process of its own. Files are
synchronised to the disk, and dropped from the page cache where that is allowed, so that all read and write the same
disk. The time for loading Python's libraries is left out, and reported. Beside the wall clock stands the CPU time of
each run, which other work on the machine disturbs less.

The bound of an edit is set by what it must move: it reads two checkpoints and writes one where a copy reads one and
writes one, so that at equal speeds of reading and writing it runs at 2/3 of the copy's speed; a merge of two reads
three and runs at 1/2. Both figures are reported: ``speed_of_copy``, by the checkpoint's size, and
``throughput_of_copy``, by bytes read and written. Peak memory counts what a run holds beyond the interpreter and its
libraries; its bound is twice the largest shard.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, keep
from safetensors.torch import save_file

HIDDEN, WIDE, VOCABULARY = 2048, 5632, 32_000
SHARD_BYTES = 512 * 2**20
EDITS = ("expo", "dare", "magnitude", "ties", "bitdelta")
METHODS = (*EDITS, "merge")
MERGE = ("--method", "task-arithmetic")
TRAINED = ("post", "other")
#: Of a copy's speed, by the bytes that are read and written.
BOUNDS = {"edit": 2 / 3, "merge": 1 / 2}
COPY = """
import shutil, sys, time
begin = time.perf_counter()
for name in sys.argv[3:]:
    shutil.copyfile(f"{sys.argv[1]}/{name}", f"{sys.argv[2]}/{name}")
print(time.perf_counter() - begin)
"""
EDIT = """
import contextlib, io, sys, time
import torch, tqdm, tokenizers
import cmc_server.editing.edit_command
import cmc_server.editing.merge_command
from cmc_server.cli import main
begin = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    assert not sys.argv[1:] or main(sys.argv[1:]) == 0
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class Run:
    """Wall-clock and CPU seconds, the latter with start-up, and peak resident bytes of one process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Pair:
    """A copy and a method that ran one right after the other."""

    copy: Run
    method: Run


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.make is not None:
            _make(arguments.make, int(arguments.gigabytes * 2**30))
            return
        # In a process of its own: a child's peak memory begins with that of the process that started it.
        subprocess.run([sys.executable, __file__, "--make", name, "--gigabytes", str(arguments.gigabytes)], check=True)
        sizes = [path.stat().st_size for path in sorted((folder / "post").glob("*.safetensors"))]
        moved = f"bound by bytes moved: {BOUNDS['edit']:.2f} of a copy, {BOUNDS['merge']:.2f} for a merge"
        print(f"{sum(sizes) / 2**30:.2f} GiB in {len(sizes)} shards; {moved}", flush=True)
        begin = time.perf_counter()
        idle = _run(EDIT)
        startup = time.perf_counter() - begin
        pairs: dict[str, list[Pair]] = {method: [] for method in arguments.methods}
        for number in range(arguments.rounds):
            for method, found in pairs.items():
                found.append(_pair(folder, sizes, method, copy_first=number % 2 == 0))
    copies = [pair.copy.seconds for found in pairs.values() for pair in found]
    copy = statistics.median(copies)
    report = {
        "benchmark": "editing_stream",
        "machine": {**describe_machine("torch", "safetensors"), "threads": torch.get_num_threads()},
        "checkpoint_bytes": sum(sizes),
        "largest_shard_bytes": max(sizes),
        "rounds": arguments.rounds,
        "page_cache_dropped": _drop_cache([]),
        "speed_bound": BOUNDS,
        "copy": {
            "seconds": round(copy, 2),
            "least_and_most_seconds": [round(min(copies), 2), round(max(copies), 2)],
            "bytes_per_second": round(sum(sizes) / copy),
        },
        "startup_seconds": round(startup, 2),
        "idle_process_bytes": idle.peak_bytes,
        "methods": {method: _summary(method, found, sizes, idle) for method, found in pairs.items()},
    }
    keep(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; on the disk to be measured")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the report here")
    return parser.parse_args()


def _make(folder: Path, size: int) -> None:
    """The checkpoints ``base`` and, trained from it, ``post`` and ``other``."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    layer = 0
    while 2 * sum(rows * columns for rows, columns in shapes.values()) < size:
        shapes |= {f"model.layers.{layer}.attention.{part}.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{part}.weight": (WIDE, HIDDEN) for part in ("gate", "up", "down")}
        layer += 1
    shards: list[list[str]] = [[]]
    held = 0
    for name, (rows, columns) in shapes.items():
        if held and held + 2 * rows * columns > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * rows * columns
    for which in ("base", *TRAINED):
        (folder / which).mkdir()
        (folder / which / "config.json").write_text("{}", "utf-8")
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        base = {name: 0.02 * torch.randn(shapes[name], generator=generator) for name in names}
        save_file({name: tensor.bfloat16() for name, tensor in base.items()}, folder / "base" / file)
        for which in TRAINED:
            trained = {
                name: tensor + 0.002 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()
            }
            save_file({name: tensor.bfloat16() for name, tensor in trained.items()}, folder / which / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    for which in ("base", *TRAINED):
        (folder / which / "model.safetensors.index.json").write_text(index, "utf-8")


def _pair(folder: Path, sizes: list[int], method: str, copy_first: bool) -> Pair:
    """A copy and a method, one right after the other."""
    base, post, other, output = (folder / name for name in ("base", *TRAINED, "output"))
    runs = {}
    for which in ("copy", method) if copy_first else (method, "copy"):
        _drop_cache([base, post, other])
        if which == "copy":
            output.mkdir()
            run = _run(COPY, post, output, *sorted(path.name for path in post.glob("*.safetensors")))
        else:
            trained: list[object] = [post, other, *MERGE] if method == "merge" else [post, "--method", method]
            run = _run(EDIT, "merge" if method == "merge" else "edit", base, *trained, "-o", output)
        runs[which] = replace(run, seconds=run.seconds + _synchronise(output))
        assert [path.stat().st_size for path in sorted(output.glob("*.safetensors"))] == sizes, "another layout"
        shutil.rmtree(output)
    pair = Pair(runs["copy"], runs[method])
    print(f"{method}: {pair.method.seconds:.1f} s beside {pair.copy.seconds:.1f} s of copying", flush=True)
    return pair


def _run(code: str, *words: object) -> Run:
    """Run a Python program that prints how many seconds it took."""
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{words} failed"
    return Run(float(said), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)  # Linux counts in KiB


def _synchronise(folder: Path) -> float:
    """Wait until everything is on the disk; seconds that it took."""
    begin = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - begin


def _drop_cache(folders: list[Path]) -> bool:
    """Forget the pages of files that are on the disk already; whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()  # nothing that the run before left to write, or to discard, falls into the next one
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _summary(method: str, pairs: list[Pair], sizes: list[int], idle: Run) -> dict[str, Any]:
    runs = [pair.method for pair in pairs]
    speeds = [pair.copy.seconds / pair.method.seconds for pair in pairs]
    speed = statistics.median(speeds)
    peak = max(run.peak_bytes for run in runs)
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 2),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs) - idle.cpu_seconds, 2),
        "speed_of_copy": round(speed, 3),
        "least_and_most_speed_of_copy": [round(min(speeds), 3), round(max(speeds), 3)],
        "throughput_of_copy": round(speed / BOUNDS["merge" if method == "merge" else "edit"], 3),
        "peak_bytes": peak,
        "peak_beyond_idle_per_largest_shard": round((peak - idle.peak_bytes) / max(sizes), 3),
    }


if __name__ == "__main__":
    main()
