"""What the Grafana dashboard shows under traffic: each panel's queries, asked of a Prometheus that watches a server.

    python benchmarks/dashboard.py --user FOLDER --deltas FOLDER [FOLDER ...] --prometheus BINARY --plot FILE.png

The traffic is that of ``soak.py``: clients that mix the base model and deltas, go away and send bad bodies, while
deltas come and go. Afterwards each panel's queries are asked over the whole time, with the dashboard's variables filled
in, and drawn in the dashboard's order. Prints the panels that stayed empty; exit code 1 if one did that should not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator
from servers import OURS, free_port, server
from soak import ENGINE, soak
from soak_traffic import ADMIN_KEY

DASHBOARD = Path(__file__).parents[1] / "deploy" / "monitoring" / "grafana" / "dashboards" / "cmc-server.json"
VARIABLES = {"$job": ".*", "$model": ".*", "$__rate_interval": "20s"}
#: Nothing of the kind happens on a healthy server with room for everything.
MAY_BE_EMPTY = frozenset({"Prefix cache hits"})
SCRAPE_SECONDS = 5
COLUMNS = 3

Series = tuple[str, list[tuple[float, float]]]


@contextmanager
def prometheus(binary: str, target: str, work: Path) -> Iterator[str]:
    """A Prometheus that scrapes the target; its base URL."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [{"job_name": "cmc-server", "static_configs": [{"targets": [target]}]}],
    }
    (work / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    url = f"127.0.0.1:{free_port()}"
    words = [binary, f"--config.file={work / 'prometheus.json'}", f"--storage.tsdb.path={work / 'tsdb'}"]
    with (work / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*words, f"--web.listen-address={url}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://{url}"
    finally:
        process.terminate()
        process.wait(30)


def ask(http: httpx.Client, target: dict[str, Any], begin: float, end: float) -> list[Series]:
    """One query over the time: a name and points for each series."""
    query = target["expr"]
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    parameters: dict[str, Any] = {"query": query, "start": begin, "end": end, "step": SCRAPE_SECONDS}
    answer = http.get("/api/v1/query_range", params=parameters)
    answer.raise_for_status()
    found = []
    for one in answer.json()["data"]["result"]:
        labels = one["metric"]
        legend = target.get("legendFormat") or ", ".join(labels.values())
        name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match, labels=labels: labels.get(match[1], ""), legend)
        points = [(float(at) - begin, float(value)) for at, value in one["values"]]
        found.append((name, [(at, value) for at, value in points if math.isfinite(value)]))
    return [series for series in found if series[1]]


def draw(panels: list[tuple[dict[str, Any], list[Series]]], path: Path) -> None:
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (panel, series) in zip(axes.flat, panels, strict=False):
        unit = panel["fieldConfig"]["defaults"].get("unit", "short")
        for name, points in series:
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(f"{panel['title']}" + ("" if series else " (nothing)"), fontsize=9, loc="left")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: shown(value, unit)))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if series:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            axis.legend(fontsize=6, loc="upper left")
    figure.supxlabel("seconds", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shown(value: float, unit: str) -> str:
    """A value of the axis in the panel's unit."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s":
        return f"{1e3 * value:g} ms" if value < 1 else f"{value:g} s"
    return f"{value:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True, help="the user LLM's folder")
    parser.add_argument("--deltas", type=Path, nargs="+", required=True)
    parser.add_argument("--prometheus", required=True, help="the program")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    options.deltas = [folder.resolve() for folder in options.deltas]
    options.seed, options.tokens, options.sample, options.warm_up = 1, 48, 1, float("inf")
    os.environ["CMC_SERVER_ADMIN_KEY"] = ADMIN_KEY
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    roots = [word for folder in options.deltas for word in ("--delta-root", str(folder.parent))]
    with tempfile.TemporaryDirectory(prefix="cmc-dashboard-") as name:
        work = Path(name)
        words = [*ENGINE, *roots, "--delta-state", f"{name}/state.json", "--delta-memory", "2", "--max-num-seqs", "8"]
        with ExitStack() as stack:
            url = stack.enter_context(server(OURS, options.user, words, work / "log"))
            watching = stack.enter_context(prometheus(options.prometheus, url.removeprefix("http://"), work))
            begin = time.time()
            asyncio.run(soak(url, options))
            time.sleep(2 * SCRAPE_SECONDS)
            http = stack.enter_context(httpx.Client(base_url=watching, timeout=60))
            found = [
                (panel, [one for target in panel["targets"] for one in ask(http, target, begin, time.time())])
                for panel in panels
            ]
    draw(found, options.plot)
    empty = [panel["title"] for panel, series in found if not series]
    print(f"{len(found) - len(empty)} of {len(found)} panels show something; empty: {empty or 'none'}")
    return 1 if set(empty) - MAY_BE_EMPTY else 0


if __name__ == "__main__":
    sys.exit(main())
