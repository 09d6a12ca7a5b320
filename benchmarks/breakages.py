"""Ways to break a delta folder, each with a random choice of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
NEEDED = (WEIGHTS, "config.json", "tokenizer.json")


def remove(folder: Path, draw: random.Random) -> None:
    (folder / draw.choice(NEEDED)).unlink()


def cut(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(NEEDED)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(NEEDED)
    content = bytearray(path.read_bytes())
    # As often in the headers as in what follows them.
    end = draw.choice([min(2000, len(content)), len(content)])
    for _ in range(draw.choice([1, 8])):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def _change(folder: Path, draw: random.Random, change: Callable[[dict[str, Any], str, random.Random], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, draw.choice(sorted(tensors)), draw)
    save_file(tensors, folder / WEIGHTS)


def lose(folder: Path, draw: random.Random) -> None:
    _change(folder, draw, lambda tensors, name, _: tensors.pop(name))


def rename(folder: Path, draw: random.Random) -> None:
    _change(folder, draw, lambda tensors, name, _: tensors.update({f"x.{name}": tensors.pop(name)}))


def reshape(folder: Path, draw: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str, draw: random.Random) -> None:
        shape = list(tensors[name].shape)
        shape[draw.randrange(len(shape))] += draw.choice([-1, 1])
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)

    _change(folder, draw, change)


def retype(folder: Path, draw: random.Random) -> None:
    dtype = draw.choice([torch.int8, torch.int64, torch.bool])
    _change(folder, draw, lambda tensors, name, _: tensors.update({name: tensors[name].to(dtype)}))


def blow_up(folder: Path, draw: random.Random) -> None:
    value = draw.choice([float("nan"), float("inf")])
    _change(folder, draw, lambda tensors, name, _: tensors[name].view(-1)[0].fill_(value))


def lead_out(folder: Path, draw: random.Random) -> None:
    """An index that names files elsewhere, as in an archive whose entries climb out of it."""
    target = draw.choice(["../../../../etc/passwd", "/etc/passwd", "..\\x.safetensors", "../good/model.safetensors"])
    names = sorted(load_file(folder / WEIGHTS))
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))


def link_out(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(NEEDED)
    path.unlink()
    path.symlink_to(draw.choice(["/etc/passwd", "/nowhere", "/dev/zero", str(folder)]))


def mistake(folder: Path, draw: random.Random) -> None:
    """A config or manifest that says something impossible."""
    name, change = draw.choice(
        [
            ("config.json", {"vocab_size": -1}),
            ("config.json", {"vocab_size": 10**9}),
            ("config.json", {"num_attention_heads": 7}),
            ("config.json", {"num_hidden_layers": 10**6}),
            ("config.json", {"hidden_size": "x"}),
            ("config.json", {"model_type": "nothing"}),
            ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
            ("cmc_delta.json", {"default_strength": "strong"}),
            ("cmc_delta.json", {"context_length": 0}),
            ("cmc_delta.json", {"prompt_template": "{{ ''.__class__.__mro__[1].__subclasses__() }"}),
            ("cmc_delta.json", {"unmapped": "drop"}),
        ]
    )
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))


BREAKAGES = (remove, cut, flip, lose, rename, reshape, retype, blow_up, lead_out, link_out, mistake)
