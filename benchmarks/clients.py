"""Run every block of docs/clients.md against a real server, and print what each prints.

    python benchmarks/clients.py --work FOLDER [--only WORD]

Makes a virtual environment for the clients in FOLDER, and takes OpenAI's JavaScript client from npm. Exit code 1 if a
block failed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import urllib.request
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmark_report import describe_machine, keep

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "clients.md"
PYTHON_CLIENTS = ("openai", "langchain-openai", "llm")
#: Blocks that need what only the server's own environment has.
OURS = ("evaluation-harness", "benchmark", "vllm.LLM", "generate")


@dataclass(frozen=True)
class Block:
    heading: str
    language: str
    code: str


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks that are meant to be run; the first is the server."""
    blocks, heading = [], ""
    for found in re.finditer(r"^## ([^\n]*)$|^```(bash|python|js)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1]:
            heading = found[1]
        else:
            blocks.append(Block(heading, found[2], found[3]))
    return blocks


def prepare(work: Path) -> None:
    """Clients that the server's environment does not have."""
    if not (work / "venv").exists():
        venv.create(work / "venv", with_pip=True)
        pip = [str(work / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", *PYTHON_CLIENTS]
        subprocess.run(pip, check=True)
    if not (work / "node_modules").exists():
        (work / "package.json").write_text('{"type": "module"}\n')
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "openai"], cwd=work, check=True)


def run(block: Block, work: Path) -> subprocess.CompletedProcess[str]:
    """One block, in the work folder, from where the repository's paths are reached by a link."""
    own = any(word in block.heading for word in OURS)
    binaries = Path(sys.executable).parent if own else work / "venv" / "bin"
    ours = Path(sys.executable).parent
    environment = os.environ | {"OPENAI_API_KEY": "secret", "PATH": f"{binaries}:{ours}:{os.environ['PATH']}"}
    name = {"bash": "block.sh", "python": "block.py", "js": "block.mjs"}[block.language]
    (work / name).write_text(block.code, encoding="utf-8")
    programs = {"bash": ["bash", "-eo", "pipefail"], "python": [str(binaries / "python")], "js": ["node"]}
    command = [*programs[block.language], name]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False)


def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen("http://127.0.0.1:8000/ready", timeout=2)
        except OSError:
            time.sleep(1)
        else:
            return
    raise SystemExit("the server ended while it started; see server.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="only blocks under headings with this word")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    link = work / "cmc_server"
    if not link.exists():
        link.symlink_to(ROOT / "cmc_server")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    serve, *blocks = read_blocks(PAGE.read_text(encoding="utf-8"))
    failed = []
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (work / "server.log").open("w") as log:
        command = ["bash", "-c", f"exec {serve.code}"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(process)
        for block in blocks:
            if options.only not in block.heading:
                continue
            done = run(block, work)
            print(f"\n## {block.heading} ({block.language})\n{done.stdout.rstrip()}")
            if done.returncode:
                failed.append(block.heading)
                print(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    finally:
        process.terminate()
        process.wait(90)
    report = {"benchmark": "clients", "machine": describe_machine("openai"), "blocks": len(blocks), "failed": failed}
    keep(report, None)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
