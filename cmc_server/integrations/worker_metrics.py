"""What a worker's controller counts, as Prometheus metrics.

A worker has no ``/metrics`` of its own. Its numbers reach the one of the API process through files in the folder that
``PROMETHEUS_MULTIPROC_DIR`` names, which the launcher sets before anything of Prometheus is imported.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.counts import DeltaCounts
from cmc_server.fusion.loaded import LoadedDelta

logger = logging.getLogger(__name__)

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = 1.0
_DELTA = ["delta"]

ADMISSIONS = Counter("cmc_delta_admissions", "Rows that began to be steered; again after a preemption.", _DELTA)
TOKENS = Counter("cmc_delta_tokens", "Tokens that were chosen under a delta.", _DELTA)
FAILURES = Counter("cmc_delta_failures", "Rows that ended with an error because of a delta.", _DELTA)
READ = Counter("cmc_delta_read_tokens", "Tokens that went through a delta, prompts included.", _DELTA)
RECOMPUTED = Counter("cmc_delta_recomputed_tokens", "Of these, those that stand for tokens read before.", _DELTA)
RESPELLINGS = Counter("cmc_delta_respellings", "Times that the end of a response was spelled again.", _DELTA)
REBUILDS = Counter("cmc_delta_rebuilds", "Times that a row's cache began anew.", _DELTA)
LOOKS = Counter("cmc_delta_top_token_looks", "Rows whose most likely token was compared, a sample.", _DELTA)
CHANGES = Counter("cmc_delta_top_token_changes", "Of these, rows where the deltas changed it.", _DELTA)
STEP_ROWS = Histogram(
    "cmc_delta_step_rows", "Rows of one forward pass of a delta.", _DELTA, buckets=[2**power for power in range(11)]
)
STEP_SECONDS = Histogram(
    "cmc_delta_step_seconds",
    "How long one forward pass of a delta took.",
    _DELTA,
    buckets=[0.0005 * 2**power for power in range(13)],
)
#: Of each process that holds deltas; those of data-parallel engines add up.
LOADED = Gauge("cmc_delta_loaded", "Engines in which a delta can be used.", _DELTA, multiprocess_mode="livesum")
MEMORY = Gauge("cmc_delta_memory_bytes", "Memory that a delta's versions take.", _DELTA, multiprocess_mode="livesum")
MAPPED = Gauge(
    "cmc_delta_mapped_share", "Share of the model's ordinary tokens that it knows.", _DELTA, multiprocess_mode="livemax"
)


class Publisher:
    """Brings the metrics up to date with a controller, from a thread of its own.

    The controller's numbers only grow, and each one is read in one piece, so that nothing need be locked.

    Args:
        controller: of the one rank that counts.
    """

    def __init__(self, controller: DeltaController) -> None:
        self._controller = controller
        self._published: dict[tuple[str, Counter], int] = {}

    def start(self) -> None:
        """Publish now, and every second from now on."""
        self.publish()
        threading.Thread(target=self._follow, name="cmc-metrics", daemon=True).start()

    def publish(self) -> None:
        """Bring everything up to date."""
        controller = self._controller
        for name, counts in list(controller.counts.items()):
            self._publish_counts(name, counts)
            usable = controller.deltas.get(name)
            kept = [delta for (one, _), delta in list(controller.kept.items()) if one == name]
            _publish_residency(name, usable, kept)

    def _follow(self) -> None:
        stop = threading.Event()
        while not stop.wait(_SECONDS):
            try:
                self.publish()
            except Exception:  # requests are served all the same
                logger.exception("The metrics of the deltas are not published any more.")
                return

    def _publish_counts(self, name: str, counts: DeltaCounts) -> None:
        looks, changes = counts.top.seen_and_changed
        totals = {
            ADMISSIONS: counts.admissions,
            TOKENS: counts.tokens,
            FAILURES: counts.failures,
            READ: counts.read,
            RECOMPUTED: counts.recomputed,
            RESPELLINGS: counts.respellings,
            REBUILDS: counts.rebuilds,
            LOOKS: looks,
            CHANGES: changes,
        }
        for counter, total in totals.items():
            before = self._published.get((name, counter), 0)
            counter.labels(name).inc(total - before)  # by 0 at first: a series begins before anything happens
            self._published[name, counter] = total
        rows, seconds = STEP_ROWS.labels(name), STEP_SECONDS.labels(name)
        while counts.passes:
            one = counts.passes.popleft()
            rows.observe(one.rows)
            seconds.observe(one.seconds)


def _publish_residency(name: str, usable: LoadedDelta | None, kept: Iterable[LoadedDelta]) -> None:
    """In files a series cannot be removed: that of a delta which is gone says 0."""
    held = [*kept, *([usable] if usable else [])]
    LOADED.labels(name).set(1 if usable else 0)
    MEMORY.labels(name).set(sum(delta.runner.memory_bytes for delta in held))
    MAPPED.labels(name).set(usable.vocab_map.coverage if usable else 0)


def publish_metrics(controller: DeltaController) -> None:
    """Begin to publish, where somebody will read it."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and Path(folder).is_dir():
        Publisher(controller).start()
