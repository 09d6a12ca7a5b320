"""Counters of the front door, in the process-wide Prometheus registry that vLLM's ``/metrics`` shows."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

#: Requests let in on a route that can be steered, once per delta; ``none`` is the base model.
REQUESTS = Counter("cmc_requests", "Requests accepted on routes that can be steered.", ["delta"])
#: Reasons: ``controls`` (400), ``not_ready`` (503), ``too_large`` (413), ``delta_failed`` (500 or error event).
ERRORS = Counter("cmc_request_errors", "Requests that the steering refused or failed.", ["reason"])
#: Rows (one per prompt and choice) under ``--max-delta-seqs``; stays at 0 where that is not set.
WAITING_ROWS = Gauge("cmc_waiting_rows", "Steered rows that wait for a place.", multiprocess_mode="livesum")


def count_request(names: tuple[str, ...]) -> None:
    """Count one accepted request under each of its deltas, or under ``none``."""
    for name in names or ("none",):
        REQUESTS.labels(name).inc()
