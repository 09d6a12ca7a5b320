"""deploy/monitoring: what Prometheus reads and Grafana shows exists, and is mounted where they look for it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from cmc_server.api import metrics
from cmc_server.integrations import worker_metrics

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "cmc-server.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
OURS = [
    metric
    for module in (metrics, worker_metrics)
    for metric in vars(module).values()
    if isinstance(metric, MetricWrapperBase)
]
SERIES = re.compile(r"\b(?:cmc_|vllm:|http_)\w+")
LABELS = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"|by \(([\w, ]+)\)")


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((MONITORING / name).read_text("utf-8")))


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"])


def source(module: str) -> str:
    return Path(str(importlib.util.find_spec(module).origin)).read_text("utf-8")  # type: ignore[union-attr]


def series_of(kind: str, name: str) -> set[str]:
    """The series of a metric as Prometheus stores them."""
    if kind == "counter":
        return {f"{name.removesuffix('_total')}_total"}
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}


def known_series() -> set[str]:
    """Every series that the server can have: ours, vLLM's, and those of its HTTP instrumentation."""
    kinds = {metric._name: {Counter: "counter", Histogram: "histogram"}.get(type(metric), "gauge") for metric in OURS}
    package = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    loggers = (package / "v1" / "metrics" / "loggers.py").read_text("utf-8")
    theirs = re.findall(r"self\._(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", loggers)
    http = re.findall(r"name=\"(http_requests_total)\"", source("prometheus_fastapi_instrumentator.metrics"))
    found = [*((kind, name) for name, kind in kinds.items()), *theirs, *(("counter", name) for name in http)]
    return set().union(*(series_of(kind, name) for kind, name in found))


@pytest.mark.parametrize("query", QUERIES)
def test_query_asks_for_series_and_labels_that_exist(query: str) -> None:
    names = SERIES.findall(query)
    assert names or query.startswith("sum(up{")
    assert set(names) <= known_series()
    labels = {label.strip() for pair in LABELS.findall(query) for part in pair if part for label in part.split(",")}
    of_ours = {label for metric in OURS for label in metric._labelnames}
    assert labels <= of_ours | {"job", "instance", "model_name", "status", "le"}


def test_every_metric_of_ours_is_documented() -> None:
    text = (ROOT / "docs" / "operating.md").read_text("utf-8")
    documented = re.findall(r"^\| `(cmc_\w+)` \|(?: (\S+))? \|", text, re.MULTILINE)
    names = {f"{metric._name}_total" if isinstance(metric, Counter) else metric._name: metric for metric in OURS}
    assert dict(documented) == {
        name: ", ".join(f"`{label}`" for label in metric._labelnames) for name, metric in names.items()
    }


def test_panels_are_titled_once_and_lie_side_by_side() -> None:
    titles, idents = [panel["title"] for panel in PANELS], [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    assert len(set(idents)) == len(idents)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_dashboard_takes_whatever_data_source_is_chosen() -> None:
    sources = {panel["datasource"]["uid"] for panel in PANELS}
    sources |= {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert sources == {"${datasource}"}
    given = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)\{?(\w+)\}?", json.dumps(DASHBOARD)))
    assert given == used


def test_prometheus_scrapes_the_server_under_the_name_that_both_services_have() -> None:
    (job,) = read("prometheus.yml")["scrape_configs"]
    ((target,),) = [config["targets"] for config in job["static_configs"]]
    host, _, port = target.partition(":")
    for name in ("server", "server-cpu"):
        assert services()[name]["networks"]["default"]["aliases"] == [host]
        assert services()[name]["ports"][0].endswith(f":{port}")


def test_files_are_mounted_where_they_are_looked_for() -> None:
    names = ("prometheus", "grafana")
    mounts = {name: dict(volume.split(":")[:2] for volume in services()[name]["volumes"]) for name in names}
    files = {name: {path for path in volumes if path.startswith("./")} for name, volumes in mounts.items()}
    assert all((ROOT / path).exists() for paths in files.values() for path in paths)
    (provider,) = read("grafana/provisioning/dashboards/files.yml")["providers"]
    assert mounts["grafana"]["./deploy/monitoring/grafana/dashboards"] == provider["options"]["path"]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home) == Path(provider["options"]["path"]) / "cmc-server.json"


def test_grafana_asks_prometheus_of_the_same_profile() -> None:
    (datasource,) = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    host = re.fullmatch(r"http://(\w+):9090", datasource["url"])
    assert host
    assert services()[host[1]]["profiles"] == services()["grafana"]["profiles"] == ["monitoring"]
    assert datasource["jsonData"]["timeInterval"] == read("prometheus.yml")["global"]["scrape_interval"]


def test_images_are_pinned_and_overridable() -> None:
    for name in ("prometheus", "grafana"):
        variable, _, image = services()[name]["image"].removeprefix("${").removesuffix("}").partition(":-")
        assert variable == f"{name.upper()}_IMAGE"
        assert re.search(r":v?\d+\.\d+\.\d+$", image)
