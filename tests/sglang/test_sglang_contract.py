"""The connector's laws, on both of SGLang's seams, by a script in place of its scheduler."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import SharedDaemon

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.testing.contracts.engine_connector import CAPABILITIES, EngineConnectorContract

PAGE_TOKENS = 16
LAYERS, HEADS, CHANNELS, TOKENS = 3, 2, 32, 512
SAVE_S = 10.0


class Script:
    """A block is a page, and a place is that page of the pool; what both seams have in common.

    SGLang tells neither of them of requests that arrive, end or start anew.
    """

    block_tokens = PAGE_TOKENS
    places = 12

    def __init__(self, daemon):
        self._daemon = daemon
        self._tokens, self._places, self._to_load = {}, {}, {}
        self._computed = {}

    def begin(self, name, tokens):
        self._tokens[name] = list(tokens)

    def allocate(self, name, places, external_tokens):
        self._places[name] = list(places)
        if external_tokens:
            self._to_load[name] = external_tokens // PAGE_TOKENS
            self._computed[name] = external_tokens

    def preempt(self, name):
        self._computed.pop(name)
        self._places.pop(name)

    def plan(self, computed):
        loads, self._to_load = self._to_load, {}
        saves = {}
        for name, tokens in computed.items():
            before = self._computed.get(name, 0)
            self._computed[name] = before + tokens
            saves[name] = range(before // PAGE_TOKENS, (before + tokens) // PAGE_TOKENS)
        return loads, {name: pages for name, pages in saves.items() if pages}

    def held_slots(self):
        host = self._daemon.statistics()["tiers"]["host"]
        return host["filling"] + host["staged"] + host["in_use"]

    def fill(self, place, seed):
        import torch

        luck = torch.Generator().manual_seed(seed)
        for page in self._pages(place):
            flat = page.view(torch.uint8)
            flat.copy_(torch.randint(0, 255, flat.shape, generator=luck, dtype=torch.uint8))

    def read(self, place):
        import torch

        return b"".join(
            page.contiguous().view(torch.uint8).numpy().tobytes() for page in self._pages(place)
        )

    def _keys(self, name, first=0):
        """SGLang's own names of a request's pages."""
        from array import array

        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_storage_hash_str

        tokens = self._tokens[name]
        whole = len(tokens) // PAGE_TOKENS * PAGE_TOKENS
        if not whole:
            return []
        key = RadixKey(array("q", tokens[:whole]))
        return get_storage_hash_str(key, None, page_size=PAGE_TOKENS)[first:]


class StorageScript(Script):
    """SGLang's calls of a HiCacheStorage, on one of its own host pools."""

    def __init__(self, daemon, storage, pool):
        super().__init__(daemon)
        self._storage, self._pool = storage, pool

    def matched(self, name, computed_tokens=0):
        keys = self._keys(name, computed_tokens // PAGE_TOKENS)
        return self._storage.batch_exists(keys) * PAGE_TOKENS if keys else 0

    def work(self, plan):
        loads, saves = plan
        for name, count in loads.items():
            numbers = _indices(self._places[name][:count])
            assert all(self._storage.batch_get_v1(self._keys(name)[:count], numbers))
        for name, pages in saves.items():
            numbers = _indices([self._places[name][page] for page in pages])
            keys = self._keys(name)
            before = SimpleNamespace(prefix_keys=keys[: pages[0]], extra_info=None)
            self._storage.batch_set_v1([keys[page] for page in pages], numbers, before)
        return set(loads)

    def report(self, report):
        return report

    def finish(self, name):
        self._to_load.pop(name, None)
        return False

    def reset(self):
        self._storage.clear()

    def _pages(self, place):
        # `[kv, pages, layers, tokens, heads, channels]`
        return [self._pool.kv_buffer[kv, place] for kv in range(2)]


class LinkerScript(Script):
    """SGLang's calls of a UnifiedCacheLinker, on its own device pool."""

    def __init__(self, daemon, linker, pool):
        super().__init__(daemon)
        self._linker, self._pool = linker, pool
        self._saving, self._steps = [], itertools.count()

    def matched(self, name, computed_tokens=0):
        keys = self._keys(name, computed_tokens // PAGE_TOKENS)
        found = self._linker.lookup(name, [self._transfer(keys)]) if keys else []
        assert found == list(range(1, len(found) + 1))
        return len(found) * PAGE_TOKENS

    def allocate(self, name, places, external_tokens):
        super().allocate(name, places, external_tokens)
        if external_tokens:
            count = self._to_load[name]
            numbers = _indices(places[:count])
            assert self._linker.load(name, [self._transfer(self._keys(name)[:count], numbers)])

    def work(self, plan):
        loads, saves = plan
        index = self._linker.start_layer_wise_loading()
        assert (index < 0) == (not loads)
        if loads:
            counter = self._linker.layer_done_counter
            counter.set_consumer(index)
            for layer in range(LAYERS):
                counter.wait_until(layer)
            assert self._linker.finish_layer_wise_loading(index)
        for name, pages in saves.items():
            numbers = _indices([self._places[name][page] for page in pages])
            keys = self._keys(name)
            if self._linker.offload([self._transfer([keys[page] for page in pages], numbers)]):
                self._saving.append(name)
        return set(loads)

    def report(self, report):
        until = time.monotonic() + SAVE_S
        while self._linker.num_completed_offloads() < len(self._saving):
            assert time.monotonic() < until, "a save does not end"
            time.sleep(0.001)
        while self._saving:
            self._saving.pop()
            assert self._linker.pop_completed_offload()
        return report

    def finish(self, name):
        if name in self._to_load and self._linker.cancel_queued_load(name):
            del self._to_load[name]
        return name in self._saving  # SGLang's tree keeps a node until it is saved

    def _transfer(self, keys, indices=None):
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

        return PoolTransfer(name=PoolName.KV, keys=keys, device_indices=indices)

    def _pages(self, place):
        rows = slice(place * PAGE_TOKENS, (place + 1) * PAGE_TOKENS)
        return [each[rows].reshape(-1) for each in (*self._pool.k_buffer, *self._pool.v_buffer)]


class RanksScript:
    """Two ranks with a linker and a daemon each: SGLang loads what both find, and both save."""

    block_tokens = PAGE_TOKENS
    places = Script.places

    def __init__(self, ranks, threads):
        self._ranks, self._threads = ranks, threads  # a thread each: they wait for one another

    def begin(self, name, tokens):
        self._each("begin", name, tokens)

    def matched(self, name, computed_tokens=0):
        return min(self._each("matched", name, computed_tokens))

    def allocate(self, name, places, external_tokens):
        self._each("allocate", name, places, external_tokens)

    def preempt(self, name):
        self._each("preempt", name)

    def plan(self, computed):
        return self._same("plan", computed)

    def work(self, plan):
        return self._same("work", plan)

    def report(self, report):
        return self._same("report", report)

    def finish(self, name):
        return self._same("finish", name)

    def fill(self, place, seed):
        for number, rank in enumerate(self._ranks):
            rank.fill(place, len(self._ranks) * seed + number)

    def read(self, place):
        return b"".join(rank.read(place) for rank in self._ranks)

    def held_slots(self):
        return sum(rank.held_slots() for rank in self._ranks)

    def _each(self, what, *given):
        return list(self._threads.map(lambda rank: getattr(rank, what)(*given), self._ranks))

    def _same(self, what, *given):
        first, second = self._each(what, *given)
        assert first == second
        return first


def _indices(pages):
    """Return the tokens' places in a pool, as SGLang names pages."""
    import torch

    rows = [range(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS) for page in pages]
    return torch.tensor([index for row in rows for index in row], dtype=torch.int64)


def device_pool():
    import torch
    from sglang.srt.mem_cache import memory_pool

    return memory_pool.MHATokenToKVPool(
        size=TOKENS, page_size=PAGE_TOKENS, dtype=torch.float32, head_num=HEADS,
        head_dim=CHANNELS, layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip


@contextmanager
def brief(names):
    """Run daemons that give up what was found and not loaded after two seconds."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    daemons = []
    try:
        for name in names:
            (folder / name).mkdir()
            daemons.append(SharedDaemon(folder / name, limits={"hold_timeout_s": 2.0}))
        yield daemons
    finally:
        for daemon in daemons:
            daemon.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def brief_daemon():
    with brief("0") as (daemon,):
        yield daemon


@pytest.fixture(scope="module")
def brief_pair():
    """A daemon for each rank, in folders that have its number."""
    with brief("01") as daemons:
        yield daemons


@pytest.fixture(scope="module")
def groups():
    """Each rank's side of a group of two, as SGLang has one on the CPU, and a thread for each."""
    from torch.distributed import HashStore, ProcessGroupGloo

    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = threads.map(
            lambda rank: ProcessGroupGloo(store, rank, 2, timedelta(seconds=30)), range(2)
        )
        yield list(made), threads


def settings(address):
    """Time for a busy machine: an engine that gave up in time would show nothing here."""
    return {"address": address, "call_timeout_s": 10.0, "batch_timeout_s": 20.0}


def make_linker(arguments, address, group=None):
    """Return a linker as SGLang makes it, and its pool."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

    from kvstrata.connectors.sglang.linker import KvstrataLinker

    pool = device_pool()
    allocator = PagedTokenToKVPoolAllocator(
        TOKENS, PAGE_TOKENS, pool.dtype, "cpu", pool, need_sort=False
    )
    parameters = SimpleNamespace(
        page_size=PAGE_TOKENS, token_to_kv_pool_allocator=allocator, attn_tp_cache_group=group
    )
    linker = KvstrataLinker(
        arguments,
        parameters,
        components=[SimpleNamespace(name="FULL")],
        extra_config=settings(address),
    )
    return linker, pool


class TestStorage(EngineConnectorContract):
    """SGLang tells a storage of pages only: of no request, of no plan, of no report."""

    capabilities = CAPABILITIES - {"carried_reports", "ends", "planned_saves", "reported_loads"}

    @pytest.fixture
    def engine(self, sglang_arguments, storage_config, brief_daemon):
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        from kvstrata.connectors.sglang.storage import KvstrataStorage

        assert sglang_arguments
        info = device_pool()._mha_buffer_info()
        pool = MHATokenToKVPoolHost(
            info, 2.0, 0, PAGE_TOKENS, "page_first_direct", device_capacity_tokens=TOKENS,
            start_layer=0, end_layer=LAYERS, pin_memory=False,
        )  # fmt: skip
        storage = KvstrataStorage(storage_config(settings(brief_daemon.address)), {})
        storage.register_mem_pool_host(pool)
        yield StorageScript(brief_daemon, storage, pool)
        storage.close()


class TestLinker(EngineConnectorContract):
    """The linker's loads have names, and its saves are reported; it hears of no end, no reset."""

    capabilities = CAPABILITIES - {
        "carried_reports", "ends", "planned_saves", "reported_loads", "resets",
    }  # fmt: skip

    @pytest.fixture
    def engine(self, sglang_arguments, brief_daemon):
        linker, pool = make_linker(sglang_arguments, brief_daemon.address)
        yield LinkerScript(brief_daemon, linker, pool)
        linker.close()


class TestLinkerRanks(EngineConnectorContract):
    """Two ranks that must do the same, each with its half of every block."""

    capabilities = CAPABILITIES - {
        "carried_reports", "ends", "planned_saves", "reported_loads", "resets",
    }  # fmt: skip

    @pytest.fixture
    def engine(self, sglang_arguments, brief_pair, groups):
        arguments = SimpleNamespace(**vars(sglang_arguments), tp_size=2)
        address = f"ipc://{brief_pair[0].folder.parent}/{{tp_rank}}/node.sock"
        sides, threads = groups
        made = [make_linker(arguments, address, side) for side in sides]
        ranks = [
            LinkerScript(daemon, linker, pool)
            for daemon, (linker, pool) in zip(brief_pair, made, strict=True)
        ]
        yield RanksScript(ranks, threads)
        for linker, _ in made:
            linker.close()


@pytest.mark.parametrize("words", list(itertools.product((False, True), repeat=2)))
def test_a_vote_is_true_if_every_rank_says_so(groups, words):
    from kvstrata.connectors.sglang.ranks import Ranks

    sides, threads = groups
    ranks = [Ranks(side.rank(), side.size(), side) for side in sides]
    answers = threads.map(lambda rank, word: rank.all_can(word), ranks, words)
    assert list(answers) == [all(words)] * 2


@pytest.mark.parametrize("found", [None, 3])
def test_ranks_that_cannot_all_vote_are_refused(sglang_arguments, found):
    arguments = SimpleNamespace(**vars(sglang_arguments), tp_size=2)
    group = found and SimpleNamespace(size=lambda: found)
    with pytest.raises(LayoutError, match=f"tp_size is 2, and {found or 0} ranks of attention"):
        make_linker(arguments, "", group)


def test_ranks_with_one_daemon_are_refused(sglang_arguments, groups, brief_daemon):
    arguments = SimpleNamespace(**vars(sglang_arguments), tp_size=2)
    with pytest.raises(ConfigError, match="cannot share one daemon"):
        make_linker(arguments, brief_daemon.address, groups[0][0])


@pytest.mark.parametrize("name", ["pp_size", "dp_size", "attn_cp_size", "dcp_size"])
def test_ranks_whose_linkers_sglang_does_not_ask_are_refused(sglang_arguments, name):
    arguments = SimpleNamespace(**vars(sglang_arguments), tp_size=2, **{name: 2})
    with pytest.raises(LayoutError, match=f"does not serve an engine with {{'{name}': 2}}"):
        make_linker(arguments, "")
