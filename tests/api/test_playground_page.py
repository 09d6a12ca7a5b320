"""The playground as people use it: headless Chromium against the running server with a delta that ships."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from browser import Visit, ask, open_browser, plain_width, set_strength, wait_for_answers
from playwright.sync_api import Browser, Page, expect
from plugin_app import Engine, start
from running_server import API_KEY, RunningServer

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONCISE = Path(__file__).parents[2] / "cmc_server" / "demo" / "concise"
QUESTION = "What is a black hole?"
#: Notes every length that the text of an answer has.
WATCH_LENGTHS = """() => {
  window.lengths = { base: new Set(), steered: new Set() };
  const look = () => {
    for (const [side, seen] of Object.entries(lengths))
      seen.add(document.querySelector(`.card.${side} .text`)?.textContent.length);
  };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def server(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "smollm2", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "1024", "--max-num-seqs", "16", f"--delta=concise={CONCISE}"],
    ]
    running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(server: RunningServer, browser: Browser) -> Iterator[Page]:
    visit = Visit(browser, server.url, viewport={"width": 1240, "height": 860})
    yield visit.open(API_KEY)
    visit.close()


def limit(page: Page, tokens: int, temperature: float = 0) -> None:
    page.locator("#settings").evaluate("details => { details.open = true; }")
    page.fill("#max-tokens", str(tokens))
    page.fill("#temperature", str(temperature))


def answer(page: Page, side: str) -> str:
    """The text of an answer of the last turn, without the mark of its end."""
    return str(page.locator(f".turn >> nth=-1 >> .card.{side} .answer p").first.text_content())


def tokens(page: Page) -> list[dict[str, Any]]:
    """What the page knows of the tokens of the last steered answer."""
    found = (
        page.locator(".turn")
        .last.locator(".token")
        .evaluate_all("nodes => nodes.map(({unit, dataset}) => ({...unit, level: Number(dataset.level)}))")
    )
    return list(found)


def test_the_key_is_asked_for_and_kept_in_the_tab_only(server: RunningServer, browser: Browser) -> None:
    visit = Visit(browser, server.url)
    page = visit.page
    page.goto(f"{server.url}/")
    expect(page.locator("#notice")).to_contain_text("API key")
    expect(page.locator("#send")).to_be_disabled()
    visit.open(API_KEY)
    expect(page.locator("#notice")).to_be_hidden()
    stored = page.evaluate("() => [Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert stored == [[API_KEY], 0, ""]
    page.reload()
    expect(page.locator("#status-text")).to_have_text("Ready")
    visit.close()


def test_two_answers_stream_and_tokens_show_their_alternatives(server: RunningServer, page: Page) -> None:
    page.evaluate(WATCH_LENGTHS)
    ask(page, QUESTION)
    for num_lengths in page.evaluate("() => Object.values(lengths).map((seen) => seen.size)"):
        assert num_lengths > 5
    base, steered = answer(page, "base"), answer(page, "steered")
    assert len(steered) < len(base)
    for cmc, shown in (([], base), ([{"name": "concise", "strength": 1}], steered)):
        body = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 160}
        direct = server.http.post("/v1/chat/completions", json={**body, "temperature": 0, "cmc": {"deltas": cmc}})
        assert direct.json()["choices"][0]["message"]["content"] == shown
    last = tokens(page)[-1]
    assert last["text"] == "<|im_end|>"  # what a delta for short answers makes likelier above all
    assert last["level"] == 3

    page.locator(".token").first.focus()
    popover = page.locator("#popover")
    expect(popover).to_be_visible()
    expect(popover.locator("li")).to_have_count(10)
    page.keyboard.press("End")
    expect(page.locator(".token.end")).to_be_focused()
    expect(page.locator(".token.end")).to_have_attribute("aria-describedby", "popover")
    expect(popover).to_contain_text(re.compile(r"\d+ times likelier"))
    page.keyboard.press("Home")
    expect(page.locator(".token").first).to_be_focused()
    expect(popover).to_contain_text("Here: ")
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()
    page.locator(".token").nth(3).hover()
    expect(popover).to_be_visible()


def test_shifts_are_exact(server: RunningServer, page: Page) -> None:
    """Against the next-token probabilities that the server gives when asked for one token after each beginning."""
    limit(page, 40)
    ask(page, QUESTION)
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}
    steered = {"temperature": 0, "return_token_ids": True, "cmc": {"deltas": [{"name": "concise", "strength": 1}]}}
    body = server.http.post("/v1/chat/completions", json={**chat, **steered}).json()
    prompt, ids = body["prompt_token_ids"], body["choices"][0]["token_ids"]
    shown = [part for unit in tokens(page) for part in unit["tokens"]]
    assert len(shown) == len(ids)
    beginnings = [prompt + ids[:index] for index in range(0, len(ids), 8)]
    asked = {"model": "smollm2", "prompt": beginnings, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    choices = server.http.post("/v1/completions", json=asked).json()["choices"]
    for index, choice in zip(range(0, len(ids), 8), choices, strict=True):
        expected = choice["logprobs"]["top_logprobs"][0]
        token = shown[index]
        assert token["base"] == pytest.approx(expected[token["text"]], abs=1e-3)
        alternatives = {top["text"]: top["logprob"] for top in token["baseTop"]}
        assert alternatives == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("temperature", "tolerance"), [(0, 1e-3), (0.6, 0.02), (1, 1e-3)])
def test_without_strength_nothing_changes(page: Page, temperature: float, tolerance: float) -> None:
    limit(page, 24, temperature)
    set_strength(page, "concise", 0)
    ask(page, QUESTION)
    expect(page.locator(".summary")).to_have_text("The two answers are identical.")
    assert answer(page, "base") == answer(page, "steered")
    shown = tokens(page)
    assert shown
    assert max(abs(unit["shift"]) for unit in shown) < tolerance
    assert {unit["level"] for unit in shown} == {0}


def test_sliders(page: Page) -> None:
    limit(page, 16)
    slider = page.locator("#delta-concise")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-4", "4")
    expect(page.locator(".delta")).to_contain_text("Advised: 0.5 to 1.25.")
    ask(page, QUESTION)
    expect(page.locator(".card.steered .label")).to_have_text("concise 1")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Strength of concise, as a number")).to_have_value("1.05")
    expect(page.locator(".card.steered .label")).to_have_text("concise 1.05")  # asked again by itself
    wait_for_answers(page)
    page.locator("#live").uncheck()
    slider.dblclick()
    expect(slider).to_have_value("1")
    expect(page.locator(".card.steered .label")).to_have_text("concise 1.05")


def test_code_runs_and_says_what_the_screen_says(page: Page) -> None:
    limit(page, 30)
    ask(page, 'Isn\'t it "odd"?\nSay so in $HOME.')
    ask(page, QUESTION)
    shown = answer(page, "steered")
    page.locator("#tab-chat").focus()
    page.keyboard.press("End")
    expect(page.locator("#code")).to_be_visible()
    command, program = page.locator("#curl").text_content(), page.locator("#python").text_content()
    assert command and program
    assert API_KEY not in command + program
    env = {**os.environ, "CMC_API_KEY": API_KEY}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=env)
    body = json.loads(done.stdout)
    assert body["choices"][0]["message"]["content"] == shown
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == f"{shown}\n"
    assert command.count('"role"') == 3  # both questions, and the steered answer between them


def test_sweep(page: Page) -> None:
    page.click("#tab-sweep")
    page.fill("#sweep-strengths", "0, 1 2")
    page.fill("#sweep-max", "32")
    page.click("#sweep-run")
    points = page.locator(".point")
    expect(points).to_have_count(6)
    expect(page.locator("#sweep-answer-title")).to_have_text("Answer at strength 1")
    labels = points.evaluate_all("nodes => nodes.map((node) => node.getAttribute('aria-label'))")
    assert labels[0] == "Strength 0: 32 tokens, cut at the limit"
    assert labels[3].startswith("Strength 0: 0 mean change")
    page.locator(".point[aria-pressed=true]").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#sweep-answer-title")).to_have_text("Answer at strength 2")
    expect(page.locator(".point[aria-pressed=true]").first).to_be_focused()
    points.first.click()
    expect(page.locator("#sweep-meta")).to_contain_text("base · 32 tokens")
    page.click("#tab-code")
    program = page.locator("#python").text_content()
    assert program
    env = {**os.environ, "CMC_API_KEY": API_KEY}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert re.findall(r"^(\d) \d+ ", done.stdout, re.MULTILINE) == ["0", "1", "2"]


def test_stopping_and_errors(page: Page) -> None:
    limit(page, 900)
    set_strength(page, "concise", -4)  # rambles on
    page.fill("#prompt", QUESTION)
    page.click("#send")
    expect(page.locator(".card.steered .text")).to_contain_text(re.compile("."))
    page.click("#stop")
    expect(page.locator(".card.steered .meta")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()
    page.click("#clear")
    expect(page.locator("#empty")).to_be_visible()
    limit(page, 2000)
    page.click(".chip >> nth=0")
    expect(page.locator(".card.base .error")).to_contain_text("1024")  # vLLM's own words about its limit
    expect(page.locator(".card.steered .error")).to_contain_text("1024")


def test_on_a_phone(server: RunningServer, browser: Browser) -> None:
    visit = Visit(browser, server.url, color_scheme="dark", **PHONE)
    page = visit.open(API_KEY)
    limit(page, 24)
    ask(page, "A" * 60 + " what is that?")
    page.locator(".token").nth(2).tap()
    expect(page.locator("#popover")).to_be_visible()
    box = page.locator("#popover").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    for view in ("chat", "sweep", "code"):
        page.tap(f"#tab-{view}")
        content, window = plain_width(page)
        assert content <= window == 360, view
    visit.close()


@contextmanager
def without_engine(engine: Engine, deltas: dict[str, Path]) -> Iterator[str]:
    """The plugin in a small application, for what a running server is hard to bring to."""
    servers: list[uvicorn.Server] = []

    def serve() -> None:
        config = uvicorn.Config(start(engine, deltas), port=0, log_level="critical")
        servers.append(uvicorn.Server(config))
        servers[0].run()

    thread = Thread(target=serve)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{servers[0].servers[0].sockets[0].getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join()


def test_a_server_that_is_not_ready(browser: Browser, rank: dict[str, Any], deltas: dict[str, Path]) -> None:
    engine = Engine([])
    with without_engine(engine, deltas) as url:
        visit = Visit(browser, url)
        visit.page.goto(url)
        status = visit.page.locator("#status-text")
        expect(status).to_have_text("Not ready: a worker runs without the delta processor")
        expect(visit.page.locator("#send")).to_be_disabled()
        engine.ranks = [rank]
        expect(status).to_have_text("API key needed")
        visit.page.fill("#key", "key")
        visit.page.press("#key", "Enter")
        expect(status).to_have_text("Ready")
        expect(visit.page.locator("#send")).to_be_enabled()
        expect(visit.page.locator(".delta")).to_have_count(2)
        expect(visit.page.locator("#model option")).to_have_text(["base", "alias"])
        visit.close()


def test_a_server_without_deltas(browser: Browser, rank: dict[str, Any]) -> None:
    with without_engine(Engine([{**rank, "deltas": []}]), {}) as url:
        visit = Visit(browser, url)
        page = visit.open("key")
        expect(page.locator("#deltas")).to_contain_text("No delta is loaded")
        expect(page.locator("#legend")).to_be_hidden()
        page.click("#tab-sweep")
        expect(page.locator("#sweep-run")).to_be_disabled()
        visit.close()
