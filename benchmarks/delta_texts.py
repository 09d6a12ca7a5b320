"""Chats as a delta read them in training, as the commands on weights take them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cmc_server.config import DeltaSource
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.store import open_delta

Chat = list[dict[str, str]]


def write_texts(delta: Path, chats: Iterable[Chat], path: Path) -> Path:
    """Prompts and answers as JSON lines; those left out whose prompt leaves no room for an answer in the window."""
    artifact = open_delta(DeltaSource(name="d", path=str(delta)))
    encoder = PromptEncoder(artifact.tokenizer(), artifact.manifest)
    window = artifact.context_length or 0
    pairs = ((encoder.render(chat[:-1]), chat[-1]["content"]) for chat in chats)
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "response": response}) + "\n"
            for prompt, response in pairs
            if len(encoder.encode(prompt)) < window
        )
    )
    return path
