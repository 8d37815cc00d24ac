"""The Triton kernels. Only `triton_mover.py` imports them: triton is not everywhere.

Under `TRITON_INTERPRET=1` it runs on the CPU, over addresses of host memory. Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["move_rows", "move_tiles"]


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


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def move_rows(  # type: ignore[no-untyped-def]  # noqa: ANN201, PLR0913, PLR0917
    table,  # noqa: ANN001
    moves,  # noqa: ANN001
    rows,  # noqa: ANN001
    width,  # noqa: ANN001
    count_1,  # noqa: ANN001
    count_2,  # noqa: ANN001
    count_3,  # noqa: ANN001
    source_0,  # noqa: ANN001
    source_1,  # noqa: ANN001
    source_2,  # noqa: ANN001
    source_3,  # noqa: ANN001
    target_0,  # noqa: ANN001
    target_1,  # noqa: ANN001
    target_2,  # noqa: ANN001
    target_3,  # noqa: ANN001
    ELEMENT: tl.constexpr,  # noqa: N803
    ELEMENT_BYTES: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    SOURCE_STEP: tl.constexpr,  # noqa: N803
    TARGET_STEP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """Move the rows of a `RowGroup`; `table` is int64 [2, moves]: sources, targets.

    Strides are in elements, the width in `ALIGNED` elements, of which every stride is a multiple,
    which lets the compiler use accesses of up to 16 bytes. Each step of a program moves
    `ROWS` rows of one move, `WIDTH` elements at a time.
    """
    inner = tl.arange(0, WIDTH)
    pieces = tl.cdiv(rows, ROWS)
    for work in range(tl.program_id(0), moves * pieces, tl.num_programs(0)):
        move = work // pieces
        row = (work % pieces) * ROWS + tl.arange(0, ROWS)
        place_3 = (row % count_3).to(tl.int64)
        left = row // count_3
        place_2 = (left % count_2).to(tl.int64)
        left = left // count_2
        place_1 = (left % count_1).to(tl.int64)
        place_0 = (left // count_1).to(tl.int64)
        read = place_0 * source_0 + place_1 * source_1 + place_2 * source_2 + place_3 * source_3
        write = place_0 * target_0 + place_1 * target_1 + place_2 * target_2 + place_3 * target_3
        # Said of two axes: a hint on one axis is lost when the other one is added.
        read = tl.multiple_of(read[:, None], [1, ALIGNED])
        write = tl.multiple_of(write[:, None], [1, ALIGNED])
        source = tl.load(table + move).to(tl.pointer_type(ELEMENT))
        target = tl.load(table + moves + move).to(tl.pointer_type(ELEMENT))
        source = tl.multiple_of(source, ALIGNED * ELEMENT_BYTES)
        target = tl.multiple_of(target, ALIGNED * ELEMENT_BYTES)
        end = width * ALIGNED  # a hint on an argument would be lost, a factor is not
        for at in range(0, end, WIDTH):
            place = at + inner
            mask = (row < rows)[:, None] & (place < end)[None, :]
            values = tl.load(source + (read + place[None, :] * SOURCE_STEP), mask=mask)
            tl.store(target + (write + place[None, :] * TARGET_STEP), values, mask=mask)
