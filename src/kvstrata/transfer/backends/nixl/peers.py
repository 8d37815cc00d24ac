"""Which other agents may be reached, and in what state each is. Called under the agent's lock.

    connect -> usable -> stalled (a request is overdue) -> usable again when it ended
                      -> lost (an error on its connection): connect anew
    disconnect -> retiring -> forgotten when its last request has ended

A peer is never removed while a request to it is alive: NIXL would then report the request as not
found, which looks like an end, while its bytes go on arriving (docs/adr/0007-nixl.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

from kvstrata.core.errors import TransferError
from kvstrata.transfer.backends.nixl.binding import nixl_errors
from kvstrata.transfer.backends.nixl.invitation import Invitation

__all__ = ["Peer", "Peers"]

log = logging.getLogger("kvstrata.nixl")

_PEERS_MAX: Final = 1024


@dataclass(slots=True)
class Peer:
    """One other agent."""

    invitation: Invitation
    """What it sent."""
    live: int = 0
    """Requests to it that have not ended."""
    overdue: int = 0
    """Those of them that are past their deadline."""
    lost: bool = False
    """Whether its connection failed."""
    retiring: bool = False
    """Whether it is to be forgotten when `live` is 0."""


class Peers:
    """The table of peers of one agent."""

    def __init__(self, binding: Any, raw: Any, own_name: str) -> None:
        """Keep peers of the agent `raw`, whose name is `own_name`."""
        self._errors, self._raw, self._own_name = nixl_errors(binding), raw, own_name
        self._peers: dict[str, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, name: str) -> Peer | None:
        """Return a peer in whatever state."""
        return self._peers.get(name)

    def connect(self, invitation: Invitation) -> None:
        """Make a peer usable; again with what is already known changes nothing.

        Raises TransferError if it is ourselves, if NIXL refuses it, if requests to a former
        connection of it are still alive (try again), or if there are too many.
        """
        name = invitation.name
        if name == self._own_name:
            raise TransferError("an agent cannot invite itself", retryable=False)
        known = self._peers.get(name)
        if known is not None:
            if not known.lost and known.invitation == invitation:
                known.retiring = False
                return
            if known.live:
                raise TransferError(
                    f"{known.live} requests to a former connection of {name} have not ended",
                    retryable=True,
                )
            self._remove(name)
        if len(self._peers) >= _PEERS_MAX:
            raise TransferError(f"{_PEERS_MAX} peers are connected", retryable=True)
        try:
            loaded = self._raw.loadRemoteMD(invitation.metadata)
        except self._errors as error:
            raise TransferError(
                f"NIXL refuses the metadata of {name}: {error} (hint: both sides need the same "
                "NIXL release)",
                retryable=False,
            ) from error
        told = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        self._peers[told] = Peer(invitation)
        if told != name:
            self._remove(told)
            raise TransferError(f"{name} sent the metadata of {told}", retryable=False)

    def disconnect(self, name: str) -> None:
        """Forget a peer, now or when its last request has ended; unknown ones are no error."""
        peer = self._peers.get(name)
        if peer is not None:
            peer.retiring = True
            self.settle(name)

    def demand(self, name: str) -> Peer:
        """Return a peer that may be given work; raises TransferError that says why it may not."""
        peer = self._peers.get(name)
        if peer is None or peer.retiring:
            raise TransferError(f"peer {name} is not connected", retryable=False)
        if peer.lost:
            raise TransferError(f"peer {name} is lost; connect to its new life", retryable=True)
        if peer.overdue:
            raise TransferError(
                f"peer {name} is stalled: {peer.overdue} requests are overdue", retryable=True
            )
        return peer

    def settle(self, name: str) -> None:
        """Forget the peer if it is retiring and nothing to it is alive."""
        peer = self._peers.get(name)
        if peer is not None and peer.retiring and not peer.live:
            self._remove(name)

    def clear(self) -> None:
        """Forget every peer without live requests."""
        for name in [each for each, peer in self._peers.items() if not peer.live]:
            self._remove(name)

    def forget_agent(self) -> None:
        """Drop the reference to the agent; there are no peers any more."""
        self._raw = None

    def _remove(self, name: str) -> None:
        del self._peers[name]
        try:
            self._raw.invalidateRemoteMD(name)
        except self._errors as error:  # it is gone either way; nothing of it is used again
            log.warning("NIXL kept something of peer %s: %s", name, error)
