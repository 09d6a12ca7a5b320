"""Headless Chromium for tests: ``from browser import open_browser, Visit``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
#: A busy machine of two cores takes its time.
PATIENCE_MS = 90_000
expect.set_options(timeout=PATIENCE_MS)


def find_chromium() -> str:
    """Path of the browser that is installed; a missing one is a failure, not a reason to skip."""
    found = os.environ.get("CMC_SERVER_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    assert found, "The browser tests need Chromium (Debian: apt install chromium), or its path in CMC_SERVER_CHROMIUM."
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window; it shows what it is told to, so it needs no sandbox, which root cannot have."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One page in a profile of its own, and what went wrong on it.

    Args:
        browser: the running browser.
        url: the server's address; the page may ask nobody else.
        options: of Playwright's browser context, such as ``viewport``.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._look(request.url))

    def _note(self, message: Any) -> None:
        # Chromium itself writes a line for each answer that is an error; the page shows those to people.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _look(self, url: str) -> None:
        if not url.startswith(f"{self.url}/"):
            self.foreign.append(url)

    def open(self, key: str = "") -> Page:
        """Go to the playground and wait until it is ready, with a key if one is needed."""
        self.page.goto(f"{self.url}/")
        if key:
            expect(self.page.locator("#status-text")).to_have_text("API key needed")
            self.page.fill("#key", key)
            self.page.press("#key", "Tab")
        expect(self.page.locator("#status-text")).to_have_text("Ready")
        return self.page

    def close(self) -> None:
        """Leave, and fail if the page complained or asked anybody but its server."""
        self.context.close()
        assert not self.complaints
        assert not self.foreign


def ask(page: Page, prompt: str) -> None:
    """Type a message, send it by the keyboard and wait for both answers."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    wait_for_answers(page)


def wait_for_answers(page: Page) -> None:
    """Wait until the last turn is complete and scored."""
    expect(page.locator(".turn").last.locator(".summary")).to_have_text(re.compile("identical|length"))


def set_strength(page: Page, name: str, strength: float) -> None:
    """Type a strength into the number beside a slider."""
    number = page.get_by_label(f"Strength of {name}, as a number")
    number.fill(str(strength))
    number.press("Tab")


def plain_width(page: Page) -> tuple[int, int]:
    """Width of the content and of the window."""
    content, window = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    return int(content), int(window)
