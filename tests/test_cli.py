"""How a command ends as a process: interrupted, terminated, or with nobody to read what it prints."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from interrupts import heed_interrupts

from cmc_server.cli import main


def start(body: str, *words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A process whose verbs all do the same."""
    script = f"import sys, time\nfrom cmc_server import cli\ndef verb(words):\n    {body}\n    return 0\n"
    script += "cli._command = verb\nsys.exit(cli.main())\n"
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


@pytest.mark.parametrize("verb", ["edit", "merge", "sparsify", "train", "bench", "map"])
def test_an_interruption_is_one_line(verb: str) -> None:
    with start("print('ready', flush=True); time.sleep(60)", verb) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "cmc-server: interrupted before it was done.\n"
        assert process.wait(60) == 130


@pytest.mark.parametrize(
    ("verb", "code"), [("edit", 143), ("merge", 143), ("sparsify", 143), ("train", -15), ("eval", -15), ("serve", -15)]
)
def test_termination_lets_editing_clean_up_and_changes_nothing_else(verb: str, code: int) -> None:
    body = "try: print('ready', flush=True); time.sleep(60)\n    finally: print('cleaned')"
    with start(body, verb) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ("cleaned\n" if code == 143 else "")
        assert ("interrupted" in process.stderr.read()) == (code == 143)
        assert process.wait(60) == code


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_output_that_nobody_reads(length: int) -> None:
    with start(f"time.sleep(1); sys.stdout.write('x' * {length})", "edit") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 141


def test_another_broken_pipe_is_no_quiet_end() -> None:
    with start("raise BrokenPipeError('of a connection')", "eval") as process:
        assert "of a connection" in process.communicate(timeout=60)[1] and process.returncode == 1


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999999", "1.5", "x"])
def test_seeds_have_one_range(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["edit", "b", "p", "--method", "dare"],
        ["sparsify", "m"],
        ["merge", "measure", "m", "d", "-o", "f"],
        ["eval", "m"],
    ):
        assert main([*words, f"--seed={seed}"]) == 2
        assert (
            capsys.readouterr().err == f"cmc-server: --seed must be a whole number from 0 to 4294967295, not {seed}.\n"
        )


def test_merge_points_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "cmc-server merge measure --help" in capsys.readouterr().out
