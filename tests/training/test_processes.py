"""Training as several processes is the training of one with a larger batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_template import SUBJECTS, write_jsonl

from cmc_server.training.command import run_train


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(
    tmp_path: Path, recipe_values: dict[str, Any]
) -> None:
    # Answers of one length: each process averages over its own tokens, and then the processes are averaged.
    pairs = [{"prompt": f"What is {subject}?", "response": "It is so."} for subject in SUBJECTS]
    write_jsonl(tmp_path / "pairs.jsonl", pairs[: len(pairs) // 4 * 4])
    paths = {}
    for batch_size in (1, 2):
        values = recipe_values | {
            "data": {"train": "pairs.jsonl", "max_length": 128},
            "optimisation": {"epochs": 3, "batch_size": batch_size, "learning_rate": 0.01},
            "output": {"folder": "delta", "dtype": "float32"},
        }
        paths[batch_size] = tmp_path / f"batch{batch_size}.yaml"
        paths[batch_size].write_text(yaml.safe_dump(values), "utf-8")
    run_train(paths[2], output=tmp_path / "one")
    two = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "cmc_server", "train", str(paths[1]), "--output", str(two)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{two}\n"  # once, not once for each process
    alone, together = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", two))
    assert all(torch.allclose(alone[name], together[name], atol=1e-4) for name in alone)
