"""The peer, as a side of the measurement: vLLM's `CPUOffloadingManager` and its block hasher.

Calls are those of vLLM's own offloading scheduler, in its order. What the scheduler does around
them (positions of keys, events, job records) is left out, which favours the peer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sides import BLOCK_TOKENS, Chain, Tokens

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.request import Request

__all__ = ["Peer"]

_HIT = LookupResult.HIT


class Peer:
    """`CPUOffloadingManager`; one new request context for each call."""

    def __init__(self, slots: int, hash_name: str = "sha256", policy: str = "lru") -> None:
        self.manager = CPUOffloadingManager(slots, cache_policy=policy)
        hash_function = get_hash_fn_by_name(hash_name)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, hash_function)

    def fresh(self, chains: Sequence[Chain]) -> list[tuple[list[Any], Any]]:
        """Return (keys, context of a request already announced) for each chain.

        A key of vLLM is a 32-byte hash and 4 bytes of cache group.
        """
        requests = []
        for index, chain in enumerate(chains):
            context = ReqContext(req_id=str(index))
            self.manager.on_new_request(context)
            requests.append(([make_offload_key(key + key, 0) for key in chain], context))
        return requests

    held = fresh

    def prompts(self, prompts: Sequence[Tokens]) -> list[Any]:
        """Return a vLLM request for each prompt, not hashed yet."""
        sampling = SamplingParams(max_tokens=1)
        return [Request("bench", tokens, sampling, None) for tokens in prompts]

    def hash(self, prompts: list[Any]) -> int:
        """Tokens -> block hashes -> offload keys."""
        done = 0
        for request in prompts:
            keys = [make_offload_key(each, 0) for each in self.hasher(request)]
            done += len(keys)
        return done

    def match(self, chains: list[tuple[list[Any], Any]]) -> int:
        """`lookup` key by key until one is not there."""
        lookup, found = self.manager.lookup, 0
        for keys, context in chains:
            for key in keys:
                if lookup(key, context) is not _HIT:
                    break
                found += 1
        return found

    def use(self, held: list[tuple[list[Any], Any]]) -> int:
        """`prepare_load` and `complete_load`."""
        done = 0
        for keys, context in held:
            self.manager.prepare_load(keys, context)
            self.manager.complete_load(keys, context)
            done += len(keys)
        return done

    def touch(self, held: list[tuple[list[Any], Any]]) -> int:
        """`touch`."""
        done = 0
        for keys, context in held:
            self.manager.touch(keys, context)
            done += len(keys)
        return done

    def store(self, chains: list[tuple[list[Any], Any]]) -> int:
        """`prepare_store`, `complete_store`, and the request's end, which sets its recency.

        Ours sets it while it registers.
        """
        done = 0
        for keys, context in chains:
            done += self._store(keys, context)
            self.manager.on_request_finished(context)
        return done

    def serve(self, chains: list[tuple[list[Any], Any]]) -> int:
        """Lookup, load, store the rest, and the end of the request, which updates recency."""
        manager, done = self.manager, 0
        for keys, context in chains:
            known = self.match([(keys, context)])
            if known:
                manager.prepare_load(keys[:known], context)
                manager.complete_load(keys[:known], context)
            done += known + self._store(keys[known:], context)
            manager.on_request_finished(context)
        return done

    def _store(self, keys: list[Any], context: Any) -> int:
        output = self.manager.prepare_store(keys, context)
        assert output is not None, "nothing is held, so there is room"
        self.manager.complete_store(output.keys_to_store, context)
        return len(output.keys_to_store)
