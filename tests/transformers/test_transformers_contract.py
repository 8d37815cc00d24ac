"""The connector's laws, on transformers' cache, by a script in place of `generate`.

There is no scheduler: `begin` asks and loads at once, `keep` stores. The script's places are memory
of its own, out of which it plays what a model computes.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import pytest
from kit import SharedDaemon

from kvstrata.testing.contracts.engine_connector import CAPABILITIES, EngineConnectorContract

pytestmark = pytest.mark.transformers

BLOCK = 16


class Script:
    """A request is a copy of one cache: they share the session, as threads of one program would."""

    block_tokens = BLOCK
    places = 12

    def __init__(self, daemon, cache):
        import torch

        layout = cache.binding.prefixes.session.layout
        sizes = {each.name: each.size for each in layout.dimensions}
        self._daemon, self._cache = daemon, cache
        self._memory = torch.zeros(
            self.places, sizes["layer"], 2, sizes["head"], BLOCK, sizes["channel"]
        )
        self._tokens, self._places, self._begun = {}, {}, {}
        self._to_load, self._parts = {}, {}

    def begin(self, name, tokens):
        self._tokens[name] = list(tokens)

    def matched(self, name, computed_tokens=0):
        self._begun[name] = copy.deepcopy(self._cache).begin(self._tokens[name])
        return max(0, self._begun[name].get_seq_length() - computed_tokens)

    def allocate(self, name, places, external_tokens):
        self._places[name] = list(places)
        if external_tokens:
            self._to_load[name] = self._begun[name]

    def plan(self, computed):
        loads, self._to_load = self._to_load, {}
        return loads, dict(computed)

    def work(self, plan):
        loads, computed = plan
        for name, cache in loads.items():
            for layer, each in enumerate(cache.layers):
                for kv, tensor in enumerate((each.keys, each.values)):
                    for block in range(cache.get_seq_length() // BLOCK):
                        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
                        self._memory[self._places[name][block], layer, kv] = tensor[0, :, tokens]
        for name, tokens in computed.items():
            self._compute(name, tokens)
        return set(loads)

    def report(self, report):
        return report

    def finish(self, name):
        for each in (self._begun, self._parts, self._to_load):
            each.pop(name, None)
        return False

    def fill(self, place, seed):
        import torch

        luck = torch.Generator().manual_seed(seed)
        self._memory[place] = torch.rand(self._memory[place].shape, generator=luck)

    def read(self, place):
        return self._memory[place].numpy().tobytes()

    def held_slots(self):
        host = self._daemon.statistics()["tiers"]["host"]
        return host["filling"] + host["staged"] + host["in_use"]

    def _compute(self, name, tokens):
        """Once all of a prompt is there, give the cache what the model made of each part of it."""
        import torch

        cache, own = self._begun.get(name), self._tokens[name]
        if cache is None:
            return  # ended meanwhile
        parts = self._parts.setdefault(name, [])
        parts.append(tokens)
        if cache.get_seq_length() + sum(parts) < len(own):
            return
        held = torch.cat([self._memory[place] for place in self._places[name]], dim=-2)
        for count in parts:
            span = slice(cache.get_seq_length(), cache.get_seq_length() + count)
            cache.note_forward({"input_ids": torch.tensor([own[span]])})
            for layer in range(len(cache.layers)):
                keys, values = held[layer, :, :, span].clone()
                cache.update(keys[None], values[None], layer)
        cache.keep()


@pytest.fixture(scope="module")
def script(llama):
    from kvstrata.connectors.transformers import KvstrataCache

    folder = Path(tempfile.mkdtemp(prefix="kv"))  # a socket's path must be short
    daemon = SharedDaemon(folder)
    cache = KvstrataCache.for_model(llama, address=daemon.address, block_tokens=BLOCK)
    yield Script(daemon, cache)
    cache.close()
    daemon.close()
    shutil.rmtree(folder, ignore_errors=True)


class TestTransformers(EngineConnectorContract):
    """`begin` loads and `keep` stores, each at once: no plan, no report, and nothing to decline."""

    capabilities = CAPABILITIES - {
        "carried_reports", "declines", "planned_loads", "planned_saves", "preempts",
        "reported_loads", "resets",
    }  # fmt: skip

    @pytest.fixture
    def engine(self, script):
        return script
