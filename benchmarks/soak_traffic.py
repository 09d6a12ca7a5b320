"""The traffic of a soak: clients of every temper, and an operator who loads, replaces and unloads deltas."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ADMIN_KEY = "soak-admin"
USER = "user"
PROMPTS = (
    "The colors of the rainbow are",
    "Why is the sky blue?",
    "Write a short poem about winter.",
    "1, 2, 3,",
    "Привет, как дела?",
    "def fibonacci(n):",
    "Name three animals that live in water.",
    "It was a dark and stormy night, and",
)
STRENGTHS = (0, 0.5, 1, 1.5, -0.5)
#: Bodies that no server should accept, or that ask for something odd; sent to either route.
BAD: tuple[Any, ...] = (
    "{not json",
    [],
    {"cmc": 3},
    {"cmc": {"deltas": [{"name": "nobody"}]}},
    {"cmc": {"deltas": [{"name": "a", "strength": 1e9}]}},
    {"cmc": {"deltas": [{"name": "a"}, {"name": "a"}]}},
    {"cmc": {"deltas": [], "more": 1}},
    {"cmc": {"deltas": [{"name": "a"}], "unmapped": "drop"}},
    {"model": "nobody"},
    {"model": "a@"},
    {"vllm_xargs": {"cmc": "{}"}},
    {"prompt": None, "messages": None},
    {"messages": [{"role": "user"}]},
    {"max_tokens": -1},
    {"temperature": -1},
    {"n": 0},
    {"stop_token_ids": ["x"]},
    {"prompt": [10**9]},
    {"use_beam_search": True, "n": 2},
    {"suffix": "x"},
)


@dataclass(frozen=True)
class Answered:
    """A greedy answer that came to its end.

    Args:
        prompt: text, or the messages of a chat.
        ids: user tokens of the response.
        doses: ``name.version`` and strength of each delta, as the answer's header says. Two names may hold one content.
    """

    prompt: Any
    ids: tuple[int, ...]
    doses: tuple[tuple[str, float], ...]


@dataclass
class Seen:
    """What happened so far.

    Args:
        statuses: by what was sent, how often each status came.
        failed: path and body of every request that was answered with 500 or more.
        broken: what ended in a way that no client should see.
        answered: greedy answers to be judged, a fair sample.
        num_answered: of how many.
    """

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failed: list[tuple[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    num_answered: int = 0

    def count(self, what: str, status: int) -> None:
        self.statuses.setdefault(what, Counter())[status] += 1

    def keep(self, answer: Answered, sample: int, draw: random.Random) -> None:
        """Reservoir sampling."""
        self.num_answered += 1
        if len(self.answered) < sample:
            self.answered.append(answer)
        elif (place := draw.randrange(self.num_answered)) < sample:
            self.answered[place] = answer


class Client:
    """One client, until it is told to stop.

    Args:
        http: to the server.
        seen: where it writes what it saw.
        names: of the deltas that may be there.
        seed: of everything that it chooses.
        max_tokens: longest answer.
        sample: how many answers of all clients are kept.
    """

    def __init__(
        self, http: httpx.AsyncClient, seen: Seen, names: Sequence[str], seed: int, max_tokens: int, sample: int
    ) -> None:
        self._http, self._seen, self._names = http, seen, names
        self._draw = random.Random(seed)
        self._max_tokens, self._sample = max_tokens, sample

    async def run(self, stop: asyncio.Event) -> None:
        kinds = {self._answer: 4, self._stream: 4, self._leave: 3, self._misbehave: 2}
        while not stop.is_set():
            (kind,) = self._draw.choices(list(kinds), list(kinds.values()))
            try:
                await kind()
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self._seen.broken.append(f"{kind.__name__.strip('_')}: {error!r}")
                await asyncio.sleep(0.5)

    def _request(self) -> tuple[str, dict[str, Any]]:
        prompt = self._draw.choice(PROMPTS)
        body: dict[str, Any] = {"max_tokens": self._draw.randint(1, self._max_tokens), "return_token_ids": True}
        body |= {"temperature": self._draw.choice([0, 0, 0, 1]), "model": USER}
        chosen = self._draw.sample(list(self._names), min(self._draw.choice([0, 1, 1, 2]), len(self._names)))
        if chosen and self._draw.random() < 0.3:
            body["model"] = "+".join(f"{name}@{self._draw.choice(STRENGTHS):g}" for name in chosen)
        elif chosen:
            deltas = [{"name": name, "strength": self._draw.choice(STRENGTHS)} for name in chosen]
            body["cmc"] = {"deltas": deltas, "unmapped": "zero"}
        if self._draw.random() < 0.5:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
        return "/v1/completions", body | {"prompt": prompt}

    async def _answer(self) -> None:
        path, body = self._request()
        answer = await self._http.post(path, json=body)
        self._note(path, body, answer, "answers")
        if answer.status_code == 200:
            choice = answer.json()["choices"][0]
            self._finish(body, answer, choice["token_ids"], choice["finish_reason"])

    async def _stream(self) -> None:
        path, body = self._request()
        ids: list[int] = []
        reason = None
        async with self._http.stream("POST", path, json=body | {"stream": True}) as answer:
            self._note(path, body, answer, "streams")
            if answer.status_code != 200:
                await answer.aread()
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self._seen.failed.append((path, body))
                    return
                for choice in event["choices"]:
                    ids += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
        self._finish(body, answer, ids, reason)

    async def _leave(self) -> None:
        """A client that goes away in the middle of an answer, or before it begins."""
        path, body = self._request()
        patience = self._draw.uniform(0, 2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                async with self._http.stream("POST", path, json=body | {"stream": True, "max_tokens": 200}) as answer:
                    self._note(path, body, answer, "left")
                    async for _ in answer.aiter_lines():
                        pass

    async def _misbehave(self) -> None:
        path, body = self._request()
        bad = self._draw.choice(BAD)
        if isinstance(bad, dict):
            bad = body | bad
        content = bad if isinstance(bad, str) else json.dumps(bad)
        answer = await self._http.post(path, content=content, headers={"Content-Type": "application/json"})
        self._note(path, bad, answer, "bad bodies")

    def _note(self, path: str, body: Any, answer: httpx.Response, what: str) -> None:
        self._seen.count(what, answer.status_code)
        if answer.status_code >= 500:
            self._seen.failed.append((path, body))

    def _finish(self, body: dict[str, Any], answer: httpx.Response, ids: Sequence[int], reason: str | None) -> None:
        if reason not in ("stop", "length"):
            self._seen.broken.append(f"an answer of {len(ids)} tokens ended with {reason!r}")
        elif body["temperature"] == 0:
            doses = parse_doses(answer.headers["x-cmc-deltas"]) if self._names else ()
            self._seen.keep(
                Answered(body.get("messages") or body["prompt"], tuple(ids), doses), self._sample, self._draw
            )


def parse_doses(header: str) -> tuple[tuple[str, float], ...]:
    """``name@strength#version, …`` as ``name.version`` and strength; ``none`` is the base model."""
    if header == "none":
        return ()
    doses = []
    for one in header.split(","):
        dose, _, version = one.strip().rpartition("#")
        name, _, strength = dose.rpartition("@")
        doses.append((f"{name}.{version}", float(strength)))
    return tuple(doses)


async def operate(
    http: httpx.AsyncClient, seen: Seen, names: Sequence[str], folders: Sequence[Path], stop: asyncio.Event, seed: int
) -> None:
    """Load, replace and unload deltas every few seconds."""
    draw = random.Random(seed)
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    while not stop.is_set():
        name = draw.choice(list(names))
        if draw.random() < 0.7:
            body = {"name": name, "path": str(draw.choice(list(folders)))}
            answer = await http.post("/v1/deltas", json=body, headers=headers)
            what = "loads"
        else:
            answer = await http.delete(f"/v1/deltas/{name}", headers=headers)
            what = "unloads"
        seen.count(what, answer.status_code)
        if answer.status_code >= 500:
            seen.broken.append(f"{what}: {answer.status_code} {answer.text[:200]}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), draw.uniform(1, 5))
