"""Device copies beside an engine, on streams that advance in any order."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.errors import CapacityError, TransferError
from kvstrata.testing.cuda import FakeCudaBindings, FakeCudaStreams
from kvstrata.transfer.cuda.copier import RunCopier
from kvstrata.transfer.cuda.movers import BatchMover
from kvstrata.transfer.cuda.runs import Run

LAYERS, LAYER_BYTES = 3, 4
SIDE = LAYERS * LAYER_BYTES
OLD, NEW, LATER = b"\x01" * SIDE, b"\x02" * SIDE, b"\x03" * SIDE


def world(seed, *, batched=False):
    streams = FakeCudaStreams(bytearray(OLD + OLD), Random(seed))
    mover = BatchMover(FakeCudaBindings(streams, Random(seed))) if batched else None
    return streams, streams.stream_create(), RunCopier(streams, tickets_max=2, mover=mover)


def layers():
    half = LAYER_BYTES // 2
    return [
        [Run(at, SIDE + at, half), Run(at + half, SIDE + at + half, half)]
        for at in range(0, SIDE, LAYER_BYTES)
    ]


def write(streams, stream, at, data):
    streams.launch(stream, lambda: streams.memory.__setitem__(slice(at, at + len(data)), data))


def drain(streams):
    while streams.advance():
        pass


def save(seed, *, waits, batched=False):
    """The engine writes a source, saves it, and writes over it layer by layer."""
    streams, engine, copier = world(seed, batched=batched)
    write(streams, engine, 0, NEW)
    ticket = copier.submit(layers(), engine)
    for layer in range(LAYERS):
        if waits:
            ticket.wait_layer(layer, engine)
        write(streams, engine, layer * LAYER_BYTES, LATER[:LAYER_BYTES])
    drain(streams)
    assert copier.poll() == [ticket]
    assert copier.poll() == []
    return bytes(streams.memory[SIDE:])


def load(seed, *, waits, batched=False):
    """The engine reads its pages, loads others into them, and reads each layer again."""
    streams, engine, copier = world(seed, batched=batched)
    streams.memory[:SIDE] = NEW
    seen = []
    streams.launch(engine, lambda: seen.append(bytes(streams.memory[SIDE:])))
    ticket = copier.submit(layers(), engine)
    for layer in range(LAYERS):
        if waits:
            ticket.wait_layer(layer, engine)
        at = SIDE + layer * LAYER_BYTES
        streams.launch(
            engine, lambda at=at: seen.append(bytes(streams.memory[at : at + LAYER_BYTES]))
        )
    drain(streams)
    return seen[0], b"".join(seen[1:])


@given(st.integers(), st.booleans())
def test_a_source_is_read_after_it_was_written_and_before_it_is_written_over(seed, batched):
    assert save(seed, waits=True, batched=batched) == NEW


@given(st.integers(), st.booleans())
def test_a_target_is_written_after_it_was_read_and_read_after_it_was_written(seed, batched):
    assert load(seed, waits=True, batched=batched) == (OLD, NEW)


def test_without_the_waits_the_fake_shows_the_hazards():
    assert any(save(seed, waits=False) != NEW for seed in range(50))
    assert any(load(seed, waits=False)[1] != NEW for seed in range(50))


def test_a_ticket_ends_by_polling_only_when_the_copy_did():
    streams, engine, copier = world(1)
    ticket = copier.submit(layers(), engine)
    assert not ticket.ended()
    assert copier.poll() == []
    drain(streams)
    assert ticket.ended()


def test_too_many_in_flight_and_overlapping_runs_change_nothing():
    streams, engine, copier = world(1)
    with pytest.raises(ValueError, match="same bytes"):
        copier.submit([[Run(0, SIDE, 4), Run(4, SIDE + 2, 4)]], engine)
    assert not streams.advance()
    copier.submit(layers(), engine)
    copier.submit(layers(), engine)
    with pytest.raises(CapacityError):
        copier.submit(layers(), engine)
    drain(streams)
    assert len(copier.poll()) == 2
    copier.submit(layers(), engine)


def test_a_refused_copy_still_ends_and_the_layers_before_it_are_good():
    streams, engine, copier = world(1)
    streams.memory[:SIDE] = NEW
    streams.copies_before_failure = 1
    ticket = copier.submit(layers(), engine)
    assert ticket.issued == 1
    ticket.wait_layer(0, engine)
    with pytest.raises(TransferError, match="cudaErrorInvalidValue"):
        ticket.wait_layer(1, engine)
    drain(streams)
    assert copier.poll() == [ticket]
    assert streams.memory[SIDE:] == NEW[:LAYER_BYTES] + OLD[LAYER_BYTES:]
    assert streams.events == 1  # the copier's own


def test_a_layer_of_a_ticket_that_ended_needs_no_wait():
    streams, engine, copier = world(1)
    ticket = copier.submit(layers(), engine)
    drain(streams)
    copier.poll()
    ticket.wait_layer(LAYERS - 1, engine)
    assert ticket.ended()
    assert not streams.advance()


def test_a_copy_whose_end_cannot_be_told_never_ends():
    streams, engine, copier = world(1)
    streams.records_before_failure = 1 + LAYERS
    with pytest.raises(TransferError, match="refused an event"):
        copier.submit(layers(), engine)
    drain(streams)
    assert copier.poll() == []


def test_a_batch_is_one_call_a_layer_and_its_refusal_is_told():
    streams = FakeCudaStreams(bytearray(OLD + OLD), Random(1))
    bindings = FakeCudaBindings(streams, Random(1))
    copier = RunCopier(streams, tickets_max=2, mover=BatchMover(bindings))
    engine = streams.stream_create()
    assert copier.submit(layers(), engine).error is None
    assert bindings.calls == LAYERS
    outside = copier.submit([[Run(0, 2 * SIDE, 1)]], engine)
    assert "cudaErrorInvalidValue" in str(outside.error)


def test_what_a_mover_raises_is_the_tickets_error_and_it_still_ends():
    class Broken:
        def move(self, _table, _stream):
            raise RuntimeError("no such device")

    streams = FakeCudaStreams(bytearray(OLD + OLD), Random(1))
    copier = RunCopier(streams, tickets_max=2, mover=Broken())
    ticket = copier.submit(layers(), streams.stream_create())
    assert "cudaErrorUnknown" in str(ticket.error)
    drain(streams)
    assert copier.poll() == [ticket]


def test_close_gives_all_back_only_when_nothing_is_in_flight():
    streams, engine, copier = world(1)
    tickets = [copier.submit(layers(), engine)]
    assert copier.close() == 1
    tickets.append(copier.submit(layers(), engine))
    assert copier.close() == 2
    drain(streams)
    assert (copier.close(), copier.close()) == (0, 0)
    assert (streams.events, streams.streams) == (0, 1)  # the engine's
    assert copier.poll() == tickets
    with pytest.raises(TransferError, match="closed"):
        copier.submit(layers(), engine)
