"""Whole nodes in simulated time; the world must also find bugs that are planted in the brain."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, deque

import pytest

from kvstrata.pool import Pin, Pool
from kvstrata.testing import simworld
from kvstrata.testing.oracle import Disk, Luck
from kvstrata.testing.plants import (
    free_a_late_read_at_once,
    free_slots_of_closed_sessions,
    keep_stale_writes,
    register_stale_seals,
    trust_what_was_read,
)
from kvstrata.testing.simworld import SimWorld

GROUP = 50


@pytest.mark.parametrize("first", [1, 51, 101, 151])
def test_every_law_holds_in_fifty_worlds(first: int) -> None:
    served = restarts = 0
    for seed in range(first, first + GROUP):
        world = SimWorld(seed)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"make sim SEEDS=1 FIRST={seed}") from error
        served, restarts = served + world.served, restarts + world.restarts
    assert served > 20 * GROUP, "worlds that serve nothing prove nothing"
    assert restarts > GROUP / 5


def digest_of(seed: int) -> str:
    world = SimWorld(seed)
    world.run()
    return world.digest


def test_the_same_seed_takes_the_same_steps() -> None:
    assert digest_of(17) == digest_of(17)
    assert digest_of(17) != digest_of(18)


def test_the_same_seed_takes_the_same_steps_in_another_process() -> None:
    """Sets of bytes iterate in another order there; no decision may depend on it."""
    program = (
        "from kvstrata.testing.simworld import SimWorld\n"
        "world = SimWorld(17)\nworld.run()\nprint(world.digest)"
    )
    for hash_seed in ("1", "2"):
        child = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == digest_of(17)


def test_everything_that_is_counted_happens() -> None:
    """A fault that never strikes tests nothing."""
    seen: Counter[str] = Counter()
    for seed in range(1, 121):
        world = SimWorld(seed)
        world.run()
        counters = world.counters
        seen.update({name: getattr(counters, name) for name in counters.__slots__})
    never = [name for name, count in seen.items() if not count]
    assert never == [
        "lost_blocks",  # devices fail under real nodes: test_storage_stripe.py
        "throttled_quota_blocks",  # has a world of its own: test_tenant_world.py
        *("deleted_blocks", "undeleted_blocks", "adopted_blocks", "probed_blocks"),
        *("found_blocks", "unadopted_blocks"),
    ]  # the others are of keyed tiers, which are tested with real stores: test_runtime_keyed.py


def test_a_world_without_faults_serves_from_both_tiers() -> None:
    world = SimWorld(3, Luck(*[0.0] * 8))
    world.run()
    counters = world.counters
    assert counters.hit_blocks_host > 0
    assert counters.hit_blocks_staged > 0
    assert counters.corrupt_blocks == counters.read_failed_blocks == 0


def test_a_run_of_seeds_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    assert simworld.main(["--seeds", "2", "--first", "5", "--steps", "20"]) == 0
    assert "2/2 worlds hold" in capsys.readouterr().out


def test_a_failing_seed_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trust_what_was_read(monkeypatch)
    assert simworld.main(["--seeds", "50", "--first", "1"]) == 1
    error = capsys.readouterr().err
    assert "make sim SEEDS=1 FIRST=" in error
    seed = int(error.partition("FIRST=")[2].split()[0])
    with pytest.raises(AssertionError):
        SimWorld(seed).run()


# -- planted bugs ------------------------------------------------------------------------------


def forget_pins(patch: pytest.MonkeyPatch) -> None:
    """Pin nothing: whoever reads is not protected from eviction."""
    patch.setattr(Pool, "pin", lambda self, slots, used=True: Pin(slots, id))  # noqa: ARG005


def forget_the_floor(patch: pytest.MonkeyPatch) -> None:
    """Recover what was cleared: an erased line may have stayed."""
    recoverable = Disk.recoverable

    def careless(self):
        self.floor = 0
        return recoverable(self)

    patch.setattr(Disk, "recoverable", careless)


@pytest.mark.parametrize(
    "plant",
    [
        trust_what_was_read,
        register_stale_seals,
        keep_stale_writes,
        free_a_late_read_at_once,
        free_slots_of_closed_sessions,
        forget_pins,
        forget_the_floor,
    ],
)
def test_a_planted_bug_is_found_within_fifty_worlds(plant, monkeypatch) -> None:
    plant(monkeypatch)
    worlds = map(SimWorld, range(1, 51))
    with pytest.raises(AssertionError):
        deque((world.run() for world in worlds), maxlen=0)
