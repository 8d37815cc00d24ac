"""A small engine that calls a KV cache connector as TensorRT-LLM does, over a real model's KV.

Written from the published interface and its documentation, with no code of theirs. One step is

    ask (once for each allocation), allocate, update_state_after_alloc
    build the scheduler output; requests with a load beside the steps are put aside
    build_connector_meta, bind, start_load_kv
    for each layer: wait_for_layer_load, compute, save_kv_layer;  then the forward-pass callable
    wait_for_save; sample; request_finished; get_finished

and before each forward pass the engine compares what its pages hold with the KV that the model
itself makes of the same tokens, so a wrong page is seen at once, not only in an answer. Pages that
are given back are overwritten with noise before anybody else has them.
"""

from __future__ import annotations

import pickle
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, CHANNELS, VOCABULARY = 2, 2, 4, 60
TYPE = torch.float64  # so that a prefill in pieces and in one are the same to 1e-9


class World:
    """The models, one without an adapter and one for each adapter, and what they say."""

    def __init__(self) -> None:
        self._models: dict[Any, Any] = {}
        self._kv: dict[Any, torch.Tensor] = {}
        self._next: dict[Any, int] = {}

    def model(self, adapter: Any = None) -> Any:
        if adapter not in self._models:
            torch.set_num_threads(1)
            torch.manual_seed(7 if adapter is None else 100 + hash(adapter) % 1000)
            config = LlamaConfig(
                hidden_size=HEADS * 2 * CHANNELS, intermediate_size=24, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS * 2, num_key_value_heads=HEADS, head_dim=CHANNELS,
                vocab_size=VOCABULARY, max_position_embeddings=512, initializer_range=0.5,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )  # fmt: skip
            self._models[adapter] = LlamaForCausalLM(config).to(TYPE).eval()
        return self._models[adapter]

    def kv(self, tokens: list[int], adapter: Any = None) -> torch.Tensor:
        """What the model makes of `tokens`, in one go: `[layers, 2, heads, tokens, channels]`."""
        self._compute(tokens, adapter)
        return self._kv[adapter, tuple(tokens)]

    def answer(self, prompt: list[int], count: int, adapter: Any = None) -> list[int]:
        """What it says greedily, each token computed from the first on."""
        tokens = list(prompt)
        for _ in range(count):
            self._compute(tokens, adapter)
            tokens.append(self._next[adapter, tuple(tokens)])
        return tokens[len(prompt) :]

    def _compute(self, tokens: list[int], adapter: Any) -> None:
        key = adapter, tuple(tokens)
        if key in self._kv:
            return
        cache = DynamicCache(config=self.model(adapter).config)
        with torch.no_grad():
            out = self.model(adapter)(torch.tensor([tokens]), past_key_values=cache)
        self._kv[key] = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        )
        self._next[key] = int(out.logits[0, -1].argmax())


# -- what the connector is handed ----------------------------------------------------------------


@dataclass
class RequestData:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)
    attention_dp_rank: int | None = None


class Region:
    def __init__(self, rows: torch.Tensor, buffers: list[tuple[int, str]]) -> None:
        self.rows = rows
        self.base, self.num_slots, self.size = rows.data_ptr(), rows.shape[0], rows.shape[1]
        self.stride = rows.stride(0)
        self.buffers = tuple(
            SimpleNamespace(layer_id=layer, role=role, expansion=1) for layer, role in buffers
        )

    def as_tensor(self) -> torch.Tensor:
        return self.rows


class Request:
    """As much of an LlmRequest as a connector may look at, and the engine's own notes."""

    is_dummy_request = False
    multimodal_hashes = multimodal_positions = multimodal_lengths = None

    def __init__(
        self, number: int, prompt: list[int], count: int, salt: str | None = None,
        adapter: int | None = None,
    ) -> None:  # fmt: skip
        self.request_id = number
        self.cache_salt, self.lora_task_id = salt, adapter
        self.prompt, self.count = list(prompt), count
        self.tokens = list(prompt)
        self.pages: list[list[int]] = []
        self.start_anew()
        self.external = 0  # tokens that the connector has spared us, in all its lives
        self.cancelled = False

    def start_anew(self) -> None:
        self.state = "context"
        self.asked: tuple[int, int, bool] | None = None  # local, external, beside the steps
        self.position = 0
        self.context = len(self.tokens)  # tokens to prefill

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


class Pool:
    """The pages, as one tensor (V1) or as regions of groups of layers (V2)."""

    def __init__(self, pages: int, page_tokens: int, groups: list[list[int]]) -> None:
        self.page_tokens, self.groups = page_tokens, groups
        elements = HEADS * page_tokens * CHANNELS
        # Other groups have other numbers of pages, so that a mix-up is seen.
        self.memory = [
            torch.rand(pages + 3 * n, len(layers), 2, elements, dtype=TYPE)
            for n, layers in enumerate(groups)
        ]

    def cell(self, group: int, page: int, layer: int) -> torch.Tensor:
        """K and V of a layer's page, `[2, heads, tokens, channels]`, writable."""
        assert 0 <= page < self.memory[group].shape[0]
        return self.memory[group][page, layer].view(2, HEADS, self.page_tokens, CHANNELS)

    def layout(self) -> Any:
        groups = []
        for number, layers in enumerate(self.groups):
            memory = self.memory[number]
            rows = memory.view(memory.shape[0], -1).view(torch.uint8)
            half = rows.shape[1] // (2 * len(layers))
            if len(self.groups) == 1:  # all of a page in one run
                names = [(layer, role) for layer in layers for role in ("key", "value")]
                regions = [Region(rows, names)]
            else:  # a run for each buffer, with the others between one page and the next
                regions = [
                    Region(rows[:, n * half : (n + 1) * half], [(layers[n // 2], role)])
                    for n, role in enumerate(("key", "value") * len(layers))
                ]
            groups.append(
                SimpleNamespace(
                    layer_group_id=number, layer_ids=tuple(layers), window_size=None,
                    regions=tuple(regions), replicated_regions=(),
                )
            )  # fmt: skip
        return SimpleNamespace(tokens_per_block=self.page_tokens, groups=tuple(groups))


class Pages:
    """Which pages are free, whose, and which of them hold prefixes that may be used again."""

    def __init__(self, pool: Pool, luck: random.Random) -> None:
        self.pool = pool
        self.free = [list(range(memory.shape[0])) for memory in pool.memory]
        for numbers in self.free:
            luck.shuffle(numbers)
        self.users: dict[tuple[int, ...], int] = {}
        self.known: OrderedDict[Any, tuple[int, ...]] = (
            OrderedDict()
        )  # prefix -> page of each group
        self._noise = torch.Generator().manual_seed(luck.randrange(1 << 30))

    def room(self) -> int:
        idle = sum(not self.users.get(row) for row in self.known.values())
        return len(self.free[0]) + idle

    def take(self) -> tuple[int, ...]:
        if not self.free[0]:
            key = next(key for key, row in self.known.items() if not self.users.get(row))
            self._give(self.known.pop(key))
        row = tuple(numbers.pop() for numbers in self.free)
        self.users[row] = 1
        return row

    def share(self, row: tuple[int, ...]) -> None:
        self.users[row] = self.users.get(row, 0) + 1

    def drop(self, row: tuple[int, ...]) -> None:
        self.users[row] -= 1
        if not self.users[row]:
            del self.users[row]
            if row not in self.known.values():
                self._give(row)

    def _give(self, row: tuple[int, ...]) -> None:
        for group, page in enumerate(row):
            shape = self.pool.memory[group][page].shape
            noise = torch.rand(shape, generator=self._noise, dtype=TYPE)
            self.pool.memory[group][page] = noise
            self.free[group].insert(0, page)


class Engine:
    """One rank, one step at a time."""

    def __init__(  # noqa: PLR0913
        self, world: World, scheduler: type, worker: type, arguments: Any, *, manager: str = "v1",
        groups: int = 1, pages: int = 40, page_tokens: int = 4, step_tokens: int = 1000,
        reuse: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.world, self.manager, self.reuse = world, manager, reuse
        self.page_tokens, self.step_tokens = page_tokens, step_tokens
        layers = list(range(LAYERS))
        self.pool = Pool(pages, page_tokens, [layers] if groups == 1 else [[n] for n in layers])
        self.pages = Pages(self.pool, random.Random(seed))
        self.worker, self.scheduler = worker(arguments), scheduler(arguments)
        if manager == "v1":
            self.worker.register_kv_caches(self.pool.memory[0])
        else:
            self.worker.register_kv_cache_layout(self.pool.layout())
        self.after_forward = self.worker.register_forward_pass_callable()
        self.scheduler.wait_for_initialization()
        self.active: list[Request] = []
        self.saving: dict[int, Request] = {}
        self.told: dict[int, tuple[int, list[int]]] = {}
        self.new_loading: set[int] = set()
        self.new_saving: set[int] = set()
        self.pending_loading: set[int] = set()
        self.pending_saving: set[int] = set()
        self.matched: dict[int, int] = {}  # of this step's build
        self.loaded: set[int] = set()  # has come back from being put aside
        self.repeat = False  # call worker methods again with the metadata of the step before
        self.bad: dict[tuple[int, int], int] = {}  # (request, position) -> what is told instead
        self.honour = 1.0  # V2: share of each offer that is taken
        self.defer: set[int] = set()  # V2: asked, but not scheduled for now

    # -- for tests -----------------------------------------------------------------------------

    def submit(self, request: Request) -> Request:
        self.active.append(request)
        return request

    def run(self, *requests: Request, timeout_s: float = 20.0) -> None:
        for request in requests:
            self.submit(request)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if not self.active and not self.saving:
                return
            if not self.step():
                time.sleep(0.0005)  # all of them wait for a copy
        raise AssertionError(f"no end: {[(r.request_id, r.state) for r in self.active]}")

    def cancel(self, request: Request) -> None:
        """Ends a request at once, whatever it is doing; pages stay while a connector has them."""
        request.cancelled = True
        if request.state == "context" and request.asked and not request.pages:
            self._call_off(request, 0, len(request.tokens))
        if request in self.active:
            self._finish(request)

    def preempt(self, request: Request, *, reset: bool) -> None:
        """V2 takes a request's pages away; it will run again from the start."""
        assert self.manager == "v2"
        if request not in self.active or request.state == "loading" or not request.pages:
            return
        if reset:
            self._drop_pages(request)
            self.scheduler.request_reset(request)
        elif self._tell_finished(request):
            # Its pages stay with the transfer; the request itself goes on with others.
            ghost = Request(request.request_id, request.tokens, 0)
            ghost.pages, ghost.state = request.pages, "saving"
            self.saving[request.request_id] = ghost
            request.pages = []
        else:
            self._drop_pages(request)
        self.told.pop(request.request_id, None)
        request.start_anew()

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()

    # -- one step ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Make one step; return whether anything was computed."""
        batch = [each for each in self.active if self._schedule(each)]
        output = self._build(batch)
        batch = [each for each in batch if each.request_id not in self.new_loading]
        for each in self.active:
            if each.request_id in self.new_loading:
                each.state = "loading"
        if output is not None:
            metadata = self.scheduler.build_connector_meta(output)
            self.worker.bind_connector_meta(pickle.loads(pickle.dumps(metadata)))
        self.worker.start_load_kv(None)
        if self.repeat:
            self.worker.start_load_kv(None)
        if batch:
            self._forward(batch)
            self.worker.wait_for_save(None)
            if self.repeat:
                self.worker.wait_for_save(None)
            self._sample(batch)
        self._collect()
        return bool(batch)

    def _schedule(self, request: Request) -> bool:
        """Ask, and allocate; False if the request is not in this step."""
        if request.state == "loading" or request.request_id in self.saving:
            return False
        if request.state == "generating":
            return self._grow(request, len(request.tokens))
        if request.position == 0 and not request.pages:
            return self._admit(request)
        return self._grow(request, min(request.context, request.position + self.step_tokens))

    def _admit(self, request: Request) -> bool:
        whole = -(-(len(request.tokens) + request.count) // self.page_tokens)
        if self.pages.room() < whole:
            return False
        if request.asked is None:
            local = self._match(request)
            for row in local:
                self.pages.share(row)
            tokens = len(local) * self.page_tokens
            found, aside = self.scheduler.get_num_new_matched_tokens(request, tokens)
            assert found % self.page_tokens == 0
            assert tokens + found < len(request.tokens)
            assert found or not aside
            request.asked = tokens, found, aside
            request.local = local
        if request.request_id in self.defer:
            return False
        tokens, found, aside = request.asked
        if self.manager == "v2" and found and self.honour < 1:
            kept = int(found * self.honour) // self.page_tokens * self.page_tokens
            self._call_off(request, tokens + kept, tokens + found)
            found = kept
        request.pages = [list(each) for each in zip(*request.local, strict=True)]
        request.pages = request.pages or [[] for _ in self.pool.groups]
        request.position = tokens + found
        request.external += found
        limit = request.context
        if self.manager == "v2":
            limit = min(limit, request.position + self.step_tokens)
        assert self._grow(request, limit)
        if aside:
            self.new_loading.add(request.request_id)
        self.matched[request.request_id] = found
        self._tell_pages(self.scheduler.update_state_after_alloc, request)
        return True

    def _match(self, request: Request) -> list[tuple[int, ...]]:
        rows = []
        size = self.page_tokens
        for end in range(size, len(request.tokens), size) if self.reuse else ():
            key = request.cache_salt, request.lora_task_id, tuple(request.tokens[:end])
            if key not in self.pages.known:
                break
            self.pages.known.move_to_end(key)
            rows.append(self.pages.known[key])
        return rows

    def _grow(self, request: Request, tokens: int) -> bool:
        while len(request.pages[0]) * self.page_tokens < tokens:
            if not self.pages.room():
                return False
            for pages, page in zip(request.pages, self.pages.take(), strict=True):
                pages.append(page)
        return True

    def _build(self, batch: list[Request]) -> SchedulerOutput | None:
        if not batch:
            return None
        output = SchedulerOutput()
        for request in batch:
            number = request.request_id
            if number in self.new_loading:
                continue
            new = number not in self.told
            tokens, pages = self.told.get(number, (0, [0] * len(self.pool.groups)))
            told = self._said(request)
            more = [each[known:] for each, known in zip(told, pages, strict=True)]
            computed = request.position if request.state == "context" else len(request.tokens) - 1
            data = RequestData(
                number, request.tokens[tokens:], more[0] if len(more) == 1 else [],
                computed - self.matched.get(number, 0), self._count(request),
                cache_salt=request.cache_salt,
                new_block_ids_by_layer_group=more if self.manager == "v2" else [],
            )  # fmt: skip
            self.told[number] = len(request.tokens), [len(each) for each in told]
            (output.new_requests if new else output.cached_requests).append(data)
        self.matched.clear()
        return output

    def _count(self, request: Request) -> int:
        if request.state == "generating":
            return 1
        return min(request.context - request.position, self.step_tokens)

    def _said(self, request: Request) -> list[list[int]]:
        """The request's pages as the connector is told of them."""
        return [
            [self.bad.get((request.request_id, n), page) for n, page in enumerate(each)]
            for each in request.pages
        ]

    def _forward(self, batch: list[Request]) -> None:
        caches = []
        for request in batch:
            start = request.position if request.state == "context" else len(request.tokens) - 1
            cache = DynamicCache(config=self.world.model(request.lora_task_id).config)
            if start:
                held = self._held(request, start)
                own = self.world.kv(request.tokens[:start], request.lora_task_id)
                assert float((held - own).abs().max()) < 1e-9, (
                    f"request {request.request_id} has KV that is not its own"
                )
                for layer in range(LAYERS):
                    cache.update(held[layer, 0][None], held[layer, 1][None], layer)
            caches.append((request, start, cache))
        for request, start, cache in caches:
            end = start + self._count(request)
            with torch.no_grad():
                out = self.world.model(request.lora_task_id)(
                    torch.tensor([request.tokens[start:end]]), past_key_values=cache
                )
            request.logits = out.logits[0, -1]
        for layer in range(LAYERS):
            self.worker.wait_for_layer_load(layer, None)
            for request, start, cache in caches:
                self._write(request, start, layer, cache.layers[layer])
            self.worker.save_kv_layer(layer, None)
        if self.after_forward:
            self.after_forward()

    def _where(self, layer: int) -> tuple[int, int]:
        group = next(n for n, layers in enumerate(self.pool.groups) if layer in layers)
        return group, self.pool.groups[group].index(layer)

    def _held(self, request: Request, tokens: int) -> torch.Tensor:
        layers = []
        for layer in range(LAYERS):
            group, index = self._where(layer)
            cells = [self.pool.cell(group, page, index) for page in request.pages[group]]
            layers.append(torch.cat(cells, dim=2)[:, :, :tokens].clone())
        return torch.stack(layers)

    def _write(self, request: Request, start: int, layer: int, computed: Any) -> None:
        group, index = self._where(layer)
        for position in range(start, computed.keys.shape[2]):
            page, place = divmod(position, self.page_tokens)
            cell = self.pool.cell(group, request.pages[group][page], index)
            cell[0, :, place] = computed.keys[0, :, position]
            cell[1, :, place] = computed.values[0, :, position]

    def _sample(self, batch: list[Request]) -> None:
        for request in batch:
            if request.state == "context":
                request.position += self._count(request)
                if request.position < request.context:
                    continue
                request.state = "generating"
            if len(request.answer) < request.count:
                request.tokens.append(int(request.logits.argmax()))
            if len(request.answer) >= request.count:
                self._finish(request)

    # -- ends ----------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        self.active.remove(request)
        self._keep_prefix(request)
        self.told.pop(request.request_id, None)
        if request.request_id in self.saving:  # pre-empted, and has not asked again
            request.state = "done"
        elif self._tell_finished(request):
            request.state = "saving"
            self.saving[request.request_id] = request
        else:
            request.state = "done"
            self._drop_pages(request)

    def _tell_finished(self, request: Request) -> bool:
        if self._tell_pages(self.scheduler.request_finished, request):
            self.new_saving.add(request.request_id)
            return True
        return False

    def _tell_pages(self, flat: Any, request: Request) -> Any:
        told = self._said(request) or [[] for _ in self.pool.groups]
        if len(told) == 1:
            return flat(request, told[0])
        return getattr(self.scheduler, f"{flat.__name__}_by_layer_group")(request, told)

    def _call_off(self, request: Request, start: int, end: int) -> None:
        self.scheduler.cancel_load(request, start, end)

    def _keep_prefix(self, request: Request) -> None:
        if request.state != "generating" or not self.reuse:
            return
        size = self.page_tokens
        for number in range((len(request.tokens) - 1) // size):
            tokens = tuple(request.tokens[: (number + 1) * size])
            row = tuple(each[number] for each in request.pages)
            self.pages.known.setdefault((request.cache_salt, request.lora_task_id, tokens), row)

    def _drop_pages(self, request: Request) -> None:
        if not request.pages and request.asked:
            for row in request.local:  # asked, never scheduled
                self.pages.drop(row)
        for row in zip(*request.pages, strict=True):
            self.pages.drop(row)
        request.pages = []

    def _collect(self) -> None:
        finished, started = sorted(self.new_saving), sorted(self.new_loading)
        self.pending_saving |= self.new_saving
        self.pending_loading |= self.new_loading
        self.new_saving, self.new_loading = set(), set()
        saved, loaded = self.worker.get_finished(finished, started)
        assert self.pending_saving.issuperset(saved)
        assert self.pending_loading.issuperset(loaded)
        self.pending_saving.difference_update(saved)
        self.pending_loading.difference_update(loaded)
        for number in saved:
            request = self.saving.pop(number)
            request.state = "done"
            self._drop_pages(request)
        for request in self.active:
            if request.request_id in loaded:
                request.state = "context"
