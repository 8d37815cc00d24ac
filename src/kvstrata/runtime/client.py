"""The library's way in: keep numpy arrays by token prefix, with no engine at all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from kvstrata.core.config import BLOCK_TOKENS_DEFAULT, NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.retention import HINTS_MAX, Retention
from kvstrata.core.tenants import TENANT_NAME_MAX
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime import messages as wire
from kvstrata.runtime.admin import wait_until_idle
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.storage.arena import Arena
from kvstrata.tokens import Namespace, lineage_digests, sequence_hashes
from kvstrata.tokens.family import Family
from kvstrata.tokens.lineage import TokenIds
from kvstrata.tokens.namespace import NamespaceKey

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["Client"]

_POLL_S: Final = 0.001


class Client:
    """Stores and loads one array a block of tokens.

    A block is the array of `block_tokens` consecutive tokens, of `block_shape` and `dtype`; it is
    found again only behind the same tokens before it, in the same namespace and for the same salt.
    Not thread-safe: one client a thread.
    """

    _arena: Arena
    _key: NamespaceKey

    def __init__(  # noqa: PLR0913  # settings, all by name
        self,
        *,
        block_shape: Sequence[int],
        dtype: DTypeLike,
        block_tokens: int = BLOCK_TOKENS_DEFAULT,
        namespace: str = "default",
        salt: str = "",
        tenant: str = "",
        tiers: str = "host:256MiB",
        address: str | None = None,
        limits: SessionLimits | None = None,
        prefill_tokens_per_s: float = 0.0,
        secret_file: str | None = None,
    ) -> None:
        """Connect to the daemon at `address`, or start a private one with `tiers`.

        `namespace` names what the arrays are (a model and its revision); what is stored under
        one `salt` is not found under another. `tenant` is who is charged for what is stored, and
        the only one who finds it, unless the daemon lets tenants share. With
        `prefill_tokens_per_s`, what would be computed faster is not loaded; 0 loads what is kept.
        `secret_file` has the cluster secret of the private daemon; None keeps one with the blocks.
        Raises ConfigError for a setting that cannot be served, DaemonError if no daemon answers.
        """
        _check(tenant, prefill_tokens_per_s)
        self._prefill_tokens_per_s = float(prefill_tokens_per_s)
        self._dtype = _dtype(dtype)
        shape = tuple(int(size) for size in block_shape)
        self._layout = BlockLayout(
            tuple(Dimension(f"axis{axis}", size) for axis, size in enumerate(shape)),
            self._dtype.name,
            block_tokens,
            writer="array",
        )
        self._shape = shape
        where = address or NodeConfig(parse_tiers(tiers), secret_file)
        self._session = Session(
            where,
            self._layout,
            Namespace(
                model=namespace,
                weights="",
                numerics="",
                kv_dtype=self._dtype.name,
                geometry=self._layout.geometry,
                block_tokens=block_tokens,
            ),
            limits,
        )
        self._salt, self._tenant = salt, tenant
        self._requests = map(str, itertools.count())
        self._session.open()
        self._epoch = 0
        try:
            self._attach()
        except BaseException:
            self._session.close()
            raise

    @property
    def address(self) -> str:
        """The daemon's address, for other clients and for `kvstrata stats`."""
        return self._session.daemon_address

    def lookup(self, tokens: TokenIds) -> int:
        """Return how many leading tokens of `tokens` are kept: what needs no computing."""
        self._attach()
        hashes = self._hashes(tokens)
        request = next(self._requests)
        ready = self._wait_ready(request, hashes)
        self._session.release([request])
        return ready * self._layout.block_tokens

    def why(self, tokens: TokenIds) -> str:
        """Return why the first block of `tokens` that is not kept is not; empty if all are."""
        self._attach()
        hashes = self._hashes(tokens)
        request = next(self._requests)
        self._wait_ready(request, hashes)
        found = self._lookup(request, hashes)
        self._session.release([request])
        family = self._family(tokens)
        if family and not found.ready and found.why.startswith("never stored"):
            return self._session.why(hashes[0], family) or found.why
        return found.why

    def put(
        self, tokens: TokenIds, blocks: ArrayLike, *, retention: Sequence[Retention] = ()
    ) -> int:
        """Store one array for each full block of `tokens`; return how many are new.

        `blocks` has shape `(full blocks, *block_shape)`; ValueError if not. Blocks that are kept
        already are left as they are; where no slot is free the rest is not stored, which a later
        `lookup` shows. Returns once the blocks can be found. `retention` says how long ranges of
        the tokens are to be kept, also where their blocks are kept already; of two ranges that
        name a block the later one counts.
        """
        self._attach()
        hashes = self._hashes(tokens)
        arrays = np.asarray(blocks)
        expected = (len(hashes), *self._shape)
        if arrays.shape != expected or arrays.dtype != self._dtype:
            raise ValueError(
                f"blocks: {arrays.dtype} {arrays.shape} is not {self._dtype} {expected}, "
                f"one array for each of {len(hashes)} full blocks"
            )
        if len(retention) > HINTS_MAX:
            raise ValueError(f"retention: {len(retention)} ranges, at most {HINTS_MAX} in one call")
        request = next(self._requests)
        ranges = [each.hint(self._layout.block_tokens, len(hashes)) for each in retention]
        hints = [hint for hint in ranges if hint is not None]
        reserved = self._session.reserve(
            request, None, hashes, hints, self._tenant, self._family(tokens)
        )
        for index, slot in zip(reserved.indices, reserved.slots, strict=True):
            self._slot_array(slot)[...] = arrays[index]
        self._session.seal(request, reserved.slots)
        if reserved.indices:
            self._wait_ready(request, hashes[: reserved.indices[-1] + 1])
            self._session.release([request])
        return len(reserved.slots)

    def get(self, tokens: TokenIds) -> NDArray[Any]:
        """Return the kept arrays of the longest kept prefix, shape `(blocks, *block_shape)`.

        An empty first axis means that nothing of it is kept.
        """
        self._attach()
        hashes = self._hashes(tokens)
        request = next(self._requests)
        ready = self._wait_ready(request, hashes)
        found = self._session.acquire(request, hashes[:ready])
        generations = self._arena.generations
        result = np.empty((len(found.slots), *self._shape), self._dtype)
        whole = 0
        for slot, generation in zip(found.slots, found.generations, strict=True):
            if generations[slot] != generation:
                break
            result[whole] = self._slot_array(slot)
            if generations[slot] != generation:
                break  # the slot was given to another block while we read it
            whole += 1
        self._session.release([request])
        return result[:whole]

    def lease(self, tokens: TokenIds, seconds: float) -> int:
        """Keep what the host has of `tokens` from eviction for a while; return how many tokens.

        Blocks below the host are read into it first. Fewer are kept where leases have their share
        of the host tier. The same tokens again renew the lease; 0 seconds end it. A lease outlives
        the client, not the daemon, and ends when the host tier is cleared. Raises CallRefusedError
        for a time that is out of range.
        """
        self._attach()
        hashes = self._hashes(tokens)
        if not hashes:
            return 0
        request = next(self._requests)
        ready = self._wait_ready(request, hashes) if seconds else 0
        try:
            kept = self._session.lease(f"lease {hashes[-1].hex()}", hashes[:ready], seconds)
        finally:
            self._session.release([request])
        return kept.blocks * self._layout.block_tokens

    def stats(self) -> dict[str, Any]:
        """Return the daemon's counters and the state of its tiers."""
        self._attach()
        return self._session.call(wire.Stats(), wire.StatsAnswer).stats

    def clear(self, tiers: Sequence[str] = ()) -> int:
        """Forget every block of every client in `tiers`, or in all; return how many there were."""
        self._attach()
        return self._session.call(wire.Clear(list(tiers)), wire.Cleared).blocks

    def forget(self, tokens: TokenIds) -> int:
        """Forget the last full block of `tokens` and all that was stored behind it, in every tier.

        Returns how many copies there were. The blocks before it stay: other prompts begin with them
        too. What other tenants stored stays.
        """
        self._attach()
        hashes = self._hashes(tokens)
        if not hashes:
            return 0
        return self._session.call(wire.Forget(hashes[-1]), wire.Cleared).blocks

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until what was put is in the lower tiers too; CallTimeoutError after `timeout_s`."""
        self._attach()
        wait_until_idle(self.stats, timeout_s)

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        self._arena.close()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _attach(self) -> None:
        """Map the arena of the session at hand; a new one if the daemon was lost and is back."""
        if not self._session.usable():
            raise DaemonGoneError("the daemon is gone; calls work again once it is back")
        if self._epoch == self._session.epoch:
            return
        welcome = self._session.welcome
        assert welcome is not None, "a usable session has been welcomed"
        if self._epoch:
            self._arena.close()
        self._key = welcome.namespace_key(self._salt, self._tenant)
        self._arena = Arena.attach(welcome.arena, self._layout)
        self._epoch = self._session.epoch

    def _hashes(self, tokens: TokenIds) -> list[SequenceHash]:
        digests = lineage_digests(tokens, self._layout.block_tokens)
        return sequence_hashes(self._key, digests)

    def _family(self, tokens: TokenIds) -> Family | None:
        """Return the family of a prompt, None if it has no full block."""
        welcome, size = self._session.welcome, self._layout.block_tokens
        first = lineage_digests(tokens[:size], size)
        if welcome is None or not first:
            return None
        return welcome.family(first[0], self._salt, self._tenant)

    def _wait_ready(self, request: str, hashes: Sequence[SequenceHash]) -> int:
        """Return how many leading blocks are in the host; the daemon bounds the waiting."""
        while (found := self._lookup(request, hashes)).pending:
            time.sleep(_POLL_S)
        return found.ready

    def _lookup(self, request: str, hashes: Sequence[SequenceHash]) -> wire.Found:
        speed = self._prefill_tokens_per_s
        return self._session.lookup(request, hashes, prefill_tokens_per_s=speed)

    def _slot_array(self, slot: int) -> NDArray[Any]:
        return np.frombuffer(self._arena.slot(slot), self._dtype).reshape(self._shape)


def _check(tenant: str, prefill_tokens_per_s: float) -> None:
    """Raise ConfigError for a name or a speed that no daemon would take."""
    if len(tenant) > TENANT_NAME_MAX:
        raise ConfigError(
            f"tenant: a name of {len(tenant)} characters", hint=f"at most {TENANT_NAME_MAX}"
        )
    if not 0.0 <= prefill_tokens_per_s <= wire.SPEED_MAX:
        raise ConfigError(
            f"prefill_tokens_per_s: {prefill_tokens_per_s} is not a speed",
            hint="give the prompt tokens that are computed per second, or 0 if not known",
        )


def _dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise ConfigError(
            f"dtype: numpy does not know {dtype!r}",
            hint="use a type of numpy, or one registered with it such as ml_dtypes.bfloat16",
        ) from error
