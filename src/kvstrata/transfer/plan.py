"""From slot pairs to byte moves. Pure addressing: no files, no memory, no threads."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.storage.base import SlotGrid
from kvstrata.transfer.base import CopyOp

__all__ = ["OP_BYTES_MAX", "plan_copy"]

OP_BYTES_MAX = 8 << 20
"""Longest single move: long enough for the speed of the device, short enough to share it."""


def plan_copy(
    pairs: Sequence[tuple[int, int]],
    source: SlotGrid,
    target: SlotGrid,
    *,
    op_bytes_max: int = OP_BYTES_MAX,
) -> list[CopyOp]:
    """Return the ops that move every (source slot, target slot) pair, in the order of `pairs`.

    Neighbours are merged when they are adjacent on *both* sides and slots leave no gap; few
    large moves beat many small ones. A single block may be longer than `op_bytes_max`.
    Raises ValueError if the two grids hold blocks of different lengths.
    """
    if source.block_bytes != target.block_bytes:
        raise ValueError(f"blocks of {source.block_bytes} and {target.block_bytes} bytes differ")
    length = source.block_bytes
    gapless = source.stride_bytes == target.stride_bytes == length
    ops: list[CopyOp] = []
    for index, (source_slot, target_slot) in enumerate(pairs):
        here = CopyOp(source.offset(source_slot), target.offset(target_slot), length, index)
        if gapless and ops and _touches(ops[-1], here) and ops[-1].length + length <= op_bytes_max:
            last = ops[-1]
            ops[-1] = CopyOp(
                last.source_offset,
                last.target_offset,
                last.length + length,
                last.first,
                last.count + 1,
            )
        else:
            ops.append(here)
    return ops


def _touches(first: CopyOp, second: CopyOp) -> bool:
    return (
        first.source_offset + first.length == second.source_offset
        and first.target_offset + first.length == second.target_offset
    )
