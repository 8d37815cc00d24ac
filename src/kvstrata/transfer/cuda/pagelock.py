"""Page-locks a mapped range, piece by piece: all of it or nothing.

A piece bounds how long one call to the driver holds the process, and lets progress be told. Each
process that maps an arena registers its own mapping; the pages are locked once for each.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.runtime import ALREADY_REGISTERED, CudaRuntime

__all__ = ["PIECE_BYTES", "PageLock"]

PIECE_BYTES = 1 << 30
"""Length of one registration, a multiple of the page size."""


class PageLock:
    """One range of this process. Owner: the thread that opens it; `close` is idempotent."""

    def __init__(self, runtime: CudaRuntime, address: int, length_bytes: int) -> None:
        """Remember the range; nothing is locked yet."""
        self._runtime = runtime
        self._address = address
        self._length_bytes = length_bytes
        self._held: list[int] = []  # addresses of the registered pieces

    @property
    def is_locked(self) -> bool:
        """Whether any piece is registered: the mapping must not be unmapped before `close`."""
        return bool(self._held)

    def open(
        self,
        *,
        piece_bytes: int = PIECE_BYTES,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Register the range; `progress` gets (bytes so far, bytes in all). Twice is harmless.

        Raises ConfigError if the driver refuses; the pieces before are given back.
        """
        if self._held:
            return
        end = self._address + self._length_bytes
        for start in range(self._address, end, piece_bytes):
            length = min(piece_bytes, end - start)
            code = self._runtime.host_register(start, length)
            if code:
                done = start - self._address
                name = self._runtime.describe(code)
                kept = self._give_back()
                raise ConfigError(
                    f"the CUDA driver refused to page-lock the host tier after {done} of "
                    f"{self._length_bytes} bytes ({name})"
                    + (f"; {kept} pieces stay locked" if kept else ""),
                    hint=_remedy(code),
                )
            self._held.append(start)
            if progress:
                progress(start + length - self._address, self._length_bytes)

    def close(self) -> int:
        """Give every piece back; return how many the driver refused to, which stay locked."""
        return self._give_back()

    def _give_back(self) -> int:
        self._held = [one for one in reversed(self._held) if self._runtime.host_unregister(one)]
        self._held.reverse()
        return len(self._held)


def _remedy(code: int) -> str:
    if code == ALREADY_REGISTERED:
        return "somebody in this process has locked that memory; use one connector a process"
    return (
        "raise the limit of locked memory (ulimit -l unlimited; in a container "
        "--ulimit memlock=-1), use a smaller host tier, and see that nvidia-smi works"
    )
