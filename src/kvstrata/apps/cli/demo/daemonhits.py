"""Where hits came from, asked of the daemon: for engines that do not tell it by tier themselves."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kvstrata.apps.cli.demo.engines import BLOCK_TOKENS
from kvstrata.runtime.admin import AdminClient

__all__ = ["DaemonHits"]


class DaemonHits:
    """Counts the hits by tier of one daemon, which nobody else uses meanwhile.

    with DaemonHits(address) as hits:
        ...  # one request
    hits.tokens_from
    """

    def __init__(self, address: str | None) -> None:
        """Count at `address`; with None there is no daemon, and there are no hits."""
        self._address = address
        self._before: dict[str, int] = {}
        self.tokens_from: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._before = self._blocks()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.tokens_from = {
            tier: (blocks - self._before.get(tier, 0)) * BLOCK_TOKENS
            for tier, blocks in self._blocks().items()
        }

    def _blocks(self) -> dict[str, int]:
        if self._address is None:
            return {}
        with AdminClient(self._address) as admin:
            node = admin.stats()["node"]
        return {tier: counts["hit_blocks"] for tier, counts in node["tiers"].items()}
