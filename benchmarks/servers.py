"""Servers of the benchmarks: ours, and vLLM's own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PLAIN = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
command = ServeSubcommand()
parser = FlexibleArgumentParser()
command.subparser_init(parser.add_subparsers(dest="subparser"))
arguments = parser.parse_args(["serve", *sys.argv[1:]])
command.validate(arguments)
command.cmd(arguments)
"""
OURS = (sys.executable, "-m", "cmc_server", "serve")
PLAIN_VLLM = (sys.executable, "-c", _PLAIN)


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def server(command: Sequence[str], user: Path, extra: Sequence[str], log: Path, poll: float = 1.0) -> Iterator[str]:
    """A running server of one LLM, named ``user``; its base URL.

    Args:
        command: :data:`OURS` or :data:`PLAIN_VLLM`.
        user: the LLM's folder.
        extra: more arguments.
        log: file for what it prints.
        poll: seconds between two looks whether it is up.
    """
    port = free_port()
    words = [*command, str(user), "--port", str(port), "--served-model-name", "user"]
    words += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log", *extra]
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(int(600 / poll)):
            if process.poll() is not None:
                raise SystemExit(f"the server ended while it started:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(poll)
        yield url
    finally:
        process.terminate()
        process.wait(60)
