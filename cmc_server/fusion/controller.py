"""The life of steered requests, independent of any engine.

An engine adapter knows rows and requests; the controller knows *slots*, numbers that the adapter chooses::

    load(source)                 a delta becomes usable
    admit(slot, prompt, controls)    a request takes a slot
    advance(slot, token_ids)     its response grew
    advance_unseen(slot), see(slot, token_id)    the same in two parts, where the device knows the token first
    begin(slots, device)         the next shift will want these; optional
    shift(rows, logits)          add the deltas to the rows of some slots, in place
    prefill(slots, device)       let deltas read ahead for later shifts; optional
    release(slot)                the request is gone

A delta that fails never turns into base output: its row is forced to the reserved token, which ends the request.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cmc_server.config import FAST_PATHS, FastPath, Unmapped
from cmc_server.delta.spelling import DeltaInput, WholeDeltaInput
from cmc_server.delta.transfer import on_device
from cmc_server.errors import DeltaRuntimeError
from cmc_server.fusion.beside import Beside
from cmc_server.fusion.counts import DeltaCounts, TopWatch
from cmc_server.fusion.exchange import Exchange, anywhere
from cmc_server.fusion.loaded import LoadedDelta
from cmc_server.fusion.passes import DeltaPasses
from cmc_server.fusion.rule import common_policy, end_rows_, fuse_, fuse_by_copy_
from cmc_server.fusion.side_stream import SideStream
from cmc_server.fusion.streams import (
    Ahead,
    Output,
    Request,
    Row,
    Steering,
    Stream,
    Unseen,
    same_deltas,
    select_rows,
    spread_outputs,
)

logger = logging.getLogger(__name__)


class DeltaController:
    """Keeps every steered request's deltas up to date and applies the rule.

    Args:
        reserved_token_id: user token that ends a failed request; masked for all other steered rows. None raises
            :class:`DeltaRuntimeError` instead, for engines where the caller sees the exception.
        exchange: to the other ranks under tensor parallelism.
        beside: where forward passes run that :meth:`begin` asks for; None leaves all to :meth:`shift`. Not used under
            tensor parallelism, where all ranks have to do the same in the same order.
        fast_paths: of these, ``rule``, ``spelling`` and, on a GPU, ``overlap`` are the controller's.
    """

    def __init__(
        self,
        reserved_token_id: int | None = None,
        exchange: Exchange | None = None,
        beside: Beside | None = None,
        fast_paths: Collection[FastPath] = FAST_PATHS,
    ) -> None:
        self._apply_rule = fuse_ if "rule" in fast_paths else fuse_by_copy_
        self._spread = spread_outputs if "rule" in fast_paths else (lambda outputs, _: outputs)
        self._overlaps = "overlap" in fast_paths
        self._side_stream = SideStream()
        self._input = DeltaInput if "spelling" in fast_paths else WholeDeltaInput
        self._reserved = reserved_token_id
        self._exchange = exchange
        self._beside = beside if exchange is None else None
        self._ahead: Ahead | None = None
        self._deltas: dict[str, LoadedDelta] = {}
        self._kept: dict[tuple[str, str], LoadedDelta] = {}
        self._retired: set[tuple[str, str]] = set()
        self._requests: dict[int, Request] = {}
        self._watch = TopWatch()
        #: By the names of all deltas that were ever loaded.
        self.counts: dict[str, DeltaCounts] = {}
        defers = reserved_token_id is not None and exchange is None
        self._passes = DeltaPasses(self.counts, self._fail, runs=self.is_leader, defers=defers)

    @property
    def deltas(self) -> Mapping[str, LoadedDelta]:
        """The loaded deltas by name."""
        return self._deltas

    @property
    def kept(self) -> Mapping[tuple[str, str], LoadedDelta]:
        """Deltas that were replaced or unloaded, by name and version: requests that chose them may still come."""
        return self._kept

    @property
    def is_leader(self) -> bool:
        """Whether this rank runs the deltas; only there :attr:`counts` is complete."""
        return self._exchange is None or self._exchange.is_leader

    def num_running(self, delta: LoadedDelta) -> int:
        """How many requests run on a delta."""
        return sum(stream.delta is delta for request in self._requests.values() for stream in request.streams)

    def load(self, delta: LoadedDelta) -> None:
        """Make a delta usable under its name. One that had the name is kept for requests that chose it."""
        self._finish_ahead()
        self._side_stream.renew()
        if delta.name in self._deltas:
            self.unload(delta.name)
        self._deltas[delta.name] = delta
        self.counts.setdefault(delta.name, DeltaCounts())

    def unload(self, name: str) -> None:
        """Take a delta out of use; it is kept for requests that chose it, until :meth:`retire`."""
        self._finish_ahead()
        delta = self._deltas.pop(name)
        self._kept[name, delta.artifact.version] = delta

    def restore(self, name: str, version: str) -> bool:
        """Make a kept delta usable again; whether there is one of this name and content."""
        delta = self._kept.pop((name, version), None)
        self._retired.discard((name, version))
        if delta is not None:
            self.load(delta)
        return delta is not None

    def retire(self, name: str, version: str) -> None:
        """Forget a kept delta, as soon as no request runs on it."""
        self._retired.add((name, version))
        self._forget_retired()

    def admit(
        self,
        slot: int,
        prompt: Sequence[int] | None,
        steering: Sequence[Steering],
        unmapped: Unmapped | None = None,
        request_id: str | None = None,
    ) -> None:
        """Give a slot to a request. Whatever held the slot before is released.

        Args:
            slot: the adapter's number for the request.
            prompt: user token ids of the prompt, used where a steering brings no ``prompt_ids``; None if unknown.
            steering: the active deltas, at least one.
            unmapped: the request's policy; None lets the manifests decide.
            request_id: what the log calls it, should it fail.
        """
        self.release(slot)
        request = self._requests[slot] = Request(request_id=request_id)
        for one in steering:
            try:
                request.streams.append(self._open(prompt, one))
            except Exception as error:  # any cause must end the request, never the engine
                self._fail(request, f"delta {one.name!r} could not be started: {error}", one.name)
        own = (stream.delta.artifact.manifest.unmapped for stream in request.streams)
        request.unmapped = unmapped or common_policy(own)

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append response tokens to a request."""
        self._finish_ahead()
        request = self._requests[slot]
        if request.failed or not token_ids:
            return
        request.is_counted = False
        for stream in request.streams:
            try:
                stream.extend(token_ids)
            except Exception as error:  # see admit
                name = stream.delta.name
                self._fail(request, f"the response could not be spelled for delta {name!r}: {error}", name)

    def can_read_unseen(self, slot: int, num_columns: int) -> bool:
        """Whether :meth:`advance_unseen` is possible, since no token ever has to be spelled for the slot's deltas.

        Args:
            slot: of an admitted request.
            num_columns: of the user LLM's logits; any of them may be sampled.
        """
        request = self._requests[slot]
        if not self._overlaps or self._exchange is not None or request.failed:
            return False
        return all(
            stream.can_read_unseen and num_columns <= len(stream.delta.speller.follows) for stream in request.streams
        )

    def advance_unseen(self, slot: int) -> None:
        """Append a response token that only the device knows: the next :meth:`shift` is given it."""
        self._finish_ahead()
        request = self._requests[slot]
        request.is_counted = False
        for stream in request.streams:
            stream.extend_unseen()

    def see(self, slot: int, token_id: int) -> None:
        """That token has arrived; to be called before the response grows again."""
        for stream in self._requests[slot].streams:
            stream.see(token_id)

    def release(self, slot: int) -> None:
        """Forget a request and free its cache; a slot that nobody holds is fine."""
        self._finish_ahead()
        request = self._requests.pop(slot, None)
        for stream in request.streams if request else ():
            self._passes.drop(stream)
        if self._retired:
            self._forget_retired()

    def begin(self, slots: Sequence[int], device: torch.device) -> None:
        """Run the deltas of these slots beside whatever the caller does until :meth:`shift`.

        Nothing else of the controller is touched meanwhile: every other method waits for the end first.

        Args:
            slots: those that the next :meth:`shift` will want. Should it want others, it starts anew.
            device: where the logits will be.
        """
        if self._beside is None:
            return
        self._finish_ahead()
        requests = self._running(slots)
        if requests:
            outputs = self._beside.start(lambda: self._spread(self._passes.run(requests, device), requests))
            self._ahead = Ahead(list(slots), outputs)

    def shift(self, rows: Sequence[tuple[int, int]], logits: Tensor, unseen: Unseen | None = None) -> Tensor:
        """Apply the rule in place.

        Args:
            rows: (row of ``logits``, slot) for every steered row, slots without repetition.
            logits: [B, U] float32.
            unseen: for each of ``rows`` the token of its last :meth:`advance_unseen`; None if there was none.

        Returns:
            ``logits``; rows that are not named are bit-identical.

        Raises:
            DeltaRuntimeError: a delta failed and there is no reserved token.
        """
        steered = [(row, self._requests[slot]) for row, slot in rows]
        self._passes.hear()
        self._agree(steered, logits.device)
        slots = [slot for _, slot in rows]
        outputs = self._take_ahead(slots)
        if outputs is None:
            outputs = self._run_aside(steered, logits.device, unseen)
        if self._exchange is not None:
            for output in outputs.values():
                self._exchange.broadcast(output.logits)
        healthy = {row: request for row, request in steered if not request.failed}
        look = self._watch.look(list(healthy), logits)
        for members in same_deltas(steered).values():
            try:
                self._apply(members, outputs, logits)
            except Exception as error:  # see admit
                for _, request in members:
                    self._fail(request, f"the logits could not be added: {error}", *request.delta_names)
        self._agree(steered, logits.device)
        for row, request in steered:
            if request.failed:
                self._end(logits[row])
            else:
                request.count_token()
        if look is not None and not healthy[look.row].failed:
            look.count([stream.counts.top for stream in healthy[look.row].streams])
        return logits

    def prefill(self, slots: Sequence[int], device: torch.device) -> None:
        """Let the deltas read on in prompts that the user LLM has not read to their end; the next steps do not wait.

        Args:
            slots: of admitted requests that :meth:`shift` does not yet want.
            device: where the logits will be.
        """
        if not self._overlaps:
            return
        self._finish_ahead()
        read = partial(self._passes.prefill, self._running(slots))
        if device.type == "cuda":
            self._side_stream.queue(read, device)
        else:
            read()

    def _running(self, slots: Sequence[int]) -> list[Request]:
        return [request for slot in slots if not (request := self._requests[slot]).failed]

    def _take_ahead(self, slots: list[int]) -> dict[LoadedDelta, Output] | None:
        """What was begun for just these slots; their requests are still the same, see :meth:`_finish_ahead`."""
        ahead, self._ahead = self._ahead, None
        return None if ahead is None else ahead.wait_for(slots)

    def _finish_ahead(self) -> None:
        """Wait for what was begun, and drop it: its inputs are about to change."""
        self._take_ahead([])

    def _apply(self, members: list[Row], outputs: dict[LoadedDelta, Output], logits: Tensor) -> None:
        """The rule for rows that share their deltas and policy."""
        index = on_device([row for row, _ in members], logits.device)
        first = members[0][1]
        shifts, finite = [], []
        for position, stream in enumerate(first.streams):
            streams = [request.streams[position] for _, request in members]
            output = outputs[stream.delta]
            shifts.append(output.shift(streams, stream.delta.delta_ids, first.unmapped))
            if output.finite is not None:
                finite.append(select_rows(output.finite, [output.rows[id(one)] for one in streams]))
        self._apply_rule(logits, index, shifts, first.unmapped)
        if self._reserved is not None:
            logits[:, self._reserved].index_fill_(0, index, -torch.inf)
            if finite:
                end_rows_(logits, index, ~torch.stack(finite).all(dim=0), self._reserved)

    def _run_aside(
        self, steered: Sequence[Row], device: torch.device, unseen: Unseen | None
    ) -> dict[LoadedDelta, Output]:
        """On a GPU the user LLM's forward pass is queued already when :meth:`shift` is called, and hardly begun.

        In a stream of their own the deltas run beside it, and are waited for only where their logits are used.
        """
        running = [place for place, (_, request) in enumerate(steered) if not request.failed]
        if unseen is not None:
            unseen = replace(unseen, places=[unseen.places[place] for place in running])
        run = partial(self._passes.run, [steered[place][1] for place in running], device, unseen)
        return self._side_stream.run(run, device, unseen) if device.type == "cuda" and self._overlaps else run()

    def _agree(self, steered: Sequence[Row], device: torch.device) -> None:
        """A request that failed on any rank fails on this one, too."""
        if self._exchange is None:
            return
        failed = anywhere(self._exchange, [request.failed for _, request in steered], device)
        for (_, request), has_failed in zip(steered, failed, strict=True):
            request.failed = has_failed
        if self._reserved is None and any(failed):  # put off until here, since all ranks have to come this far
            raise DeltaRuntimeError("A steered request failed on one of the ranks; its log says why.")

    def _open(self, prompt: Sequence[int] | None, steering: Steering) -> Stream:
        delta = self._deltas.get(steering.name)
        if steering.version is not None:
            delta = self._kept.get((steering.name, steering.version), delta)
        if delta is None:
            raise DeltaRuntimeError(f"delta {steering.name!r} is not loaded")
        if steering.version is not None and steering.version != delta.artifact.version:
            raise DeltaRuntimeError(
                f"delta {steering.name!r} is loaded as version {delta.artifact.version}, not {steering.version}"
            )
        prompt_ids = steering.prompt_ids
        if prompt_ids is None:
            if prompt is None:
                raise DeltaRuntimeError("the prompt has no token ids")
            prompt_ids = delta.prompt_ids(prompt)
        counts = self.counts[delta.name]
        stream = Stream(delta, steering.strength, self._input(delta.speller, prompt_ids), counts)
        stream.extend(())
        counts.admissions += 1
        return stream

    def _forget_retired(self) -> None:
        for key in list(self._retired):
            delta = self._kept.get(key)
            if delta is None or not self.num_running(delta):
                self._retired.discard(key)
                self._kept.pop(key, None)

    def _fail(self, request: Request, reason: str, *names: str) -> None:
        """End a request because of these deltas."""
        if not request.failed:
            logger.error("Request %s ends with an error: %s.", request.request_id or "without an id", reason)
            for counts in (self.counts[name] for name in names if name in self.counts):
                counts.failures += 1
        request.failed = True
        if self._reserved is None and self._exchange is None:
            raise DeltaRuntimeError(f"A steered request failed: {reason}.")

    def _end(self, row: Tensor) -> None:
        row.fill_(-torch.inf)[self._reserved] = 0.0
