"""Copies on a stream of their own, ordered with the engine's stream by events alone.

Owner: the engine's model runner thread; nothing here waits. Order of one submit:

    engine stream   writes and reads of before | event A | wait E0 | layer 0 | wait E1 | ...
    copy stream                                  wait A | layer 0, E0 | layer 1, E1 | ...

So a source is read after the engine wrote it, and a target is written after the engine read it.
Whoever uses a layer's target, or writes over its source, first calls `Ticket.wait_layer`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.core.errors import CapacityError, TransferError
from kvstrata.transfer.cuda.movers import EachRunMover, RunMover
from kvstrata.transfer.cuda.runs import Run
from kvstrata.transfer.cuda.runtime import UNKNOWN, CudaStreams
from kvstrata.transfer.cuda.tables import RunTable, merge_table, table_of

__all__ = ["RunCopier", "Ticket"]

logger = logging.getLogger(__name__)


class Ticket:
    """One submit: an event for each layer that was given to the device whole."""

    def __init__(self, streams: CudaStreams, layers: int) -> None:
        """Take the events, which the copier gives back."""
        self._streams = streams
        self._events = [streams.event_create() for _ in range(layers + 1)]
        self._endless = False
        self.issued = 0
        """Layers that were given to the device whole."""
        self.error: TransferError | None = None
        """Why the layers from `issued` on were not; None if all were."""

    def record_layer(self, stream: int) -> int:
        """Mark the end of the next layer; for the copier."""
        code = self._streams.event_record(self._events[self.issued], stream)
        self.issued += not code
        return code

    def record_end(self, stream: int) -> int:
        """Mark the end of all that was given to the device; for the copier.

        If that is refused nothing tells the end, and an event without a record counts as one that
        happened: such a ticket never ends.
        """
        code = self._streams.event_record(self._events[-1], stream)
        self._endless = bool(code)
        return code

    def wait_layer(self, layer: int, stream: int) -> None:
        """Let `stream` go on after `layer` was copied; TransferError if it never will be."""
        if layer >= self.issued:
            raise self.error or TransferError(f"no layer {layer} was submitted", retryable=False)
        if not self._events:
            return  # it ended: there is nothing to wait for
        if code := self._streams.stream_wait(stream, self._events[layer]):
            raise TransferError(
                f"CUDA refused a wait ({self._streams.describe(code)})", retryable=False
            )

    def ended(self) -> bool:
        """Return whether nothing is read or written any more, after an error too; never waits."""
        if self._endless or not self._events:
            return not self._endless
        return self._streams.event_happened(self._events[-1])

    def give_back(self) -> None:
        """Give the events back; for the copier, once it ended. Twice is harmless."""
        for event in self._events:
            self._streams.event_destroy(event)
        self._events.clear()


class RunCopier:
    """Moves contiguous runs; one instance for each direction, so that both run at once."""

    def __init__(
        self, streams: CudaStreams, *, tickets_max: int, mover: RunMover | None = None
    ) -> None:
        """Make the stream; at most `tickets_max` submits are in flight. Default: a copy a run."""
        self._streams = streams
        self._mover = mover or EachRunMover(streams)
        self._closed = False
        self._stream = streams.stream_create()
        self._start = streams.event_create()
        self._tickets_max = tickets_max
        self._flying: list[Ticket] = []

    def submit(self, layers: Sequence[Sequence[Run] | RunTable], engine_stream: int) -> Ticket:
        """Copy the runs of each layer, in order, after what `engine_stream` was given so far.

        Raises CapacityError with too many in flight, ValueError for runs that overlap,
        TransferError after `close`; nothing was given to the device then. If the device refuses
        later, the ticket has the error.
        """
        if self._closed:
            raise TransferError("this copier is closed", retryable=False)
        if len(self._flying) >= self._tickets_max:
            raise CapacityError("too many copies in flight", requested=1, available=0)
        merged = [
            merge_table(runs if isinstance(runs, RunTable) else table_of(runs)) for runs in layers
        ]
        ticket = Ticket(self._streams, len(merged))
        code = self._streams.event_record(self._start, engine_stream)
        code = code or self._streams.stream_wait(self._stream, self._start)
        for runs in merged:
            code = code or self._move(runs) or ticket.record_layer(self._stream)
        if code:
            name = self._streams.describe(code)
            ticket.error = TransferError(f"CUDA refused a copy ({name})", retryable=False)
        self._flying.append(ticket)
        if end := ticket.record_end(self._stream):  # nothing would ever tell its end
            raise TransferError(
                f"CUDA refused an event ({self._streams.describe(end)})", retryable=False
            )
        return ticket

    def poll(self) -> list[Ticket]:
        """Return the tickets that ended since the last call; each comes once."""
        ended = [ticket for ticket in self._flying if ticket.ended()]
        self._flying = [ticket for ticket in self._flying if ticket not in ended]
        for ticket in ended:
            ticket.give_back()
        return ended

    def close(self) -> int:
        """Give the stream back and return 0; if copies are in flight return how many, do nothing.

        Twice is harmless. Memory that copies in flight touch must stay: poll, and close again.
        `poll` still returns the tickets that ended and were not yet asked for.
        """
        busy = sum(not ticket.ended() for ticket in self._flying)
        if busy or self._closed:
            return busy
        self._closed = True
        for ticket in self._flying:
            ticket.give_back()
        self._streams.event_destroy(self._start)
        self._streams.stream_destroy(self._stream)
        return 0

    def _move(self, runs: RunTable) -> int:
        try:
            return self._mover.move(runs, self._stream)
        except Exception:  # a mover's library; some runs may be under way, and the end is told
            logger.exception("a device copy failed")
            return UNKNOWN
