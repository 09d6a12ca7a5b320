"""The access log: one line for each answer on a route that can be steered, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

logger = logging.getLogger("cmc_server.access")


def log_access(request_id: str, route: str, status: int, deltas: str, seconds: float) -> None:
    """Write one line.

    Args:
        request_id: the client's, or one that was made up; also part of the answer's ``id``, and in the worker's log
            if a delta fails.
        route: path within the application.
        status: of the answer; 0 if the client left before there was one.
        deltas: as in the answer's header.
        seconds: from the request to the end of the answer.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    seconds = round(seconds, 4)
    fields = {"request_id": request_id, "route": route, "status": status, "deltas": deltas, "seconds": seconds}
    line = "%s %s %d deltas=%s seconds=%s"
    logger.info(line, request_id, route, status, deltas, seconds, extra={"access": fields})


def log_as_json() -> None:
    """From now on, lines are JSON objects and nothing else, with the time (UTC) in front."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonFormatter())
    logger.handlers = [handler]
    logger.propagate = False


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": moment, **vars(record)["access"]})
