"""Processes that tests interrupt: ``from interrupts import heed_interrupts``."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Whoever started the tests in the background may have left SIGINT ignored, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
