"""The rearranging kernel without a GPU: in the interpreter, and compiled for one.

Run by `make test-sglang`, in the environment that has triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAWS = Path(__file__).with_name("rearranged.py")


def test_the_kernel_rearranges_as_the_cpu_does_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, str(LAWS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.stdout == "rearranged\n", done.stdout[-1000:] + done.stderr[-3000:]


COMPILED = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstrata.transfer.cuda.kernel import move_rows

element_bytes, aligned, rows, step, *steps = map(int, sys.argv[1:])
numbers = move_rows.arg_names
constants = {
    "ELEMENT": getattr(tl, f"int{8 * element_bytes}"), "ELEMENT_BYTES": element_bytes,
    "ALIGNED": aligned, "SOURCE_STEP": steps[0], "TARGET_STEP": steps[1], "ROWS": rows,
    "WIDTH": step,
}
signature = {name: "constexpr" if name in constants else "i32" for name in numbers}
signature["table"] = "*i64"
source = ASTSource(
    fn=move_rows, signature=signature,
    constexprs={(numbers.index(name),): value for name, value in constants.items()},
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("numbers", "access"),
    [
        ((8, 2, 64, 16, 1, 1), "global.v2.b64"),  # 128 channels of BF16: rows of 256 bytes
        ((8, 2, 2, 512, 1, 1), "global.v2.b64"),  # whole pages
        ((8, 2, 128, 8, 1, 1), "global.v2.b64"),  # 128 channels of FP8
        ((2, 1, 64, 16, 128, 1), "global.b16"),  # keys packed by channel: element by element
    ],
)
def test_the_kernel_compiles_to_the_longest_accesses_that_its_layout_allows(numbers, access):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *map(str, numbers)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert f"ld.{access}" in done.stdout, done.stderr[-3000:]
    assert f"st.{access}" in done.stdout, done.stderr[-3000:]
