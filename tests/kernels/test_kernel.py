"""The Triton kernel without a GPU: in the interpreter, and compiled for one.

Run by `make test-sglang`, in the environment that has triton: it is 200 MB that vLLM's CPU build
can do without.
"""

from __future__ import annotations

import os
import subprocess
import sys

INTERPRETED = """
import numpy as np
from kvstrata.transfer.cuda.tables import RunTable
from kvstrata.transfer.cuda.triton_mover import TritonMover

luck = np.random.default_rng(1)
mover = TritonMover(device="cpu", programs=3, tile_bytes=4096)
for unit in (1, 2, 4, 8, 16):
    base = luck.integers(0, 256, (2, 64 * 1024 + 16), dtype=np.uint8)
    base[1] = 0xEE
    source, target = (row.ctypes.data + -row.ctypes.data % 16 for row in base)
    odd = 9000 * unit % 20000
    lengths = np.array([unit, 3 * unit, 4096 + unit, 8192 + 3 * unit, 640 * unit, odd])
    starts = np.cumsum(lengths) - lengths
    order = luck.permutation(len(lengths))
    places = np.zeros_like(starts)
    places[order] = np.cumsum(lengths[order] + unit) - lengths[order]  # a gap before each
    expected = base[1].copy()
    skip = -base[1].ctypes.data % 16
    at = -base[0].ctypes.data % 16
    for start, place, length in zip(starts, places, lengths):
        expected[skip + place : skip + place + length] = base[0][at + start : at + start + length]
    assert mover.move(RunTable(source + starts, target + places, lengths), 0) == 0
    assert np.array_equal(base[1], expected), unit
print("moved")
"""


def test_the_kernel_moves_every_unit_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "moved\n", done.stderr[-3000:]


COMPILED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstrata.transfer.cuda.kernel import move_tiles

names = ("ELEMENT", "ELEMENT_BYTES", "ALIGNED_BYTES", "STEP")
signature = {"table": "*i64", "tiles": "i32"} | dict.fromkeys(names, "constexpr")
constants = {(2,): tl.int64, (3,): 8, (4,): 16, (5,): 1024}
source = ASTSource(fn=move_tiles, signature=signature, constexprs=constants)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
"""


def test_the_kernel_compiles_to_accesses_of_sixteen_bytes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "ld.global.v2.b64" in done.stdout, done.stderr[-3000:]
    assert "st.global.v2.b64" in done.stdout
