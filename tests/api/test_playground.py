"""The playground's files: what they may hold, how they are served, and that they are shipped."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from plugin_app import Engine, start
from starlette.testclient import TestClient

from cmc_server.api.playground.pages import PREFIX, read_pages

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "cmc_server" / "api" / "playground" / "static"
PAGES = read_pages()
TEXTS = {path: page.content.decode() for path, page in PAGES.items()}
MAX_LINES = 200
#: Names, not addresses: browsers fetch nothing from there.
NAMESPACE = "http://www.w3.org/2000/svg"


def test_every_file_is_served_and_shipped() -> None:
    present = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert set(PAGES) == present
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = configuration["tool"]["setuptools"]["package-data"]["cmc_server"]
    packaged = {found for pattern in patterns for found in (ROOT / "cmc_server").glob(pattern) if found.is_file()}
    assert {STATIC / path for path in present} <= packaged


@pytest.mark.parametrize("path", TEXTS)
def test_files_load_nothing_from_elsewhere(path: str) -> None:
    text = TEXTS[path].replace(NAMESPACE, "")
    assert "://" not in text.replace("`curl ${origin}/", "")
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?//""", text)
    assert not re.search(r"\beval\(|new Function|innerHTML|document\.write|\bon\w+=\"", text)
    if path.endswith(".html"):
        assert "<style" not in text
        assert " style=" not in text
        assert not re.search(r"<script(?![^>]*\bsrc=)", text)


@pytest.mark.parametrize("path", TEXTS)
def test_files_stay_short(path: str) -> None:
    assert len(TEXTS[path].splitlines()) <= MAX_LINES


def test_what_the_files_name_is_there() -> None:
    named = {
        target.removeprefix(PREFIX[1:])
        for target in re.findall(r'(?:src|href)="(playground/[^"]+)"', TEXTS["index.html"])
    }
    assert named
    for path, text in TEXTS.items():
        folder = PurePosixPath(path).parent
        named |= {str(folder / target) for target in re.findall(r'from "\./([^"]+)"', text)}
    assert named == set(PAGES) - {"index.html"}
    identifiers = set(re.findall(r'\bid="([^"]+)"', TEXTS["index.html"]))
    asked = {name for text in TEXTS.values() for name in re.findall(r'byId\("([^"]+)"\)', text)}
    assert asked <= identifiers


def test_every_field_has_a_label() -> None:
    html = TEXTS["index.html"]
    for field in re.findall(r"<(?:input|select|textarea)[^>]*>", html):
        identifier = re.search(r'id="([^"]+)"', field)
        inside = html.rfind("<label", 0, html.index(field)) > html.rfind("</label>", 0, html.index(field))
        assert inside or (identifier and f'for="{identifier[1]}"' in html), field


def test_the_page_needs_no_key_and_its_headers_bind_it(engine: Engine, deltas: dict[str, Path]) -> None:
    client = TestClient(start(engine, deltas))
    assert client.get("/v1/models").status_code == 401
    for path in ("/", *(PREFIX + name for name in PAGES if name != "index.html")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).headers["content-length"] == answer.headers["content-length"]
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get(PREFIX + "js/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path", ["", "js/", "js/nope.js", "../pages.py", "%2e%2e/pages.py", "index.html", "/etc/passwd"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(PREFIX + path).status_code == 404


def test_the_page_is_not_in_the_schema(client: TestClient) -> None:
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or path.startswith(PREFIX)]
