"""Pages in a real daemon, from several threads, while the daemon lives, dies and hangs."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import numpy as np
import pytest

from kvstrata.connectors.sglang.canary import fly_canary
from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.hostpages import FlatPages
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.core.config import NodeConfig, parse_tiers
from kvstrata.core.errors import DaemonGoneError, LayoutError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime.admin import AdminClient
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.tokens import Namespace

PAGE_TOKENS = 16
PAGE_BYTES = 6000
LAYOUT = BlockLayout((Dimension("byte", PAGE_BYTES),), "uint8", PAGE_TOKENS, "sglang-pages")


def namespace(model="m"):
    return Namespace(model, "w", "", "uint8", LAYOUT.geometry, PAGE_TOKENS)


def chain(seed, count):
    digests = [hashlib.sha256(f"{seed}".encode()).digest()]
    while len(digests) < count:
        digests.append(hashlib.sha256(digests[-1]).digest())
    return digests


def payload(digest):
    """Return the bytes of a page, which its digest decides."""
    return np.frombuffer((digest * (PAGE_BYTES // 32 + 1))[:PAGE_BYTES], np.uint8)


def space(count):
    return FlatPages([np.zeros(PAGE_BYTES, np.uint8) for _ in range(count)])


def filled(digests):
    return FlatPages([payload(each).copy() for each in digests])


@pytest.fixture
def keep(run_directory):
    """Open KeptPages at an address, or with private tiers; all are closed with the test."""
    assert run_directory.is_dir()
    opened = []

    def make(where, *, model="m", batch_timeout_s=5.0, **limits):
        limits = {"call_timeout_s": 1.0, "retry_interval_s": 0.02} | limits
        where = NodeConfig(parse_tiers(where)) if where.startswith("host") else where
        session = Session(where, LAYOUT, namespace(model), SessionLimits(**limits))
        kept = KeptPages(session, batch_timeout_s=batch_timeout_s)
        opened.append(kept)
        kept.open()
        return kept

    yield make
    for each in opened:
        each.close()


def save(kept, digests, parent=None):
    return kept.save(digests, parent, filled(digests), range(len(digests)))


def load_right(kept, digests):
    """Return how many pages were loaded; each must be right, and none behind them touched."""
    target = space(len(digests))
    loaded = kept.load(digests, target, range(len(digests)))
    for digest, page in zip(digests[:loaded], target._arrays[:loaded], strict=True):
        assert (page == payload(digest)).all()
    return loaded


def counters(address):
    with AdminClient(address) as admin:
        return admin.stats()["node"]


def test_what_is_saved_is_found_and_loaded_bit_for_bit(serve, keep):
    kept = keep(serve("host:4MiB").address)
    digests = chain(1, 20)
    assert save(kept, digests[:12]) == [True] * 12
    assert save(kept, digests[12:], digests[11]) == [True] * 8
    assert kept.find(digests) == 20
    assert load_right(kept, digests) == 20
    assert kept.find(chain(2, 5)) == 0
    stats = kept.statistics()
    assert (stats["saved"], stats["loaded"], stats["unloaded"]) == (20, 20, 0)


def test_a_prefix_ends_at_the_first_page_that_is_missing(serve, keep):
    kept = keep(serve("host:4MiB").address)
    digests = chain(1, 10)
    save(kept, digests[:4])
    save(kept, digests[5:], digests[4])
    assert kept.find(digests) == 4
    assert load_right(kept, digests) == 4
    assert kept.find(digests[5:]) == 5, "SGLang asks for what is behind its own prefix, too"


def test_saving_again_copies_nothing(serve, keep):
    kept = keep(serve("host:4MiB").address)
    digests = chain(1, 6)
    save(kept, digests)
    assert kept.find(digests) == 6
    wrong = FlatPages([np.zeros(PAGE_BYTES, np.uint8)] * 6)
    assert kept.save(digests, None, wrong, range(6)) == [True] * 6
    assert load_right(kept, digests) == 6
    assert kept.statistics()["saved"] == 6


def test_another_model_finds_nothing(serve, keep):
    address = serve("host:4MiB").address
    mine, theirs = keep(address), keep(address, model="other")
    digests = chain(1, 4)
    save(mine, digests)
    assert mine.find(digests) == 4
    assert theirs.find(digests) == 0
    assert load_right(theirs, digests) == 0


def test_clear_forgets_this_model_only(serve, keep):
    address = serve("host:4MiB").address
    mine, theirs = keep(address), keep(address, model="other")
    for kept in (mine, theirs):
        save(kept, chain(1, 4))
        assert kept.find(chain(1, 4)) == 4
    assert mine.clear()
    assert mine.find(chain(1, 4)) == 0
    assert theirs.find(chain(1, 4)) == 4


def test_nothing_stays_held_or_half_filled(serve, keep):
    daemon = serve("host:4MiB")
    kept = keep(daemon.address)
    digests = chain(1, 8)
    save(kept, digests)
    assert kept.find(digests) == 8
    assert counters(daemon.address)["tiers"]["host"]["in_use"] == 8
    assert load_right(kept, digests[:4]) == 4
    assert load_right(kept, digests[4:]) == 4
    node = counters(daemon.address)
    host = node["tiers"]["host"]
    assert (host["in_use"], host["filling"]) == (0, 0), node


def test_a_later_turn_hangs_on_the_one_before(serve, keep, eventually):
    daemon = serve("host:64KiB")  # seven pages
    kept = keep(daemon.address)
    turns = chain(1, 4)
    save(kept, turns[:2])
    eventually(lambda: counters(daemon.address)["tiers"]["host"]["idle"] == 2)
    save(kept, turns[2:], turns[1])
    eventually(lambda: counters(daemon.address)["tiers"]["host"]["idle"] == 4)
    for other in range(5):  # the first turn is the coldest, and yet its pages are not taken first
        save(kept, chain(100 + other, 1))
    there = [load_right(kept, [digest]) for digest in turns]
    assert 0 < sum(there) < 4, "something was evicted, not all"
    assert there == sorted(there, reverse=True), "no page is kept whose prefix is not"


def test_who_cannot_have_its_turn_goes_on_without_the_cache(serve, keep):
    kept = keep(serve("host:4MiB").address, batch_timeout_s=0.3)
    digests = chain(1, 3)
    save(kept, digests)
    assert kept.find(digests) == 3
    with kept._turns._lock:  # another thread, in the middle of its calls
        began = time.monotonic()
        assert kept.find(digests) == 0
        assert load_right(kept, digests) == 0
        assert save(kept, chain(2, 2)) == [False] * 2
        assert time.monotonic() - began < 4 * 0.3 + 1.0
    assert kept.statistics()["late_turns"] >= 3
    assert kept.find(digests) == 3


def test_a_full_host_keeps_a_prefix_and_says_so(serve, keep):
    kept = keep(serve("host:64KiB").address)
    digests = chain(1, 20)
    flags = save(kept, digests)
    count = flags.count(True)
    assert 0 < count < 20
    assert flags == [True] * count + [False] * (20 - count)
    assert kept.find(digests) == count
    assert load_right(kept, digests) == count


def test_pages_come_back_from_disk(keep, tmp_path):
    tiers = f"host:1MiB,disk:{tmp_path / 'kv'}:4MiB"
    digests = chain(1, 40)
    first = keep(tiers)
    save(first, digests)
    with AdminClient(first.daemon_address) as admin:
        admin.wait_idle(20)
    first.close()
    second = keep(tiers)
    assert second.find(digests) == 40
    assert load_right(second, digests) == 40
    assert counters(second.daemon_address)["counters"]["hit_blocks_staged"] == 40


def test_a_load_without_a_question_stages_for_itself(keep, tmp_path):
    tiers = f"host:1MiB,disk:{tmp_path / 'kv'}:4MiB"
    digests = chain(1, 10)
    first = keep(tiers)
    save(first, digests)
    with AdminClient(first.daemon_address) as admin:
        admin.wait_idle(20)
    first.close()
    assert load_right(keep(tiers), digests) == 10


def test_no_daemon_at_the_address_is_said_at_once(keep, run_directory):
    with pytest.raises(DaemonGoneError, match="start kvstrata serve there first"):
        keep(f"ipc://{run_directory}/none.sock")


def test_a_killed_daemon_costs_hits_and_comes_back_by_itself(serve, keep, eventually):
    daemon = serve("host:4MiB")
    kept = keep(daemon.address)
    digests = chain(1, 6)
    save(kept, digests)
    daemon.kill()
    began = time.monotonic()
    assert kept.find(digests) == 0
    assert load_right(kept, digests) == 0
    assert save(kept, digests) == [False] * 6
    assert time.monotonic() - began < 1.0, "noticed at once"
    serve("host:4MiB")
    eventually(lambda: all(save(kept, digests)))
    assert kept.find(digests) == 6
    assert load_right(kept, digests) == 6


def test_a_private_daemon_that_is_killed_is_started_anew(keep, eventually):
    kept = keep("host:4MiB")
    pid = kept.daemon_pid
    save(kept, chain(1, 4))
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(save(kept, chain(2, 4))), timeout_s=30)
    assert kept.daemon_pid not in {0, pid}
    assert kept.find(chain(1, 4)) == 0


def test_a_daemon_that_hangs_holds_nobody_longer_than_its_limits(serve, keep, eventually):
    daemon = serve("host:4MiB")
    kept = keep(daemon.address, call_timeout_s=0.2, batch_timeout_s=0.5, start_timeout_s=5.0)
    digests = chain(1, 6)
    save(kept, digests)
    assert kept.find(digests) == 6
    daemon.signal(signal.SIGSTOP)
    took = []

    def call(work):
        began = time.monotonic()
        work()
        took.append(time.monotonic() - began)

    calls = [
        lambda: kept.find(digests),
        lambda: kept.load(digests, space(6), range(6)),
        lambda: save(kept, chain(3, 4)),
        kept.statistics,
    ]
    threads = [threading.Thread(target=call, args=(work,)) for work in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(took) == 4
    assert max(took) < 0.5 + 2 * 0.2 + 2.0, took
    daemon.signal(signal.SIGCONT)
    eventually(lambda: load_right(kept, digests) == 6 or (save(kept, digests) and None))


def test_a_clear_while_the_daemon_is_away_is_made_good_before_anything_is_found(
    keep, tmp_path, eventually
):
    tiers = f"host:1MiB,disk:{tmp_path / 'kv'}:4MiB"
    kept = keep(tiers)
    digests = chain(1, 10)
    save(kept, digests)
    with AdminClient(kept.daemon_address) as admin:
        admin.wait_idle(20)
    os.kill(kept.daemon_pid, signal.SIGKILL)
    assert not kept.clear()
    eventually(lambda: kept.find([]) == 0 and all(save(kept, chain(2, 2))), timeout_s=30)
    assert kept.find(digests) == 0


def test_a_slot_that_changes_under_the_copy_is_not_believed(serve, keep):
    kept = keep(serve("host:4MiB").address)
    digests = chain(1, 5)
    save(kept, digests)
    assert kept.find(digests) == 5

    class Racing(FlatPages):
        """Raises the slot's generation in the middle of the third copy."""

        def write(self, page, block):
            super().write(page, block)
            if page == 2:
                kept._turns._mapped.generations[:] += 1

    target = Racing([np.zeros(PAGE_BYTES, np.uint8) for _ in range(5)])
    assert kept.load(digests, target, range(5)) == 2
    assert kept.statistics()["torn"] == 1


def test_a_copy_that_fails_leaves_no_slot_behind(serve, keep):
    daemon = serve("host:4MiB")
    kept = keep(daemon.address)

    class Broken(FlatPages):
        def read(self, page, block):
            raise ZeroDivisionError(page, block)

        write = read

    with pytest.raises(ZeroDivisionError):
        kept.save(chain(1, 3), None, Broken([]), range(3))
    assert counters(daemon.address)["tiers"]["host"]["filling"] == 0
    save(kept, chain(2, 3))
    assert kept.find(chain(2, 3)) == 3
    with pytest.raises(ZeroDivisionError):
        kept.load(chain(2, 3), Broken([]), range(3))
    assert counters(daemon.address)["tiers"]["host"]["in_use"] == 0


def test_four_threads_at_once(serve, keep):
    kept = keep(serve("host:8MiB").address)
    stop, errors = threading.Event(), []
    chains = [chain(seed, 12) for seed in range(6)]

    def repeat(work):
        try:
            turn = 0
            while not stop.is_set():
                work(chains[turn % len(chains)])
                turn += 1
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test has to see it
            errors.append(error)

    works = [
        lambda digests: save(kept, digests),
        kept.find,
        lambda digests: load_right(kept, digests),
        lambda digests: kept.find(digests[6:]),
    ]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not errors
    assert kept.statistics()["loaded"] > 0


def test_the_canary_comes_back_and_is_forgotten(serve, keep):
    daemon = serve("host:4MiB")
    kept = keep(daemon.address)
    pages = space(2)
    assert fly_canary(kept, pages, 1, PAGE_BYTES, lambda page: pages._arrays[page])
    host = counters(daemon.address)["tiers"]["host"]
    assert (host["idle"] + host["in_use"], host["filling"]) == (0, 0)


def test_the_canary_notices_an_engine_that_reads_another_page(serve, keep):
    kept = keep(serve("host:4MiB").address)
    pages = space(2)
    with pytest.raises(LayoutError, match="SGLang reads other bytes"):
        fly_canary(kept, pages, 1, PAGE_BYTES, lambda page: pages._arrays[page - 1])


def test_the_canary_notices_bytes_that_change_on_the_way(serve, keep):
    kept = keep(serve("host:4MiB").address)

    class Flipping(FlatPages):
        def read(self, page, block):
            super().read(page, block)
            block[17] ^= 1

    pages = Flipping([np.zeros(PAGE_BYTES, np.uint8)])
    with pytest.raises(LayoutError, match="came back with other bytes"):
        fly_canary(kept, pages, 0, PAGE_BYTES, lambda page: pages._arrays[page])


def test_holds_are_bounded_and_the_latest_of_a_page_is_taken():
    holds = Holds()
    pages = chain(1, 200)
    assert holds.add(Hold("a", 1, frozenset(pages[:3]))) == []
    assert holds.add(Hold("b", 1, frozenset(pages[2:5]))) == []
    assert holds.take(pages[2]).name == "b"
    assert holds.take(pages[4]) is None
    assert holds.take(pages[0]).name == "a"
    assert len(holds) == 0
    dropped = [
        hold.name
        for place in range(70)
        for hold in holds.add(Hold(f"{place}", 1, frozenset({pages[place]})))
    ]
    assert dropped == [str(place) for place in range(6)]
    assert len(holds) == 64
    assert holds.take(pages[0]) is None, "it made room"
    holds.drop_all()
    assert len(holds) == 0
    assert holds.take(pages[10]) is None
