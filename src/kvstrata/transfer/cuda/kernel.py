"""The Triton kernel of `TritonMover`. Only that imports it: triton is not everywhere.

Under `TRITON_INTERPRET=1` it runs on the CPU, over addresses of host memory. Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["move_tiles"]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def move_tiles(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table,  # noqa: ANN001
    tiles,  # noqa: ANN001
    ELEMENT: tl.constexpr,  # noqa: N803
    ELEMENT_BYTES: tl.constexpr,  # noqa: N803
    ALIGNED_BYTES: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """Move tile p, p + programs, ...; `table` is int64 [3, tiles]: sources, targets, bytes.

    Each step of a program moves `STEP` elements. `ALIGNED_BYTES` divides every address and length,
    which lets the compiler use accesses of up to 16 bytes.
    """
    inner = tl.arange(0, STEP)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        source = tl.load(table + tile).to(tl.pointer_type(ELEMENT))
        target = tl.load(table + tiles + tile).to(tl.pointer_type(ELEMENT))
        length = tl.load(table + 2 * tiles + tile) // ELEMENT_BYTES
        source = tl.multiple_of(source, ALIGNED_BYTES)
        target = tl.multiple_of(target, ALIGNED_BYTES)
        length = tl.multiple_of(length, ALIGNED_BYTES // ELEMENT_BYTES)
        for at in range(0, length, STEP):
            place = at + inner
            mask = place < length
            tl.store(target + place, tl.load(source + place, mask=mask), mask=mask)
