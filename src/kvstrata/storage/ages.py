"""Which blocks of a directory go first, found in two walks and a bounded amount of memory.

The first walk adds each block's bytes to the bucket of its last use. The cut is where the oldest
buckets sum up to the bytes that must go; inside the last bucket a share goes, chosen by key. So
collectors on several machines that saw the same directory choose the same blocks, and one that
comes later finds fewer bytes and chooses fewer: nobody removes twice what had to go once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, NamedTuple

from kvstrata.core.ids import SequenceHash

__all__ = ["Ages", "Cut"]

_KEY_SPACE: Final = 1 << 32


class Cut(NamedTuple):
    """Everything in an older bucket goes, and of this one a share."""

    bucket: int
    """The bucket that the cut goes through."""
    share: float
    """Which share of its keys goes, from the smallest key up."""

    def takes(self, bucket: int, key: SequenceHash) -> bool:
        """Return whether a block last used then and of this key goes."""
        if bucket != self.bucket:
            return bucket < self.bucket
        return int.from_bytes(key[:4], "big") < self.share * _KEY_SPACE


class Ages:
    """Bytes by the time of their last use, in steps of `step_s`."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._bytes: defaultdict[int, int] = defaultdict(int)
        self.total_bytes = 0

    def bucket(self, used_s: float) -> int:
        """Return the bucket of a time."""
        return int(used_s // self._step_s)

    def add(self, used_s: float, stored_bytes: int) -> None:
        """Count one block."""
        self._bytes[self.bucket(used_s)] += stored_bytes
        self.total_bytes += stored_bytes

    def cut(self, excess_bytes: int, *, whole: bool) -> Cut:
        """Return the cut that removes about `excess_bytes`, or whole buckets up to it and beyond.

        Shares of a bucket with few blocks may miss; `whole` always makes progress.
        """
        left = excess_bytes
        for bucket in sorted(self._bytes):
            held = self._bytes[bucket]
            if left <= held:
                return Cut(bucket, 1.0 if whole else left / held)
            left -= held
        return Cut(max(self._bytes, default=0), 1.0)
