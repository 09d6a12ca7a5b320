"""Serves the playground's files: read once, named by their content, and bound to this server alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from fastapi import APIRouter, Request, Response

PREFIX: Final = "/playground/"
_INDEX: Final = "index.html"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
#: The page may load and ask nothing but this server, runs no inline code, and nobody may frame it or change its base.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Kept by browsers, and asked about before each use, so that an upgrade shows at once and as a whole.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Page:
    """One file of the playground."""

    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        """Entity tag: changes with the content."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def read_pages() -> dict[str, Page]:
    """Every file of the playground by its path below ``PREFIX``; the page itself is ``index.html``."""
    return dict(_walk(files("cmc_server.api.playground").joinpath("static"), ""))


def playground_router() -> APIRouter:
    """The page at ``/`` and what it loads. None of it needs a key, and none of it tells anything about the server."""
    pages = read_pages()
    router = APIRouter(include_in_schema=False)

    async def index(request: Request) -> Response:
        return _answer(pages[_INDEX], request)

    async def asset(path: str, request: Request) -> Response:
        page = None if path == _INDEX else pages.get(path)
        return Response(status_code=HTTPStatus.NOT_FOUND) if page is None else _answer(page, request)

    router.add_api_route("/", index, methods=["GET", "HEAD"])
    router.add_api_route(PREFIX + "{path:path}", asset, methods=["GET", "HEAD"])
    return router


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Page]]:
    found: list[tuple[str, Page]] = []
    for entry in folder.iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif media_type is not None:
            found.append((prefix + entry.name, Page(entry.read_bytes(), media_type)))
    return found


def _answer(page: Page, request: Request) -> Response:
    headers = {**_HEADERS, "etag": page.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if page.etag in known:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(page.content, media_type=page.media_type, headers=headers)
