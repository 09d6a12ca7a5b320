"""Waits for a running server, and asks it one question with several strengths of a delta.

python -m cmc_server.demo.ask wait http://127.0.0.1:8000 --pid 4711 --log server.log
python -m cmc_server.demo.ask compare http://127.0.0.1:8000 --model smollm2 --delta concise --strengths 0 1 2
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cmc_server.errors import CmcError, UserError

QUESTION = "What is a black hole?"
REPORT_SECONDS = 5.0


def wait_until_ready(url: str, pid: int, log: Path, timeout: float) -> float:
    """Wait until ``/ready`` answers 200, showing the passing time and the server's last log line on stderr.

    Returns:
        The seconds waited.

    Raises:
        UserError: the process ended, or the time is over.
    """
    started = time.monotonic()
    reported = 0.0
    while not is_ready(url):
        passed = time.monotonic() - started
        if not _is_running(pid):
            raise UserError(f"the server ended before it was ready; its log is {log}.")
        if passed > timeout:
            raise UserError(f"the server was not ready after {timeout:.0f} s; its log is {log}.")
        if passed - reported >= REPORT_SECONDS:
            reported = passed
            print(f"  {passed:4.0f} s  {_last_line(log)}", file=sys.stderr, flush=True)
        time.sleep(0.25)
    return time.monotonic() - started


def is_ready(url: str) -> bool:
    """Whether the server at ``url`` says that it serves."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:  # noqa: S310 - the caller's own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def compare(url: str, model: str, delta: str, strengths: Sequence[float], question: str) -> list[str]:
    """Print the greedy answers to one question, one for each strength, and return them.

    Raises:
        CmcError: the server refuses the request or cannot be reached.
    """
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"))
    print(f"Question: {question}")
    answers = []
    for strength in strengths:
        try:
            response = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=120,
                extra_body={"cmc": {"deltas": [{"name": delta, "strength": strength}], "unmapped": "zero"}},
            )
        except OpenAIError as error:
            raise CmcError(f"the server did not answer: {error}") from error
        answers.append(response.choices[0].message.content or "")
        length = response.usage.completion_tokens if response.usage else 0
        print(f"\n[{delta} at strength {strength:g}: {length} tokens]\n{answers[-1].strip()}", flush=True)
    return answers


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    # Without vLLM's prefix of process, level, time and source line.
    text = re.sub(r"^(\(\S+ pid=\d+\) )?((INFO|WARNING) \S+ \S+ )?(\[\S+\] )?", "", lines[-1]) if lines else ""
    return text.strip()[:100]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands of this module."""
    parser = argparse.ArgumentParser(prog="python -m cmc_server.demo.ask", description="Talk to a running server.")
    commands = parser.add_subparsers(dest="command", required=True)
    wait = commands.add_parser("wait", help="wait until the server is ready")
    wait.add_argument("url")
    wait.add_argument("--pid", type=int, required=True, help="the server's process")
    wait.add_argument("--log", type=Path, required=True, help="the server's log")
    wait.add_argument("--timeout", type=float, default=900, help="seconds (default: %(default)s)")
    ask = commands.add_parser("compare", help="ask one question with several strengths")
    ask.add_argument("url")
    ask.add_argument("--model", required=True)
    ask.add_argument("--delta", required=True)
    ask.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    ask.add_argument("--question", default=QUESTION)
    options = parser.parse_args(arguments)
    try:
        if options.command == "wait":
            seconds = wait_until_ready(options.url, options.pid, options.log, options.timeout)
            print(f"  ready after {seconds:.0f} s", file=sys.stderr)
        else:
            answers = compare(options.url, options.model, options.delta, options.strengths, options.question)
            if len(options.strengths) > 1 and len(set(answers)) == 1:
                raise CmcError(f"the delta {options.delta!r} changed nothing: all answers are equal.")
    except CmcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
