"""The tensor-parallel ranks of one engine, which load together or not at all.

Each rank has its shard of a page, a linker and a daemon of its own. SGLang takes the pages that
every rank finds, but a load's answer it takes from each rank for itself: ranks that answered
differently would compute different tokens of one batch. So they vote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvstrata.core.errors import LayoutError
from kvstrata.layout import Shard

__all__ = ["Ranks", "ranks_of"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank's view of all of them."""

    rank: int = 0
    """Which one this is."""
    size: int = 1
    """How many there are."""
    group: Any = None
    """SGLang's group of them on the CPU, None for a single one."""

    @property
    def shard(self) -> Shard:
        """The part of each page that this rank holds."""
        return Shard(self.rank, self.size, 0, 1)

    def all_can(self, own: int) -> bool:
        """Return whether `own` is true (1) on every rank.

        For SGLang's scheduler thread, in which every rank makes the same calls in the same order;
        it waits for the slowest rank, as SGLang's own votes do.
        """
        if self.size == 1:
            return bool(own)
        word = torch.tensor([int(own)], dtype=torch.int)
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(word.item())


def ranks_of(arguments: Any, params: Any) -> Ranks:
    """Return the engine's ranks; raises LayoutError if SGLang's group is not all of them.

    `arguments` are the server's, `params` what SGLang builds its tree from.
    """
    size = int(getattr(arguments, "tp_size", 1) or 1)
    if size == 1:
        return Ranks()
    # The one over which SGLang's linker takes the least of what is found (`attn_cp_size` is 1).
    group: Any = getattr(params, "attn_tp_cache_group", None)
    found = 0 if group is None else int(group.size())
    if found != size:
        raise LayoutError(
            f"tp_size is {size}, and {found} ranks of attention vote on what is loaded",
            hint="use the HiCache storage backend, or run without kvstrata",
        )
    return Ranks(int(group.rank()), size, group)
