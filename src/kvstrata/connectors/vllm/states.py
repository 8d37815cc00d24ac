"""Models with recurrent states (gated delta nets, Mamba): which states are kept, and where.

A state is all that such a layer keeps of the tokens before it. vLLM computes on it in place. In its
mode `align` it keeps one at some ends of blocks: a request's step ends there, and the next one goes
on in another page. So a group of states has blocks of its own, one at a time:

    tokens            0 ........ B ........ 2B ........ 3B ...
    attention         | block 1  | block 2  | block 3   |
    states, a group                state 2                        of the first 2B tokens

A hit of n blocks needs attention's blocks 1 to n and of each group of states the n-th. A state is
named by its layers and by the key of the block at its end, on which it hangs: it is evicted before
that block and forgotten with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from kvstrata.connectors.vllm.hints import RequestHints, hints_for
from kvstrata.connectors.vllm.metadata import AdapterUse, PageCopy, SaveJob
from kvstrata.core.errors import LayoutError
from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.layout import BlockLayout, GroupedCache, LayerGroup
from kvstrata.runtime.session import Session
from kvstrata.storage.arena import Arena

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.request import Request

__all__ = [
    "Boundary",
    "Saver",
    "StatePages",
    "boundaries",
    "chains",
    "load_states",
    "save_states",
    "state_view",
]

_NULL_PAGE: Final = 0


class Boundary(NamedTuple):
    """An end of a block at which a request has its states."""

    tokens: int
    """How many tokens lie before it."""
    pages: list[int]
    """The engine's page of each group of states, in the order of the groups."""


class Saver(Protocol):
    """What is known of the request whose states are to be saved."""

    request: Request
    name: str
    epoch: int
    hashes: list[SequenceHash]
    hints: RequestHints
    adapter: AdapterUse | None


def chains(cache: GroupedCache, hashes: Sequence[SequenceHash]) -> list[SequenceHash]:
    """Return the keys of all chains of blocks, attention's first; `hashes` are attention's."""
    keys = list(hashes)
    for group in cache.state_groups:
        keys += (_state_key(cache.groups[group], key) for key in hashes)
    return keys


def boundaries(
    cache: GroupedCache,
    block_tokens: int,
    state: KVConnectorBlockState | None,
    request: str,
    step: range,
) -> Iterator[Boundary]:
    """Return where a request's states are whole once `step`, its tokens in this step, is computed.

    vLLM says so of pages. It is believed at both ends of the step only: what the step computes ends
    in its last page, and a step that begins at an end of a block goes on in another page.
    """
    offers = state.boundary_state_offloads.get(request, ()) if state else ()
    for tokens in (step.start, step.stop):
        pages = {group: page for group, page, at in offers if at == tokens and page != _NULL_PAGE}
        if tokens and tokens % block_tokens == 0 and pages.keys() == set(cache.state_groups):
            yield Boundary(tokens, [pages[group] for group in cache.state_groups])


def load_states(
    cache: GroupedCache, tables: Sequence[Sequence[int]], blocks: range, slots: Sequence[int]
) -> tuple[PageCopy, list[int]]:
    """Return what to copy into the pages of `blocks`, and the pages that no slot is there for.

    `slots` has attention's from the first block on, then one of each group of states; fewer or more
    are of another hit, of which nothing can be used.
    """
    copy, lost = PageCopy([], [], []), []
    usable = len(slots) == blocks.stop + len(cache.state_groups)
    behind = iter(range(blocks.stop, len(slots)))
    for index, (group, table) in enumerate(zip(cache.groups, tables, strict=True)):
        wanted = blocks[-1:] if group.state_bytes else blocks
        for block in wanted:
            usable = usable and table[block] != _NULL_PAGE
            if usable:
                copy.slots.append(slots[next(behind) if group.state_bytes else block])
                copy.places.append(0)
                copy.pages.append(table[block])
                copy.groups.append(index)
            else:
                lost.append(table[block])
    return copy, lost


def save_states(
    session: Session,
    cache: GroupedCache,
    block_tokens: int,
    saver: Saver,
    tenant: str,
    output: SchedulerOutput,
) -> Iterator[SaveJob]:
    """Reserve slots for the states that a request has at the end of this step; yield their saves.

    Raises DaemonError; what was yielded before is still to be saved.
    """
    request = saver.request
    first, name = request.num_computed_tokens, request.request_id
    step = range(first, first + output.num_scheduled_tokens[name])
    for at in boundaries(cache, block_tokens, output.kv_connector_block_state, name, step):
        block = at.tokens // block_tokens
        if session.welcome is None or saver.epoch != session.epoch or len(saver.hashes) < block:
            return
        parent = saver.hashes[block - 1]
        keys = [_state_key(cache.groups[group], parent) for group in cache.state_groups]
        asked = hints_for(saver.hints.retention, block_tokens, block - 1, block)
        hints = [replace(hint, count=len(keys)) for hint in asked]
        reserved = session.reserve(saver.name, parent, keys, hints, tenant)
        if reserved.slots:
            slots, kept = list(reserved.slots), list(reserved.indices)
            copy = PageCopy(
                slots=slots,
                places=[0] * len(kept),
                pages=[at.pages[index] for index in kept],
                groups=[cache.state_groups[index] for index in kept],
            )
            yield SaveJob(saver.name, saver.epoch, copy, slots, saver.adapter)


def state_view(group: LayerGroup, name: str, tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return one layer's states as `[pages, state bytes]`, sharing the engine's memory.

    Raises LayoutError unless they are plain bytes, as vLLM hands them to connectors.
    """
    shape, size = (1, 1, group.state_bytes), group.cache.page_bytes
    known = tensor.dtype == torch.int8 and tensor.device.type == "cpu"
    if not known or tuple(tensor.shape[1:]) != shape or tensor.stride()[::3] != (size, 1):
        raise LayoutError(
            f"layer {name!r} has {tensor.dtype} of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}, not states of {group.state_bytes} bytes",
            hint="this engine's KV layout is unknown to kvstrata; run without the connector",
        )
    view: NDArray[np.uint8] = tensor.view(torch.uint8)[:, 0, 0].numpy()
    return view


class StatePages:
    """An engine's pages and states beside the slots that keep them; owned by the worker half."""

    def __init__(
        self,
        cache: GroupedCache,
        layout: BlockLayout,
        pages: Sequence[Sequence[NDArray[np.uint8]]],
        arena: Arena,
    ) -> None:
        """`pages` has for each group its layers, each `[pages, bytes]`."""
        grid, page_bytes = arena.grid, cache.groups[0].cache.page_bytes
        slots: NDArray[np.uint8] = np.ndarray(
            (grid.slots, layout.block_bytes // page_bytes, page_bytes),
            np.uint8,
            arena.region.view,
            grid.base_bytes,
            (grid.stride_bytes, page_bytes, 1),
        )
        self._layers = [
            [(each, slots[:, place]) for place, each in enumerate(layers)] for layers in pages
        ]

    def load(self, copy: PageCopy) -> None:
        """Fill pages from slots."""
        for group, page, slot in zip(copy.groups, copy.pages, copy.slots, strict=True):
            for pages, slots in self._layers[group]:
                pages[page] = slots[slot, : pages.shape[1]]

    def save(self, copy: PageCopy) -> bool:
        """Fill slots from pages; return whether all are filled, which they always are."""
        for group, page, slot in zip(copy.groups, copy.pages, copy.slots, strict=True):
            for pages, slots in self._layers[group]:
                slots[slot, : pages.shape[1]] = pages[page]
                slots[slot, pages.shape[1] :] = 0  # so that a block depends on its state alone
        return True


def _state_key(group: LayerGroup, key: SequenceHash) -> SequenceHash:
    spelled = f"states of layers {group.places} behind ".encode()
    return SequenceHash(blake3(spelled + key).digest(HASH_BYTES))
