"""HiCache's copies between device and host pools on CPU tensors, for tests.

Indices are token numbers; pages are runs of `page_size` of them. Names and order of parameters are
SGLang's, which calls these by name.
"""

from __future__ import annotations

import torch


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, **_sizes):
    """Copy tokens between pools that are both one tensor a layer."""
    for each, other in zip(src_layers, dst_layers, strict=True):
        other[dst_indices.long()] = each[src_indices.long()]


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """Copy tokens of K's layers, then of V's, into two tensors `[pages, layers, page, ...]`."""
    layers = len(src_ptrs) // len(dst_ptrs)
    pages = dst_indices.long()[::page_size] // page_size
    for place, into in enumerate(dst_ptrs):
        for layer in range(layers):
            tokens = src_ptrs[place * layers + layer][src_indices.long()]
            into[pages, layer] = tokens.reshape(-1, page_size, *tokens.shape[1:])


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size
):
    """Copy one layer out of tensors `[pages, layers, page, ...]`."""
    pages = src_indices.long()[::page_size] // page_size
    for each, into in zip(src_ptrs, dst_ptrs, strict=True):
        into[dst_indices.long()] = each[pages, layer_id].reshape(-1, *into.shape[1:])


def _unpinned(host_pool):
    make = host_pool.__init__

    def init(self, *arguments, **options):
        make(self, *arguments, **(options | {"pin_memory": False}))

    host_pool.__init__ = init


def install():
    """Give SGLang the copies and streams that it lacks on a CPU."""
    if torch.cuda.is_available():
        return
    from sglang.srt.mem_cache.pool_host import base, mha

    _unpinned(base.HostKVCache)
    for copy in (
        transfer_kv_direct,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_direct_pf_lf,
    ):
        setattr(mha, copy.__name__, copy)
    if not hasattr(torch.cpu.Stream, "synchronize"):
        torch.cpu.Stream.synchronize = lambda _stream: None
        torch.cpu.Stream.query = lambda _stream: True
