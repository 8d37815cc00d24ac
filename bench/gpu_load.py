"""Parts `interference` and `ttft` of `gpu.py`: copies beside a model's own work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_copies import GEOMETRIES, POISON, TINY, Case, Geometry
from gpu_machine import DIRECTIONS, Machine

BLOCK_TOKENS = 16
ROUNDS = 3


def measure_interference(machine: Machine, report: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Return how much slower a stream of products is while copies go both ways, for each mover."""
    side, products = (64, 2) if machine.dry else (8192, 500)
    dtype = torch.float32 if machine.dry else torch.bfloat16
    left, right = (torch.randn(side, side, device=machine.device, dtype=dtype) for _ in range(2))
    answer = torch.empty_like(left)
    case = Case(
        machine, TINY[0] if machine.dry else GEOMETRIES[0], "nhd", 6 if machine.dry else 256
    )
    # Two caches: a copy out must not read what a copy in is writing.
    other = Case(machine, TINY[0] if machine.dry else GEOMETRIES[0], "nhd", case.blocks)
    tables = {"to_host": case.tables("to_host"), "to_device": other.tables("to_device")}
    idle = machine.streams.stream_create()  # copies must not wait for the products
    found: dict[str, Any] = {"product_side": side, "products": products}

    def go(copiers: dict[str, Any]) -> tuple[float, int]:
        """Return seconds of the products, and how many copies ended meanwhile."""
        machine.sync()
        ended, flying = 0, dict.fromkeys(DIRECTIONS, 0)
        finished, seconds = _products(machine, partial(torch.mm, left, right, out=answer), products)
        while True:
            for direction, copier in copiers.items():
                news = len(copier.poll())
                ended, flying[direction] = ended + news, flying[direction] - news
                if flying[direction] < 2:
                    assert copier.submit(tables[direction], idle).error is None
                    flying[direction] += 1
            if finished():
                break
        machine.sync()
        for copier in copiers.values():
            copier.poll()
        return seconds(), ended

    go({})
    for name in machine.movers:
        copiers = {direction: machine.copier(name) for direction in DIRECTIONS}
        go(copiers)  # warms up
        alone, beside, copied = [], [], []
        for _ in range(ROUNDS):
            alone.append(go({})[0])
            spent, ended = go(copiers)
            beside.append(spent)
            copied.append(ended * case.total_bytes / spent / 1e9)
        found[name] = {
            "alone_s": round(median(alone), 5),
            "beside_copies_s": round(median(beside), 5),
            "slowdown": round(median(beside) / median(alone) - 1, 4),
            "copied_gb_per_s_both_ways": round(median(copied), 2),
        }
        print(f"interference {name}: {found[name]}")
        for copier in copiers.values():
            copier.close()
    return found


def _products(machine: Machine, product: Any, products: int) -> tuple[Any, Any]:
    """Give the engine's stream its products; return whether they ended, and their seconds."""
    began = time.perf_counter()
    if machine.dry:
        for _ in range(products):
            product()
        spent = time.perf_counter() - began
        return (lambda: True), (lambda: spent)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with machine.on_engine():
        first.record()
        for _ in range(products):
            product()
        last.record()
    return last.query, lambda: first.elapsed_time(last) / 1e3


class Model:
    """A Llama of random weights, and its KV as blocks of 16 tokens."""

    def __init__(self, machine: Machine) -> None:
        """Make the weights on the device."""
        import transformers

        sizes: dict[str, Any] = {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        }  # fmt: skip
        if machine.dry:
            sizes = {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
            }  # fmt: skip
        config = transformers.LlamaConfig(
            **sizes, max_position_embeddings=65536, attn_implementation="sdpa", rope_theta=500000.0
        )
        self.machine, self.make_cache = machine, transformers.DynamicCache
        self.dtype = torch.float32 if machine.dry else torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(machine.device):
                torch.manual_seed(0)
                self.model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self.heads, self.channels = config.num_key_value_heads, config.head_dim
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        token_bytes = self.heads * self.channels * self.dtype.itemsize
        self.geometry = Geometry("llama", self.layers, 2, token_bytes, BLOCK_TOKENS)

    def cold(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the logits of the last token, and the cache."""
        cache = self.make_cache()
        made = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return made.logits[0, -1].float(), cache

    def views(self, case: Case) -> torch.Tensor:
        """Return the case's device memory as [layer, K or V, 1, head, token, channel]."""
        tokens = case.blocks * BLOCK_TOKENS
        shape = (self.layers, 2, 1, tokens, self.heads, self.channels)
        return case.cache.view(self.dtype).view(shape).transpose(3, 4)

    def hit(self, ids: torch.Tensor, case: Case, copier: Any) -> torch.Tensor:
        """Return the logits of the last token with all blocks from the host, layer by layer."""
        ticket = copier.submit(case.tables("to_device"), self.machine.engine_stream)
        cache, views = self.make_cache(), self.views(case)
        blank = torch.zeros_like(views[0, 0][..., :1, :])
        for layer in range(self.layers):
            keys, values = views[layer]
            cache.update(blank, blank, layer)  # makes the layer
            cache.layers[layer].keys, cache.layers[layer].values = keys, values
        tail = ids[:, case.blocks * BLOCK_TOKENS :]
        with self._waiting(ticket):
            made = self.model(tail, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return made.logits[0, -1].float()

    @contextmanager
    def _waiting(self, ticket: Any) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self.model.model.layers):

            def wait(*_: Any, at: int = number) -> None:
                ticket.wait_layer(at, self.machine.engine_stream)

            hooks.append(layer.register_forward_pre_hook(wait))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def measure_ttft(machine: Machine, report: dict[str, Any]) -> list[dict[str, Any]]:  # noqa: ARG001
    """Return ms to the first token: all computed, and with all but the last block from the host."""
    model, lines = Model(machine), []
    for tokens in (64,) if machine.dry else (8192, 16384, 32768):
        if machine.late:
            return [*lines, {"cut": "out of time"}]
        with torch.inference_mode(), machine.on_engine():
            lines.append(line := _lengths(model, tokens))
        print(f"ttft {line}")
        machine.free_arenas()
    return lines


def _lengths(model: Model, tokens: int) -> dict[str, Any]:
    machine = model.machine
    luck = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, model.vocabulary, (1, tokens), generator=luck).to(machine.device)
    blocks = tokens // BLOCK_TOKENS - 1  # something must be left to compute
    case = Case(machine, model.geometry, "nhd", blocks, scattered=False)
    expected, computed = model.cold(ids)
    views = model.views(case)
    for layer in range(model.layers):
        held = computed.layers[layer]
        for part, made in enumerate((held.keys, held.values)):
            views[layer, part].copy_(made[..., : blocks * BLOCK_TOKENS, :])
    del computed, held, made
    saver = machine.copier("runs")
    saver.submit(case.tables("to_host"), machine.engine_stream)
    machine.sync()
    saver.poll()
    line: dict[str, Any] = {"tokens": tokens, "loaded_tokens": blocks * BLOCK_TOKENS}
    line["cold_ms"] = _timed(lambda: model.cold(ids)[0])[0]
    for name in machine.movers:
        copier = machine.copier(name)
        case.cache.fill_(POISON)
        machine.sync()
        spent, logits = _timed(partial(model.hit, ids, case, copier), copier.poll)
        line[name] = {
            "hit_ms": spent,
            "cold_by_hit": round(line["cold_ms"] / spent, 2),
            "same_token": bool(logits.argmax() == expected.argmax()),
            "logits_difference_max": round(float((logits - expected).abs().max()), 5),
        }
        machine.sync()
        copier.close()
    saver.close()
    return line


def _timed(call: Any, after: Any = None) -> tuple[float, torch.Tensor]:
    """Return median ms until the token is known on the host, and the first call's logits."""
    taken, first = [], None
    for number in range(ROUNDS + 1):  # the first warms up, and is what is compared
        began = time.perf_counter()
        logits = call()
        int(logits.argmax())
        if number:
            taken.append(1e3 * (time.perf_counter() - began))
        else:
            first = logits
        if after:
            after()
    return round(median(taken), 3), first
