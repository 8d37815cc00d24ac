"""Movers without a GPU: what they refuse, and the real bindings. tests/kernels has the kernel."""

from __future__ import annotations

import sys

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.movers import BatchMover
from kvstrata.transfer.cuda.triton_mover import TritonMover


def test_without_their_libraries_movers_say_what_to_install(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install .kvstrata\[cuda\]"):
        BatchMover()
    with pytest.raises(ConfigError, match=r"pip install .kvstrata\[cuda\]"):
        TritonMover(device="cpu")


def test_tiles_that_would_break_the_alignment_are_refused():
    with pytest.raises(ConfigError, match="multiple of 16"):
        TritonMover(device="cpu", tile_bytes=100)


def test_the_batch_takes_what_the_installed_bindings_give():
    pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings installed")
    BatchMover()
