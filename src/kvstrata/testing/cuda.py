"""A CUDA runtime without a GPU: keeps what is registered and refuses misuse as the real one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvstrata.transfer.cuda.runtime import ALREADY_REGISTERED

__all__ = ["FakeCudaBindings", "FakeCudaRuntime", "FakeCudaStreams"]

_NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    712: "AlreadyRegistered",
    999: "cudaErrorUnknown",
}
_NOT_REGISTERED = 713


class FakeCudaRuntime:
    """Ranges of one process; refuses beyond `lockable_bytes` as a memlock limit would."""

    def __init__(self, lockable_bytes: int) -> None:
        """Start with nothing registered."""
        self.lockable_bytes = lockable_bytes
        self.registered: dict[int, int] = {}
        self.stuck: set[int] = set()
        """Addresses that cannot be given back."""

    def host_register(self, address: int, length_bytes: int) -> int:
        """Register unless empty, overlapping or over the limit."""
        if length_bytes < 1:
            return 1
        if any(
            address < start + length and start < address + length_bytes
            for start, length in self.registered.items()
        ):
            return ALREADY_REGISTERED
        if sum(self.registered.values()) + length_bytes > self.lockable_bytes:
            return 2
        self.registered[address] = length_bytes
        return 0

    def host_unregister(self, address: int) -> int:
        """Forget a range that starts exactly at `address`."""
        if address in self.stuck or address not in self.registered:
            return _NOT_REGISTERED
        del self.registered[address]
        return 0

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        return _NAMES.get(code, f"error {code}")


class FakeCudaStreams:
    """Streams as queues that advance in any order, one byte at a time, over one memory."""

    def __init__(self, memory: bytearray, random: Random) -> None:
        """Copies read and write `memory`, by address."""
        self.memory = memory
        self.copies_before_failure: int | None = None
        self.records_before_failure: int | None = None
        self._random = random
        self._queues: list[list[tuple[str, int, int] | Callable[[], None]]] = []
        self._recorded: dict[int, int] = {}
        self._happened: dict[int, int] = {}
        self._events = 0
        self._destroyed: set[int] = set()

    def stream_create(self) -> int:
        """Return a new stream."""
        self._queues.append([])
        return len(self._queues) - 1

    def stream_destroy(self, stream: int) -> None:
        """Take no more for a stream; KeyError if that was done before."""
        if stream in self._destroyed:
            raise KeyError(stream)
        self._destroyed.add(stream)

    @property
    def streams(self) -> int:
        """How many streams were not given back."""
        return len(self._queues) - len(self._destroyed)

    def event_create(self) -> int:
        """Return a new event."""
        self._events += 1
        self._recorded[self._events] = self._happened[self._events] = 0
        return self._events

    def event_destroy(self, event: int) -> None:
        """Forget an event; KeyError if that was done before."""
        del self._recorded[event]

    @property
    def events(self) -> int:
        """How many events were not given back."""
        return len(self._recorded)

    def event_record(self, event: int, stream: int) -> int:
        """Queue the event."""
        if self.records_before_failure is not None:
            if not self.records_before_failure:
                return 1
            self.records_before_failure -= 1
        self._recorded[event] += 1
        self._queues[stream].append(("record", event, self._recorded[event]))
        return 0

    def event_happened(self, event: int) -> bool:
        """Return whether its last record has happened."""
        return self._happened[event] >= self._recorded[event]

    def stream_wait(self, stream: int, event: int) -> int:
        """Queue a wait for the event's last record."""
        self._queues[stream].append(("wait", event, self._recorded[event]))
        return 0

    def copy(self, target: int, source: int, length_bytes: int, stream: int) -> int:
        """Queue a copy, a byte at a time; refuse what reaches outside the memory."""
        if self.copies_before_failure is not None:
            if not self.copies_before_failure:
                return 1
            self.copies_before_failure -= 1
        if length_bytes < 1 or max(target, source) + length_bytes > len(self.memory):
            return 1
        self._queues[stream].extend(("copy", target + i, source + i) for i in range(length_bytes))
        return 0

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        """Queue a kernel, which runs at once when its turn comes."""
        self._queues[stream].append(kernel)

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        return _NAMES.get(code, f"error {code}")

    def advance(self) -> bool:
        """Let one stream that can do one thing; return whether any could."""
        ready = [queue for queue in self._queues if queue and not self._blocked(queue[0])]
        if not ready:
            return False
        done = self._random.choice(ready).pop(0)
        if not isinstance(done, tuple):
            done()
        elif done[0] == "copy":
            self.memory[done[1]] = self.memory[done[2]]
        elif done[0] == "record":
            self._happened[done[1]] = done[2]
        return True

    def _blocked(self, head: tuple[str, int, int] | Callable[[], None]) -> bool:
        return isinstance(head, tuple) and head[0] == "wait" and self._happened[head[1]] < head[2]


class FakeCudaBindings:
    """The part of `cuda.bindings.runtime` that batches need, over fake streams.

    As the real one it keeps no order within a batch, and refuses a batch whose arrays disagree.
    """

    class cudaMemcpySrcAccessOrder:  # noqa: N801
        """Names of the real one."""

        cudaMemcpySrcAccessOrderStream = 1  # noqa: N815

    class cudaMemcpyFlags:  # noqa: N801
        """Names of the real one."""

        cudaMemcpyFlagPreferOverlapWithCompute = 1  # noqa: N815

    class cudaMemcpyAttributes:  # noqa: N801
        """Names of the real one; unset fields are refused."""

        srcAccessOrder = 0  # noqa: N815
        flags = 0

    def __init__(self, streams: FakeCudaStreams, random: Random) -> None:
        """Copies go to `streams`, in an order by `random`."""
        self._streams = streams
        self._random = random
        self.calls = 0

    def cudaMemcpyBatchAsync(  # noqa: N802, PLR0913, PLR0917
        self,
        targets: list[int],
        sources: list[int],
        lengths: list[int],
        count: int,
        attributes: list[FakeCudaBindings.cudaMemcpyAttributes],
        firsts: list[int],
        attributes_count: int,
        stream: int,
    ) -> tuple[int]:
        """Queue every copy."""
        self.calls += 1
        agree = len(targets) == len(sources) == len(lengths) == count > 0
        in_order = all(one.srcAccessOrder == 1 for one in attributes)
        if not (agree and in_order and firsts == [0] and len(attributes) == attributes_count == 1):
            return (1,)
        rows = list(zip(targets, sources, lengths, strict=True))
        self._random.shuffle(rows)
        codes = [self._streams.copy(*row, stream) for row in rows]
        return (max(codes),)
