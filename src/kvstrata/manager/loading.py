"""Loading: what requests find, hold and read, and what is staged for them.

A hold begins with a request's first question and ends with its release. It pins what was found, so
that nothing of the answer is evicted before the engine has read it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.decision import Decision, Limit, Run
from kvstrata.manager.explain import Gauges
from kvstrata.manager.groups import Chain, longest
from kvstrata.manager.onboard import Onboarding
from kvstrata.manager.probing import Probing, Unknown
from kvstrata.manager.state import BrainState
from kvstrata.manager.storing import Storing
from kvstrata.pool import Pin

__all__ = ["UNKNOWN", "AcquireAnswer", "EngineSpeed", "Loading", "LookupAnswer"]


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """What is kept of a prefix, in blocks."""

    ready: int
    """Leading blocks that are in the host now, held for this request until it goes on."""
    staged: dict[TierName, int]
    """How many of the blocks that `ready` needs were staged for this request, by their tier."""
    pending: int
    """Blocks behind `ready` that are being staged; ask again before `until`."""
    until: float
    """When staging is given up, on the clock of `now`; 0 if nothing is pending."""
    why: str
    """Why the first block behind `ready` is not ready: empty if there is none."""


@dataclass(frozen=True, slots=True)
class AcquireAnswer:
    """Slots to read."""

    blocks: int
    """Leading blocks that the slots serve."""
    slots: list[SlotId]
    """Host slots, pinned until the request is released: root first, one group after the other,
    of each group only the blocks that it needs (`Chain.needed`)."""
    generations: list[int]
    """Generation of each slot; a reader that sees another one must not use what it read."""
    staged: dict[TierName, int]
    """How many of them were staged for this request, by the tier that they came from."""


class EngineSpeed(NamedTuple):
    """What a client says of its engine; 0 where it does not know."""

    prefill_tokens_per_s: float
    """Prompt tokens that it computes per second."""
    copy_bytes_per_s: float
    """Bytes per second that it copies from the host to its device."""


UNKNOWN: Final = EngineSpeed(0.0, 0.0)
"""An engine that says nothing."""
_Slots: TypeAlias = Sequence[SlotId | None]


@dataclass(slots=True)
class _Hold:
    expires: float
    staging_until: float = 0.0
    acquired: bool = False
    pins: list[Pin] = field(default_factory=list)
    held: set[SlotId] = field(default_factory=set)
    staged: dict[SequenceHash, TierName] = field(default_factory=dict)
    counted: set[SequenceHash] = field(default_factory=set)
    throttled: set[SequenceHash] = field(default_factory=set)
    decision: Decision | None = None  # made once, so that it does not flip while queues move
    cut: int | None = None  # blocks that are worth loading, None for all
    probe: int = 0  # blocks to ask other daemons' tiers for, 0 before the first question
    probed: int = 0  # where the last question began


@dataclass(frozen=True, slots=True)
class _Behind:
    """What a request could have besides what is ready."""

    to_stage: list[SequenceHash]
    coming: bool


class Loading:
    """Requests and what they hold of the host."""

    def __init__(
        self,
        state: BrainState,
        onboarding: Onboarding,
        storing: Storing,
        probing: Probing,
        gauges: Gauges | None,
        block_tokens: int = 0,
    ) -> None:
        """`block_tokens` is how long prompts are for the cost model."""
        self._state, self._onboarding, self._storing = state, onboarding, storing
        self._probing = probing
        self._gauges, self._block_tokens = gauges, block_tokens
        self._holds: dict[Holder, _Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def lookup(
        self, holder: Holder, chains: Sequence[Chain], engine: EngineSpeed = UNKNOWN
    ) -> LookupAnswer:
        """Return how much of the prefix is ready; start to stage what lies below the host."""
        state, limits, now = self._state, self._state.limits, self._state.now
        hold = self._hold_of(holder, chains, engine)
        hold.expires = now + limits.hold_timeout_s
        found = [state.host.scan(chain.hashes) for chain in chains]
        for chain, slots in zip(chains, found, strict=True):
            pairs = zip(chain.hashes, slots, strict=True)
            self._pin(hold, [(key, slot) for key, slot in pairs if slot is not None])
        reach = self._reach(chains, found)
        if hold.decision is None and self._probe(hold, chains, reach):
            ready, until = _ready(chains, found, reach), hold.staging_until
            staged = self._count_staged(hold, _keys(chains, ready))
            return LookupAnswer(ready, staged, 1, until, "pending")
        if state.costs and reach and engine.prefill_tokens_per_s and hold.decision is None:
            self._decide(holder, hold, chains, found, reach)
        if hold.cut is not None and reach > hold.cut:
            reach = self._reach(chains, found, hold.cut)
        ready = _ready(chains, found, reach)
        staged = self._count_staged(hold, _keys(chains, ready))
        behind = self._behind(chains, found, reach, holder)
        late = hold.staging_until and now >= hold.staging_until
        if (behind.to_stage or behind.coming) and not late:
            hold.staging_until = hold.staging_until or now + limits.staging_timeout_s
            if behind.to_stage:
                left = self._onboarding.stage(behind.to_stage, holder, hold.staging_until)
                new = set(left) - hold.throttled  # a repeated lookup counts nothing twice
                state.counters.throttled_stage_blocks += len(new)
                hold.throttled |= new
            if behind.coming or self._onboarding.is_waiting(holder):
                pending, until = max(len(behind.to_stage), 1), hold.staging_until
                return LookupAnswer(ready, staged, pending, until, "pending")
        too_late = bool(late and (behind.to_stage or behind.coming))
        return LookupAnswer(
            ready, staged, 0, 0.0, self._reason(hold, chains, found, ready, too_late)
        )

    def acquire(
        self, holder: Holder, chains: Sequence[Chain]
    ) -> tuple[AcquireAnswer, list[SequenceHash]]:
        """Hold the longest ready prefix for reading; return it and the keys that are new in it."""
        state, host = self._state, self._state.host
        hold = self._holds.setdefault(holder, _Hold(expires=state.now))
        hold.acquired = True
        if len(chains) == 1 and not chains[0].window:
            slots = host.match(chains[0].hashes)
            keys = list(chains[0].hashes[: len(slots)])
            blocks = len(slots)
        else:
            found = [host.scan(chain.hashes) for chain in chains]
            blocks = _ready(chains, found, len(chains[0].hashes))
            keys = _keys(chains, blocks)
            slots = [slot for slot in host.scan(keys) if slot is not None]
        self._pin(hold, list(zip(keys, slots, strict=True)))
        counted = [key for key in keys if key not in hold.counted]
        for name, count in self._count_staged(hold, counted).items():
            state.tier(name).hit_blocks += count
            state.counters.hit_blocks_staged += count
            state.counters.hit_blocks_host -= count
        state.counters.hit_blocks_host += len(counted)
        hold.counted.update(counted)
        generations = [host.generations[slot] for slot in slots]
        return AcquireAnswer(blocks, slots, generations, self._count_staged(hold, keys)), counted

    def release(self, holder: Holder) -> None:
        """End whatever `holder` holds for reading; harmless if that is nothing."""
        hold = self._holds.pop(holder, None)
        if hold:
            for pin in reversed(hold.pins):  # deepest first: a chain ages from its end
                pin.release()

    def release_all(self, session: SessionId) -> None:
        """End whatever requests of `session` hold."""
        for holder in [each for each in self._holds if each.session == session]:
            self.release(holder)

    def expire(self) -> None:
        """End the holds of requests that looked and never came back."""
        now = self._state.now
        for holder in [
            each for each, hold in self._holds.items() if not hold.acquired and now >= hold.expires
        ]:
            self._state.counters.expired_holds += 1
            self.release(holder)

    def hand_over(
        self, hashes: Sequence[SequenceHash], tier: TierName, waiters: Collection[Holder]
    ) -> None:
        """Hold blocks that arrived from `tier` for those who waited for them."""
        found = self._state.host.scan(hashes)
        pairs = [(key, slot) for key, slot in zip(hashes, found, strict=True) if slot is not None]
        for holder in waiters:
            hold = self._holds.get(holder)
            if hold:
                self._pin(hold, pairs)
                hold.staged.update((key, tier) for key, _ in pairs)

    # -- private -------------------------------------------------------------------------------

    def _hold_of(self, holder: Holder, chains: Sequence[Chain], engine: EngineSpeed) -> _Hold:
        hold = self._holds.get(holder)
        if hold is None:
            hold = self._holds[holder] = _Hold(expires=0.0)
            self._state.counters.lookups += 1
            if self._gauges:
                for chain in chains:
                    self._gauges.use(chain.hashes)
            if self._state.costs:
                self._state.costs.note_engine(holder.session, *engine)
        return hold

    def _reach(
        self, chains: Sequence[Chain], found: Sequence[_Slots], most: int | None = None
    ) -> int:
        """Return the longest prefix, of `most` blocks, that all groups could serve."""
        whole, windowed = ([] if most is None else [most]), []
        for chain, slots in zip(chains, found, strict=True):
            if chain.window:
                pairs = zip(chain.hashes, slots, strict=True)
                there = [slot is not None or self._is_somewhere(key) for key, slot in pairs]
                windowed.append((chain.window, there))
                continue
            reach = slots.index(None) if None in slots else len(slots)
            while reach < len(slots) and (
                slots[reach] is not None or self._is_somewhere(chain.hashes[reach])
            ):
                reach += 1
            whole.append(reach)
        return longest(whole, windowed)

    def _probe(self, hold: _Hold, chains: Sequence[Chain], reach: int) -> bool:
        """Ask keyed tiers for what would follow on `reach`; return whether to wait for answers."""
        limits, now = self._state.limits, self._state.now
        ends = reach == len(chains[0].hashes)
        if not self._probing.useful or ends or (hold.staging_until and now >= hold.staging_until):
            return False
        hold.probe = hold.probe or limits.probe_blocks_max
        if reach >= hold.probed + hold.probe:  # all that was asked for is there
            hold.probe = min(2 * hold.probe, limits.job_blocks_max * 64)
        unknown = [
            Unknown(chain.hashes[place], chain.hashes[place - 1] if place else None)
            for chain in chains
            for place in range(reach, min(reach + hold.probe, len(chain.hashes)))
            if not self._is_somewhere(chain.hashes[place])
        ]
        if not unknown or not self._probing.ask(unknown):
            return False
        hold.probed = reach
        hold.staging_until = hold.staging_until or now + limits.staging_timeout_s
        return True

    def _decide(
        self,
        holder: Holder,
        hold: _Hold,
        chains: Sequence[Chain],
        found: Sequence[_Slots],
        reach: int,
    ) -> None:
        """Choose, once for a request, how much of its hit to load; a probe may read on for nobody.

        Of a hybrid model the first group stands for all: its blocks are as many as there are.
        """
        state = self._state
        assert state.costs is not None
        until = hold.staging_until or state.now + state.limits.staging_timeout_s
        tokens = len(chains[0].hashes) * self._block_tokens
        runs = self._runs(chains[0], found[0], reach)
        decision = state.costs.choose(holder.session, runs, tokens, state.now, until)
        hold.decision = decision
        if decision.limit is Limit.NONE:
            return
        hold.cut = decision.load
        state.counters.not_worth_loading_blocks += decision.hit - decision.load
        ahead = chains[0].hashes[decision.load : decision.load + decision.probe]
        probe = [key for key in ahead if key not in state.host and state.below(key) is not None]
        probe = [key for key in probe if not self._onboarding.is_reading(key)]
        if probe:
            self._onboarding.stage(probe, None, until)

    def _runs(self, chain: Chain, slots: _Slots, reach: int) -> list[Run]:
        """Return where the first `reach` blocks of a chain lie, neighbours in one tier together."""
        first = min(slots.index(None) if None in slots else len(slots), reach)
        runs = [Run(HOST, first)] if first else []
        for place in range(first, reach):
            key = chain.hashes[place]
            reading = self._onboarding.is_reading(key)
            below = self._state.below(key) if slots[place] is None else None
            tier, staging = (below.name, reading) if below else (HOST, False)
            if runs and (runs[-1].tier, runs[-1].staging) == (tier, staging):
                runs[-1] = Run(tier, runs[-1].blocks + 1, staging)
            else:
                runs.append(Run(tier, 1, staging))
        return runs

    def _behind(
        self, chains: Sequence[Chain], found: Sequence[_Slots], reach: int, holder: Holder
    ) -> _Behind:
        """Return what of a prefix that all groups could serve is not in the host."""
        to_stage: list[SequenceHash] = []
        coming = False
        for chain, slots in zip(chains, found, strict=True):
            first = slots.index(None) if None in slots else len(slots)
            for place in range(max(first, chain.needed(reach).start), reach):
                if slots[place] is None:
                    key = chain.hashes[place]
                    if self._onboarding.waiting_for(key, holder) or self._storing.is_sealing(key):
                        coming = True
                    else:
                        to_stage.append(key)
        return _Behind(to_stage, coming)

    def _reason(
        self,
        hold: _Hold,
        chains: Sequence[Chain],
        found: Sequence[_Slots],
        ready: int,
        too_late: bool,  # noqa: FBT001  # one of its callers' facts
    ) -> str:
        """Return why no more than `ready` is; empty if that is all."""
        if ready == len(chains[0].hashes):
            return ""
        if hold.decision and hold.cut is not None and ready >= hold.cut:
            return f"too slow to be worth it: {hold.decision.sentence()}"
        if too_late:
            return "too slow"
        missing = _missing(chains, found, ready)
        return self.why(missing) if missing else ""

    def _is_somewhere(self, key: SequenceHash) -> bool:
        state = self._state
        return (
            self._onboarding.is_reading(key)
            or self._storing.is_sealing(key)
            or state.below(key) is not None
        )

    def why(self, key: SequenceHash) -> str:
        """Return why `key` is not in the host, most telling reason first."""
        below = self._state.below(key)
        if below is not None:
            return f"on {below.name}, no host slot free"
        if resting := [tier.name for tier in self._state.lower if key in tier]:
            return f"on {resting[0]}, which failed or was too slow a moment ago"
        if self._storing.is_coming(key):
            return "being stored"
        return self._state.departures.why(key, self._state.now)

    def _pin(self, hold: _Hold, found: Sequence[tuple[SequenceHash, SlotId]]) -> None:
        # By slot, not by key: a key that was cleared and stored again lives in another slot.
        new = [slot for _, slot in found if slot not in hold.held]
        if new:
            hold.pins.append(self._state.host.pin(new))
            hold.held.update(new)

    def _count_staged(self, hold: _Hold, keys: Sequence[SequenceHash]) -> dict[TierName, int]:
        counts: dict[TierName, int] = {}
        if hold.staged:
            for key in keys:
                tier = hold.staged.get(key)
                if tier is not None:
                    counts[tier] = counts.get(tier, 0) + 1
        return counts


def _ready(chains: Sequence[Chain], found: Sequence[_Slots], most: int) -> int:
    """Return the longest prefix, of up to `most` blocks, that all groups have in the host."""
    whole, windowed = [most], []
    for chain, slots in zip(chains, found, strict=True):
        if chain.window:
            windowed.append((chain.window, [slot is not None for slot in slots]))
        else:
            whole.append(slots.index(None) if None in slots else len(slots))
    return longest(whole, windowed)


def _keys(chains: Sequence[Chain], blocks: int) -> list[SequenceHash]:
    """Return the keys that a hit of `blocks` needs, one group after the other."""
    keys: list[SequenceHash] = []
    for chain in chains:
        needed = chain.needed(blocks)
        keys += chain.hashes[needed.start : needed.stop]
    return keys


def _missing(chains: Sequence[Chain], found: Sequence[_Slots], ready: int) -> SequenceHash | None:
    """Return the first key that keeps a hit from being longer than `ready`."""
    for chain, slots in zip(chains, found, strict=True):
        if ready < len(slots):
            for place in chain.needed(ready + 1):
                if slots[place] is None:
                    return chain.hashes[place]
    return None
