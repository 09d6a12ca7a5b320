"""The deltas' forward passes over the rows of a step, and which rows hold a cached sequence."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from sys import maxsize
from typing import Protocol

import torch
from torch import Tensor

from cmc_server.delta.capacity import BLOCK_SIZE
from cmc_server.delta.runner import MAX_TOKENS, Feed
from cmc_server.delta.transfer import Arrival, on_device
from cmc_server.fusion.counts import DeltaCounts, Pass
from cmc_server.fusion.loaded import LoadedDelta
from cmc_server.fusion.streams import Output, Request, Stream, Unseen, select_rows
from cmc_server.fusion.verdicts import Clock, Judged, Verdict, finite_rows


class Fail(Protocol):
    """Ends a request because of some deltas."""

    def __call__(self, request: Request, reason: str, *names: str) -> None:
        """End it."""


class DeltaPasses:
    """Runs each delta over all its rows in one forward pass, and keeps what it has read.

    Args:
        counts: of each delta by its name.
        fail: called for requests that a delta failed.
        runs: whether deltas run here at all; on other ranks there is only the room for what those of the leader give.
        defers: whether a fault may be noted a step later than it is acted on.
    """

    def __init__(self, counts: Mapping[str, DeltaCounts], fail: Fail, *, runs: bool, defers: bool) -> None:
        self._counts, self._fail = counts, fail
        self._runs, self._defers = runs, defers
        #: Of deltas that somebody has something cached of; nothing else here may keep a delta alive.
        self._cached: dict[LoadedDelta, OrderedDict[int, Stream]] = {}
        self._verdicts: deque[Verdict] = deque()

    def drop(self, stream: Stream) -> None:
        """Free what is cached of a stream."""
        if stream.sequence is not None:
            stream.sequence.free()
            stream.sequence, stream.keep = None, 0
            cached = self._cached[stream.delta]
            del cached[id(stream)]
            if not cached:
                del self._cached[stream.delta]

    def hear(self) -> None:
        """Act on the verdicts that have arrived."""
        while self._verdicts and self._verdicts[0].finite.is_there:
            self._act_on(self._verdicts.popleft())

    def run(
        self, requests: Sequence[Request], device: torch.device, unseen: Unseen | None = None
    ) -> dict[LoadedDelta, Output]:
        """One forward pass per delta over all its rows; on ranks that do not lead, the room for the leader's.

        Args:
            requests: those of this step.
            device: where the logits will be.
            unseen: the last token of each of the requests.
        """
        later = self._defers and (unseen is not None or device.type == "cuda")
        outputs = {}
        for delta, members in _by_delta(requests).items():
            newest = None
            if unseen is not None:
                newest = select_rows(unseen.ids, [unseen.places[place] for place, _, _ in members])
            pairs = [(request, stream) for _, request, stream in members]
            logits, finite = self._run(pairs, newest, later) if self._runs else (None, None)
            if logits is None:
                logits = torch.zeros(len(pairs), delta.runner.vocab_size, device=device)
            outputs[delta] = Output(logits, {id(stream): row for row, (_, stream) in enumerate(pairs)}, finite)
        return outputs

    def prefill(self, requests: Sequence[Request]) -> None:
        """Let deltas read ahead: for each delta a bounded number of tokens, and never a row's last one."""
        for delta, members in _by_delta(requests if self._runs else ()).items():
            pairs = [(request, stream) for _, request, stream in members]
            num_tokens = delta.runner.num_tokens
            try:
                self._prefill(delta, pairs)
            except Exception as error:  # any cause must end the requests, never the engine
                self._fail_all(delta, pairs, error)
            self._counts[delta.name].read += delta.runner.num_tokens - num_tokens

    def _prefill(self, delta: LoadedDelta, pairs: list[tuple[Request, Stream]]) -> None:
        budget = MAX_TOKENS
        ahead: list[tuple[Stream, Feed]] = []
        for request, stream in pairs:
            # Whole blocks, so that the next piece may find some that are cached already.
            most = (stream.keep + budget) // BLOCK_SIZE * BLOCK_SIZE
            stop = min(len(stream.text.ids) - stream.dropped - 1, most)
            if stop > stream.keep and self._cache(request, stream, pairs):
                budget -= stop - stream.keep
                ahead.append((stream, _feed(stream, stop)))
        if ahead:
            delta.runner.forward([feed for _, feed in ahead])
        for stream, feed in ahead:
            stream.note_prefilled(len(feed.ids))

    def _fail_all(self, delta: LoadedDelta, pairs: list[tuple[Request, Stream]], error: Exception) -> None:
        for request, stream in pairs:
            self.drop(stream)
            self._fail(request, f"delta {delta.name!r} failed: {error}", delta.name)

    def _run(
        self, pairs: list[tuple[Request, Stream]], newest: Tensor | None, later: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """One delta's forward pass.

        Args:
            pairs: whose rows, and their streams.
            newest: [len(pairs)] int64, see :meth:`DeltaRunner.forward`.
            later: whether to leave it to the device, for now, to end rows that are not finite.

        Returns:
            [len(pairs), D] float32, zeros for streams that have nothing to read, or None if the delta failed.
            [len(pairs)] bool, which of them are finite, where it was left to the device, else None.
        """
        delta = pairs[0][1].delta
        runner, counts = delta.runner, self._counts[delta.name]
        clock, num_tokens = Clock(runner.device), runner.num_tokens
        try:
            rows = [
                row for row, (request, one) in enumerate(pairs) if one.text.ids and self._cache(request, one, pairs)
            ]
            feeds = [_feed(pairs[row][1]) for row in rows]
            logits = runner.forward(feeds, None if newest is None else select_rows(newest, rows))
            clock.stop()
            finite = finite_rows(logits)
            arrival = Arrival.of(finite)
            if not later:
                arrival.wait()  # what goes wrong on a device is raised here
        except Exception as error:  # see prefill
            self._fail_all(delta, pairs, error)
            return None, None
        counts.read += runner.num_tokens - num_tokens
        judged = []
        for row, feed in zip(rows, feeds, strict=True):
            pairs[row][1].note_read(len(feed.ids))
            judged.append(Judged(pairs[row][0], feed.sequence.blocks[:]))
        verdict = Verdict(delta, judged, arrival, clock)
        if later:
            self._verdicts.append(verdict)
        else:
            self._act_on(verdict)
        if len(rows) < len(pairs):
            index = on_device(rows, logits.device)
            logits = logits.new_zeros(len(pairs), runner.vocab_size).index_copy_(0, index, logits)
            finite = torch.ones(len(pairs), dtype=torch.bool, device=logits.device).index_copy_(0, index, finite)
        return logits, finite if later else None

    def _act_on(self, verdict: Verdict) -> None:
        """Fail the requests whose delta gave what is not finite, and let nobody else find what it read."""
        name = verdict.delta.name
        self._counts[name].passes.append(Pass(len(verdict.rows), verdict.clock.seconds))
        for row in verdict.faulty:
            for block in row.blocks:
                verdict.delta.runner.blocks.hide(block)
            self._fail(row.request, f"delta {name!r} gave logits that are not finite", name)

    def _cache(self, request: Request, stream: Stream, pairs: list[tuple[Request, Stream]]) -> bool:
        """See that a stream holds a cached sequence, taking one from a row that is not in this step if need be."""
        cached = self._cached.get(stream.delta, OrderedDict())
        if stream.sequence is None:
            if len(cached) >= stream.delta.runner.max_seqs:
                in_step = {id(other) for _, other in pairs}
                idle = next((other for key, other in cached.items() if key not in in_step), None)
                if idle is None:
                    name = stream.delta.name
                    reason = f"more than {len(cached)} rows run on delta {name!r}; raise --max-delta-seqs"
                    self._fail(request, reason, name)
                    return False
                self.drop(idle)
            stream.sequence, stream.keep = stream.delta.runner.new_sequence(), 0
            stream.counts.rebuilds += stream.num_read > 0
            self._cached.setdefault(stream.delta, OrderedDict())[id(stream)] = stream
        self._cached[stream.delta].move_to_end(id(stream))
        return True


def _by_delta(requests: Sequence[Request]) -> dict[LoadedDelta, list[tuple[int, Request, Stream]]]:
    """The streams of each delta, with the place of their request."""
    found: dict[LoadedDelta, list[tuple[int, Request, Stream]]] = {}
    for place, request in enumerate(requests):
        for stream in request.streams:
            found.setdefault(stream.delta, []).append((place, request, stream))
    return found


def _feed(stream: Stream, stop: int | None = None) -> Feed:
    """What a stream that holds a cached sequence gives its delta to read: its window, or the first ids of that."""
    assert stream.sequence is not None, "see _cache"
    return Feed(stream.sequence, stream.window(stop), stream.keep, min(stream.num_settled, stop or maxsize))
