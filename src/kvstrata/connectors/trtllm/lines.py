"""The scheduler half's line to the daemon: leases, keys, and when it may be used.

    up ---(a call failed)---> lost ---(no lease left, retry time)---> up, in a new epoch

A session that comes up anew ends what the one before has held. So a lost session stays lost until
everything that was offered under it is copied, called off or ended: its slots do not change until
then, even if the daemon was killed, for they are mapped here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.connectors.trtllm.desk import Desk, MappedArena
from kvstrata.connectors.trtllm.requests import Tracked
from kvstrata.core.errors import CallRefusedError, DaemonError, KvstrataError
from kvstrata.core.ids import SequenceHash
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.tokens import NamespaceKey, sequence_hashes

__all__ = ["Line"]

log = logging.getLogger("kvstrata.trtllm")

_SALTS_MAX = 4096


class Line:
    """Owner: the executor's thread."""

    def __init__(self, session: Session, desk: Desk, page_bytes: int, tenant: str) -> None:
        """Speak over an opened session, in the name of `tenant`, for pages of `page_bytes`."""
        self._session = session
        self._desk = desk
        self._page_bytes = page_bytes
        self._tenant = tenant
        self._leases: set[str] = set()
        self._keys: dict[str, NamespaceKey] = {}
        self._keys_epoch = 0
        self._mapped_epoch = 0

    @property
    def up(self) -> bool:
        """Whether the session is up, as far as we know."""
        return self._session.welcome is not None

    @property
    def epoch(self) -> int:
        """The session's epoch."""
        return self._session.epoch

    @property
    def block_tokens(self) -> int:
        """Tokens in one block."""
        return self._session.layout.block_tokens

    def ready(self) -> bool:
        """Return whether the daemon can be asked now; never waits."""
        if self._session.welcome is None and self._leases:
            return False
        if not self._session.usable():
            return False
        if self._mapped_epoch != self._session.epoch:
            try:
                self.attach()
            except KvstrataError as error:
                log.warning("kvstrata cannot map the daemon's arena: %s", error)
                self._session.lost(DaemonError(str(error)))
                return False
        return True

    def attach(self) -> None:
        """Map the arena of the session's epoch; raises DaemonGoneError or ConfigError."""
        welcome = self._session.welcome
        assert welcome is not None, "an arena belongs to a session"
        mapped = MappedArena.attach(welcome.arena, self._session.layout, self._page_bytes)
        self._desk.map(self._session.epoch, mapped)
        self._mapped_epoch = self._session.epoch

    def note(self, error: DaemonError) -> None:
        """A lost session has said so itself; a refusal means that we misunderstood something."""
        if isinstance(error, CallRefusedError):
            log.warning("kvstrata daemon refused a call: %s", error)

    # -- keys ----------------------------------------------------------------------------------

    def hashes(self, tracked: Tracked, blocks: int) -> list[SequenceHash]:
        """Return the keys of the first blocks in the session's epoch.

        Raises ValueError for ids that are no tokens, DaemonError if the session is down.
        """
        if tracked.epoch != self._session.epoch:
            tracked.epoch, tracked.hashes, tracked.saved_blocks = self._session.epoch, [], 0
        tracked.extend(blocks, self._session.layout.block_tokens)
        known = len(tracked.hashes)
        if known < blocks:
            key = self._key(tracked.identity.salt)
            tracked.hashes += sequence_hashes(key, tracked.digests[known:blocks])
        return tracked.hashes[:blocks]

    def _key(self, salt: str) -> NamespaceKey:
        welcome = self._session.welcome
        if welcome is None:
            raise CallRefusedError("the session is down")
        if self._keys_epoch != self._session.epoch or len(self._keys) > _SALTS_MAX:
            self._keys.clear()  # another daemon may have another secret; salts may be many
            self._keys_epoch = self._session.epoch
        if salt not in self._keys:
            self._keys[salt] = welcome.namespace_key(salt, self._tenant)
        return self._keys[salt]

    # -- calls; each raises DaemonError unless it says otherwise -------------------------------

    def lookup(
        self,
        tracked: Tracked,
        hashes: Sequence[SequenceHash],
        prefill_tokens_per_s: float,
        copy_bytes_per_s: float,
    ) -> wire.Found:
        """Ask how much of a prefix is ready, and hold it."""
        self._leases.add(tracked.name)
        return self._session.lookup(
            tracked.name,
            hashes,
            prefill_tokens_per_s=prefill_tokens_per_s,
            copy_bytes_per_s=copy_bytes_per_s,
        )

    def acquire(
        self, tracked: Tracked, hashes: Sequence[SequenceHash]
    ) -> tuple[list[int], list[int]]:
        """Return slots and generations of the leading blocks that are held and as promised."""
        acquired = self._session.acquire(tracked.name, hashes)
        mapped = self._desk.mapped(self._session.epoch)
        if mapped is None:
            return [], []
        generations = mapped.arena.generations
        good = 0
        for slot, promised in zip(acquired.slots, acquired.generations, strict=True):
            if generations[slot] != promised:
                break
            good += 1
        return acquired.slots[:good], acquired.generations[:good]

    def reserve(
        self, tracked: Tracked, first: int, hashes: Sequence[SequenceHash]
    ) -> wire.Reserved:
        """Ask for slots for the blocks from `first` on."""
        welcome = self._session.welcome
        family = None
        if welcome is not None and first == 0:
            family = welcome.family(tracked.digests[0], tracked.identity.salt, self._tenant)
        parent = hashes[first - 1] if first else None
        return self._session.reserve(tracked.name, parent, hashes[first:], (), self._tenant, family)

    def release(self, tracked: Tracked) -> None:
        """End what the request holds; a daemon that does not hear it has ended it already."""
        if tracked.name not in self._leases:
            return
        self._leases.discard(tracked.name)
        if tracked.epoch == self._session.epoch:
            self._tell(wire.Release([tracked.name]))

    def hand_over(self, name: str, epoch: int, slots: list[int], *, good: bool) -> None:
        """Seal filled slots, or give them back."""
        if epoch == self._session.epoch:
            self._tell(wire.Seal(name, slots) if good else wire.Abort(name, slots))

    def _tell(self, call: wire.Call) -> None:
        if self._session.welcome is None:
            return
        try:
            self._session.call(call, wire.Done)
        except DaemonError as error:
            self.note(error)
