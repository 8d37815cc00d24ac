from __future__ import annotations

import math

import pytest

from kvstrata.core.ids import SessionId, TransferId
from kvstrata.manager.costs import PROBE_BLOCKS_MAX, Costs
from kvstrata.manager.decision import Limit, Run
from kvstrata.manager.speed import JOBS_TRUSTED, TierSeed

ENGINE = SessionId(1)
BLOCK_TOKENS, BLOCK_BYTES = 64, 8_000_000
HOST = TierSeed(block_s=0.4e-3)  # 20 GB/s
DISK = TierSeed(block_s=4e-3, latency_s=1e-3)  # 2 GB/s
PREFILL = 8_000.0  # 8 ms a block


def node(prefill: float = PREFILL, margin: float = 0.0, **seeds: TierSeed) -> Costs:
    costs = Costs(BLOCK_TOKENS, BLOCK_BYTES, margin=margin, seeds={"host": HOST, **seeds})
    costs.note_engine(ENGINE, prefill)
    return costs


@pytest.mark.parametrize(
    ("disk", "prefill", "queue", "load"),
    [
        (DISK, PREFILL, 0, 24),  # 4.4 ms a block against 8
        (DISK, 4 * PREFILL, 0, 4),  # against 2
        (DISK, 100 * PREFILL, 0, 0),  # even a copy from the host is slower
        (DISK, PREFILL, 17, 24),  # 20 blocks: 160 ms; read, queued and copied: 157 ms
        (DISK, PREFILL, 18, 4),  # 161 ms
        (TierSeed(4e-3, latency_s=0.1), PREFILL, 0, 4),
        (TierSeed(0.0), PREFILL, 0, 24),
    ],
)
def test_the_faster_way_is_taken(disk, prefill, queue, load):
    costs = node(prefill, disk=disk)
    if queue:
        costs.note_read(TransferId(1), "disk", queue, 0.0)
    decision = costs.choose(ENGINE, [Run("host", 4), Run("disk", 20)], 24 * 64 + 1, 0.0)
    assert decision.load == load
    assert decision.limit is (Limit.NONE if load == 24 else Limit.SLOWER)
    assert sum(count for _, count in decision.load_by_tier) == load
    assert sum(count for _, count in decision.left_by_tier) == 24 - load


def test_what_is_not_known_is_loaded():
    runs = [Run("host", 4), Run("disk", 20)]
    assert Costs(64, 1).choose(ENGINE, runs, 2000, 0.0).load == 24
    slow = TierSeed(100.0)
    unknown_engine = Costs(64, 1, seeds={"host": HOST, "disk": slow})
    decision = unknown_engine.choose(ENGINE, runs, 2000, 0.0)
    assert decision.load == 24
    assert not decision.known
    assert "not all speeds are known" in decision.sentence()
    unknown_disk = Costs(64, 1)
    unknown_disk.note_engine(ENGINE, 1e9)
    assert unknown_disk.choose(ENGINE, [Run("disk", 20)], 2000, 0.0).load == 20


def test_a_few_jobs_are_not_believed():
    costs = node()
    for number in range(JOBS_TRUSTED):
        assert costs.choose(ENGINE, [Run("disk", 9)], 0, float(number)).load == 9
        costs.note_read(TransferId(number), "disk", 1, number)
        costs.note_done(TransferId(number), number + 0.5)
    assert costs.choose(ENGINE, [Run("disk", 9)], 0, 9.0).load == 0


def test_no_read_is_begun_that_cannot_end_in_time():
    costs = node(disk=DISK)
    runs = [Run("host", 4), Run("disk", 20), Run("host", 3)]
    decision = costs.choose(ENGINE, runs, 0, now=10.0, deadline=10.042)
    assert decision.load == 4 + 10  # 1 ms + 4 ms for each
    assert decision.limit is Limit.DEADLINE
    assert decision.left_by_tier == (("disk", 10), ("host", 3))
    assert "the request waits 42 ms at most" in decision.sentence()
    assert costs.choose(ENGINE, runs, 0, now=10.0, deadline=9.0).load == 4
    engine_unknown = Costs(64, 1, seeds={"disk": DISK})
    assert engine_unknown.choose(ENGINE, runs, 0, now=10.0, deadline=10.042).load == 14


def test_blocks_that_are_being_read_already_add_nothing_to_the_queue():
    costs = node(disk=TierSeed(6e-3))
    costs.note_read(TransferId(1), "disk", 20, 0.0)
    waits = costs.choose(ENGINE, [Run("disk", 20, staging=True)], 0, 0.0)
    assert (waits.load, waits.stage_s) == (20, pytest.approx(0.120))
    assert costs.choose(ENGINE, [Run("disk", 20)], 0, 0.0).load == 0  # 240 ms against 160


def test_a_second_tier_hides_behind_a_slower_one():
    # Object blocks take 1 s whatever we do; 3 ms a block, the disk has 333 of them in that time.
    costs = node(disk=TierSeed(12e-3), object=TierSeed(0.0, latency_s=1.0))
    runs = [Run("object", 200), Run("disk", 400)]
    decision = costs.choose(ENGINE, runs, 0, 0.0)
    assert decision.load == 200 + 83  # 12 ms each is more than 7.6; up to 1 s they are free
    assert decision.stage_s == pytest.approx(1.0)


def test_the_margin_must_be_gained():
    for margin, load in ((0.0, 20), (0.5, 20), (0.75, 20), (0.9, 0)):
        costs = node(margin=margin, disk=TierSeed(4e-3))  # 4.4 ms against 8
        assert costs.choose(ENGINE, [Run("disk", 20)], 0, 0.0).load == load
    sentence = costs.choose(ENGINE, [Run("disk", 20)], 0, 0.0).sentence()
    assert "and 90% must be gained" in sentence


def test_writes_are_waited_for():
    costs = node(disk=DISK)
    costs.note_write(TransferId(1), "disk", 250, 0.0)
    assert costs.choose(ENGINE, [Run("disk", 20)], 0, 0.0).load == 0
    costs.note_done(TransferId(1), 0.001)
    assert costs.choose(ENGINE, [Run("disk", 20)], 0, 0.002).load == 20
    assert costs.statistics(0.0)["tiers"]["disk"]["jobs"] == JOBS_TRUSTED, "a write teaches nothing"


def test_failing_fast_is_not_being_fast():
    costs = node(disk=TierSeed(40e-3))
    for number in range(50):
        costs.note_read(TransferId(number), "disk", 1, float(number))
        costs.note_failed(TransferId(number), number + 1e-6)
    assert costs.choose(ENGINE, [Run("disk", 20)], 0, 50.0).load == 0


def test_a_disk_that_hangs_is_noticed_before_anything_ends():
    for seeds in ({}, {"disk": DISK}):
        costs = node(**seeds)
        costs.note_read(TransferId(1), "disk", 16, 0.0)
        runs = [Run("disk", 30)]
        assert costs.choose(ENGINE, runs, 0, 0.01).load == 30
        hangs = costs.choose(ENGINE, runs, 0, 1.0)
        assert hangs.load == 0
        assert "its oldest job" in hangs.sentence()
        costs.note_given_up(TransferId(1), 5.0)
        costs.note_failed(TransferId(1), 6.0)
        assert costs.rate("disk", 7.0).overdue_s == 0.0


def test_one_hanging_job_does_not_condemn_a_disk_that_goes_on():
    costs = node(disk=DISK)
    costs.note_read(TransferId(0), "disk", 16, 0.0)
    for number in range(1, 40):
        costs.note_read(TransferId(number), "disk", 1, float(number))
        costs.note_done(TransferId(number), number + 0.07)
    assert costs.choose(ENGINE, [Run("disk", 400)], 0, 39.08).load == 400


def test_what_was_given_up_counts_as_that_slow():
    costs = node(disk=DISK)
    for number in range(20):
        costs.note_read(TransferId(number), "disk", 16, number * 10.0)
        costs.note_given_up(TransferId(number), number * 10.0 + 5.0)
        costs.note_failed(TransferId(number), number * 10.0 + 6.0)
    assert costs.choose(ENGINE, [Run("disk", 16)], 0, 500.0).load == 0
    costs.note_given_up(TransferId(77), 0.0)  # none of ours


def test_a_slow_tier_is_probed_after_a_silence_and_comes_back():
    costs = node(disk=TierSeed(1.0))
    runs = [Run("host", 2), Run("disk", 100)]
    first = costs.choose(ENGINE, runs, 0, 0.0)
    assert (first.load, first.probe) == (2, PROBE_BLOCKS_MAX)
    costs.note_read(TransferId(0), "disk", first.probe, 0.0)
    costs.note_done(TransferId(0), 0.01)
    assert costs.choose(ENGINE, runs, 0, 9.0).probe == 0
    probes = 1
    for second in range(10, 1000):
        decision = costs.choose(ENGINE, runs, 0, float(second))
        if decision.load == 102:
            break
        if decision.probe:
            probes += 1
            costs.note_read(TransferId(second), "disk", decision.probe, float(second))
            costs.note_done(TransferId(second), second + 0.01)
    assert decision.load == 102
    assert decision.probe == 0
    assert probes <= 10


def test_nothing_is_probed_that_is_read_anyway():
    costs = node(disk=DISK)
    runs = [Run("disk", 20)]
    assert costs.choose(ENGINE, runs, 0, 0.0).probe == 0
    assert costs.choose(ENGINE, runs, 0, 0.0, deadline=0.05).probe == 0
    assert costs.choose(ENGINE, runs, 0, 0.0, deadline=0.0).probe == PROBE_BLOCKS_MAX
    assert node(1e9).choose(ENGINE, [Run("host", 2)], 0, 0.0).probe == 0


def test_each_engine_is_believed_for_itself():
    costs = node(disk=DISK)
    costs.note_engine(SessionId(2), 100 * PREFILL)
    costs.note_engine(SessionId(3), PREFILL, copy_bytes_per_s=BLOCK_BYTES / 5e-3)
    runs = [Run("disk", 20)]
    found = [costs.choose(SessionId(session), runs, 0, 0.0).load for session in (1, 2, 3, 4)]
    assert found == [20, 0, 0, 20]
    costs.session_ended(SessionId(2))
    costs.session_ended(SessionId(2))
    assert costs.choose(SessionId(2), runs, 0, 0.0).load == 20


def test_what_an_engine_says_is_smoothed_and_nonsense_is_left_out():
    costs = node(8000.0)
    for nonsense in (0.0, -1.0, math.nan, math.inf):
        costs.note_engine(ENGINE, nonsense, nonsense)
    costs.note_engine(ENGINE, 4000.0)
    (engine,) = costs.statistics(0.0)["engines"]
    assert engine["prefill_tokens_per_s"] == pytest.approx(8000 - 0.3 * 4000)
    assert engine["copy_bytes_per_s"] == 0.0


def test_the_sentence_says_it_all():
    costs = node(8_100.0, disk=TierSeed(13e-3))
    costs.note_read(TransferId(1), "disk", 40, 0.0)
    sentence = costs.choose(ENGINE, [Run("host", 3), Run("disk", 12)], 0, 0.0).sentence()
    assert sentence == (
        "12 blocks of disk not loaded: reading them takes 681 ms, computing them 94.7 ms "
        "(host 20 GB/s; disk 0.62 GB/s behind 40 blocks; prefill 8,100 tokens/s)"
    )
    loaded = node(disk=DISK).choose(ENGINE, [Run("disk", 1)], 0, 0.0).sentence()
    assert loaded == (
        "1 block of disk loaded: loading takes 5.4 ms "
        "(disk 2 GB/s after 1 ms; host 20 GB/s; prefill 8,000 tokens/s)"
    )
    assert costs.choose(ENGINE, [], 0, 0.0).sentence() == "nothing is kept"


def test_statistics_show_the_table():
    costs = node(disk=DISK)
    costs.note_read(TransferId(1), "disk", 40, 0.0)
    costs.choose(ENGINE, [Run("host", 1), Run("disk", 1)], 0, 0.0)
    stats = costs.statistics(0.0)
    assert stats["tiers"]["disk"] == {
        "known": True,
        "latency_s": pytest.approx(1e-3),
        "bytes_per_s": pytest.approx(2e9),
        "queue_blocks": 40,
        "overdue_s": 0.0,
        "jobs": JOBS_TRUSTED,
    }
    assert stats["engines"] == [
        {"session": 1, "prefill_tokens_per_s": PREFILL, "copy_bytes_per_s": 0.0}
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_tokens": 0},
        {"block_bytes": 0},
        {"margin": -0.1},
        {"margin": math.nan},
        {"margin": math.inf},
        {"probe_interval_s": -1.0},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Costs(**({"block_tokens": 64, "block_bytes": 1} | wrong))
