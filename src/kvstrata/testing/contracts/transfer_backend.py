"""The laws of `TransferBackend`; docs/contracts/transfer-backend.md says them in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from kvstrata.core.ids import TransferId
from kvstrata.transfer.base import Completion, CopyOp, Outcome, TransferBackend

__all__ = ["Ends", "TransferBackendContract"]

_DEADLINE_S = 10.0
_SUBMITS_MAX = 20_000
_REFUSALS_MAX = 10


@dataclass(frozen=True)
class Ends:
    """A source and a target of `length` bytes each, and how to look at them."""

    source: Any
    """Region to read from; filled with bytes that differ from place to place."""
    target: Any
    """Region to write to; zeros at first."""
    length: int
    """Length of both in bytes; at least 64 KiB."""
    source_bytes: bytes
    """What the source holds."""
    read_target: Callable[[], bytes]
    """Returns what the target holds now."""


class TransferBackendContract:
    """Subclass and provide the fixtures `backend` and `ends`, fresh for each test."""

    capability = ("memory", "memory")
    """The (source, target) pair that `ends` stands for; the backend must declare it."""

    @pytest.fixture
    def backend(self) -> TransferBackend:
        """Return the backend under test; it is closed by the suite."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    @pytest.fixture
    def ends(self) -> Ends:
        """Return the source and the target."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    @pytest.fixture(autouse=True)
    def _closed(self, backend: TransferBackend) -> Iterable[None]:
        yield
        backend.close()

    def op(self, source_offset: int, target_offset: int, length: int, first: int = 0) -> Any:
        """Return the op that moves these bytes; override it where ops are not `CopyOp`."""
        return CopyOp(source_offset, target_offset, length, first)

    def drain(self, backend: TransferBackend, names: Iterable[int]) -> dict[int, Completion]:
        """Poll until each named transfer has completed; fail on a second end of any."""
        waiting, found = set(names), {}
        deadline = time.monotonic() + _DEADLINE_S
        while waiting:
            assert time.monotonic() < deadline, f"transfers {waiting} have not completed"
            for completion in backend.poll():
                assert completion.transfer in waiting, f"{completion} was not expected"
                waiting.discard(completion.transfer)
                found[int(completion.transfer)] = completion
        assert backend.poll() == []
        return found

    def test_law_1_bytes_arrive_and_nothing_else_changes(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """Exactly the bytes of each op, exactly at its target."""
        moves = [(0, 4096, 1000), (5000, 20_000, 3), (9000, 0, 4096)]
        ops = [self.op(*move, first) for first, move in enumerate(moves)]
        assert backend.submit(TransferId(1), ops, ends.source, ends.target)
        assert self.drain(backend, [1])[1] == Completion(TransferId(1), Outcome.DONE)
        expected = bytearray(ends.length)
        for source, target, length in moves:
            expected[target : target + length] = ends.source_bytes[source : source + length]
        assert ends.read_target() == bytes(expected)

    def test_law_2_each_transfer_completes_exactly_once(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """Whatever the order in which they end; `drain` sees a second end."""
        names = range(1, 40)
        for name in names:
            op = self.op(name * 1024, name * 1024, 1024)
            assert backend.submit(TransferId(name), [op], ends.source, ends.target)
        done = self.drain(backend, names)
        assert {each.outcome for each in done.values()} == {Outcome.DONE}
        assert ends.read_target()[1024 : 40 * 1024] == ends.source_bytes[1024 : 40 * 1024]

    def test_law_3_a_bad_op_fails_alone(self, backend: TransferBackend, ends: Ends) -> None:
        """It is named in `failed_ops`; the others have moved and it has moved nothing."""
        outside = [(ends.length + 8192, 2048), (-8192, 2048), (2048, -8192), (-1, 2048), (2048, -1)]
        if self.capability[1] == "memory":  # a file has no end for a writer
            outside.append((2048, ends.length + 8192))
        for name, (source_offset, target_offset) in enumerate(outside, 1):
            ops = [
                self.op(0, 0, 512),
                self.op(source_offset, target_offset, 512, 1),
                self.op(512, 512, 512, 2),
            ]
            assert backend.submit(TransferId(name), ops, ends.source, ends.target)
            completion = self.drain(backend, [name])[name]
            assert completion.outcome is Outcome.FAILED
            assert completion.failed_ops == (1,)
            assert completion.reason
        assert ends.read_target() == ends.source_bytes[:1024].ljust(ends.length, b"\0")

    def test_law_4_cancel_still_completes(self, backend: TransferBackend, ends: Ends) -> None:
        """Done or cancelled, never lost; cancelling what has ended or never was is harmless."""
        for name in range(1, 9):
            ops = [self.op(0, 0, 8192)] * 50
            assert backend.submit(TransferId(name), ops, ends.source, ends.target)
            backend.cancel(TransferId(name))
        backend.cancel(TransferId(99))
        done = self.drain(backend, range(1, 9))
        for completion in done.values():
            assert completion.outcome in {Outcome.DONE, Outcome.CANCELLED}
            if completion.outcome is Outcome.CANCELLED:
                assert completion.failed_ops == tuple(range(50))
        backend.cancel(TransferId(1))
        assert backend.poll() == []

    def test_law_5_nothing_moves_after_completion(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """A slot may be reused as soon as the completion was polled."""
        assert backend.submit(TransferId(1), [self.op(0, 0, 8192)], ends.source, ends.target)
        self.drain(backend, [1])
        before = ends.read_target()
        backend.close()
        assert ends.read_target() == before

    def test_law_6_capabilities_are_declared(self, backend: TransferBackend) -> None:
        """What a suite runs must be among them: a registry chooses by nothing else."""
        assert self.capability in backend.capabilities()

    def test_law_7_closed_accepts_nothing(self, backend: TransferBackend, ends: Ends) -> None:
        """And closing twice is harmless."""
        backend.close()
        backend.close()
        assert not backend.submit(TransferId(1), [self.op(0, 0, 1)], ends.source, ends.target)
        assert ends.read_target() == bytes(ends.length)

    def test_law_8_what_was_accepted_before_close_completes_once(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """Done or cancelled; what says it is done has arrived."""
        for name in range(1, 9):
            ops = [self.op(0, 0, 8192)] * 50 + [self.op(0, name * 4096 + 8192, 4096)]
            assert backend.submit(TransferId(name), ops, ends.source, ends.target)
        backend.close()
        for name, completion in self.drain(backend, range(1, 9)).items():
            assert completion.outcome in {Outcome.DONE, Outcome.CANCELLED}
            if completion.outcome is Outcome.DONE:
                place = name * 4096 + 8192
                assert ends.read_target()[place : place + 4096] == ends.source_bytes[:4096]

    def test_law_9_a_refused_transfer_does_nothing(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """Queues are bounded: who submits faster than bytes move is refused, and told at once."""
        accepted: list[int] = []
        refused: list[int] = []
        name = tries = 0
        while not refused:
            name += 1
            assert name < _SUBMITS_MAX, "a queue without a bound"
            ops = [self.op(0, 0, 8192)] * 200
            if backend.submit(TransferId(name), ops, ends.source, ends.target):
                accepted.append(name)
                continue
            # Full a moment ago. Should a place have become free meanwhile, we fill it once more.
            name += 1
            place = 8192 + tries * 4096
            probe = self.op(0, place, 4096)
            tries += 1
            assert tries < _REFUSALS_MAX, "never full for two calls in a row"
            if backend.submit(TransferId(name), [probe], ends.source, ends.target):
                accepted.append(name)
            else:
                refused.append(place)
        for each in accepted:
            backend.cancel(TransferId(each))
        assert set(self.drain(backend, accepted)) == set(accepted)
        assert not any(ends.read_target()[refused[0] : refused[0] + 4096])

    def test_law_10_a_transfer_without_ops_completes(
        self, backend: TransferBackend, ends: Ends
    ) -> None:
        """There is nothing to move, so all of it has moved."""
        assert backend.submit(TransferId(1), [], ends.source, ends.target)
        assert self.drain(backend, [1])[1] == Completion(TransferId(1), Outcome.DONE)
        assert not any(ends.read_target())
