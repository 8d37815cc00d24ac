"""Who moves a daemon's blocks: by name, by trial, and what is refused before anything moved."""

from __future__ import annotations

import sys
import time

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.errors import ConfigError
from kvstrata.transfer import mover
from kvstrata.transfer.backends.guarded import FILE_PAIRS, GuardedBackend
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.mover import check_mover, choose_mover, decide, make_mover, try_movers
from kvstrata.transfer.registry import Candidate

LIMITS = Limits()
VENDOR = """
import time
from kvstrata.core.errors import ConfigError
from kvstrata.testing.movers import PlainMover

class Plain(PlainMover):
    pass

class Slow(PlainMover):
    def move(self, op, source, target):
        time.sleep(0.002)
        super().move(op, source, target)

class Idle(PlainMover):
    def move(self, op, source, target):
        pass

class Broken(PlainMover):
    def move(self, op, source, target):
        raise OSError("the card is out")

class Raises(PlainMover):
    def submit(self, *given):
        raise LookupError("odd")

class Silent(PlainMover):
    def poll(self):
        return []

class Reader(PlainMover):
    def capabilities(self):
        return frozenset({("file", "memory")})

def refuses(*, notify):
    raise ConfigError("vendor: no card", hint="plug one in")
"""
NAMES = ("Plain", "Slow", "Idle", "Broken", "Raises", "Silent", "Reader", "refuses", "absent")


@pytest.fixture
def vendor(tmp_path_factory, monkeypatch):
    """A package beside ours, as pip would leave it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "vendor_movers.py").write_text(VENDOR)
    info = folder / "vendor_movers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-movers\nVersion: 1.0\n")
    lines = [f"{name.lower()} = vendor_movers:{name}" for name in NAMES]
    (info / "entry_points.txt").write_text("\n".join(["[kvstrata.backends]", *lines, ""]))
    monkeypatch.delitem(sys.modules, "vendor_movers", raising=False)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def without_nixl(monkeypatch):
    """What is chosen then does not depend on the machine."""
    monkeypatch.setattr(mover, "nixl_version", lambda: None)


class TestMaking:
    def test_ours_needs_no_fence_and_seals_on_the_way(self):
        made = make_mover("posix", LIMITS)
        assert isinstance(made, PosixBackend)
        assert len(made.capabilities()) == 4
        made.close()

    @pytest.mark.usefixtures("vendor")
    def test_another_one_is_fenced(self):
        made = make_mover("plain", LIMITS)
        assert isinstance(made, GuardedBackend)
        assert made.capabilities() == FILE_PAIRS
        made.close()

    @pytest.mark.nixl
    def test_nixl_has_no_plugin_but_for_files(self):
        made = make_mover("nixl", LIMITS)
        assert list(made._inner.agent.plugins) == ["POSIX"]
        made.close()

    @pytest.mark.usefixtures("vendor")
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("memcpy", "memcpy does not move both ways between memory and files"),
            ("reader", "reader does not move both ways between memory and files"),
            ("refuses", "vendor: no card"),
            ("absent", r"'absent' of vendor-movers 1\.0 .* cannot be imported"),
            ("carrier", "unknown backend 'carrier'"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, name, words):
        with pytest.raises(ConfigError, match=words) as refusal:
            make_mover(name, LIMITS)
        assert refusal.value.hint

    @pytest.mark.usefixtures("vendor")
    def test_names_are_checked_without_making_anything(self):
        for name in ("posix", "nixl", "auto", "refuses"):
            check_mover(name)
        for name in ("absent", "carrier"):
            with pytest.raises(ConfigError):
                check_mover(name)
        with pytest.raises(ConfigError) as refusal:
            check_mover("carrier")
        assert "known here: auto, memcpy, posix, nixl" in refusal.value.hint


@pytest.mark.usefixtures("vendor")
class TestNamed:
    def test_ours_is_not_tried(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mover, "try_movers", lambda *_, **__: pytest.fail("tried"))
        assert choose_mover("posix", tmp_path, LIMITS).name == "posix"

    def test_one_that_works_is_used_however_slow(self, tmp_path):
        choice = choose_mover("slow", tmp_path, LIMITS)
        assert (choice.name, choice.setting) == ("slow", "slow")
        assert choice.candidates[0].gb_per_s
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("idle", "other bytes came back"),
            ("broken", "the card is out"),
            ("raises", "backend raises failed: LookupError: odd"),
            ("silent", "nothing moved within"),
            ("refuses", "vendor: no card"),
            ("memcpy", "does not move both ways"),
        ],
    )
    def test_one_that_does_not_bring_back_what_it_wrote_is_refused(
        self, tmp_path, monkeypatch, name, words
    ):
        monkeypatch.setattr(mover, "_TIMEOUT_S", 0.2)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=words) as refusal:
            choose_mover(name, tmp_path, LIMITS)
        assert refusal.value.hint
        assert time.monotonic() - began < 20
        assert list(tmp_path.iterdir()) == []

    def test_a_directory_without_room_is_no_fault_of_the_mover(self, tmp_path):
        assert choose_mover("plain", tmp_path / "none", LIMITS).name == "plain"


@pytest.mark.usefixtures("without_nixl")
class TestAuto:
    def test_alone_nothing_is_tried(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mover, "try_movers", lambda *_, **__: pytest.fail("tried"))
        choice = choose_mover("auto", tmp_path, LIMITS)
        assert (choice.name, choice.reason) == ("posix", "no other is installed")

    @pytest.mark.usefixtures("vendor")
    def test_without_a_directory_nothing_is_tried(self, monkeypatch):
        monkeypatch.setattr(mover, "try_movers", lambda *_, **__: pytest.fail("tried"))
        assert choose_mover("auto", None, LIMITS).name == "posix"

    @pytest.mark.usefixtures("vendor")
    def test_all_are_tried_and_ours_is_kept_unless_another_is_clearly_faster(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(mover, "_TIMEOUT_S", 0.5)
        choice = choose_mover("auto", tmp_path, LIMITS)
        found = {each.name: each for each in choice.candidates}
        assert set(found) == {"posix", *(name.lower() for name in NAMES)}
        usable = {name for name, each in found.items() if each.usable}
        assert usable == {"posix", "plain", "slow"}
        assert all(each.remedy for each in found.values() if not each.usable)
        assert choice.name in {"posix", "plain"}
        assert choice.reason.startswith(choice.name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("vendor")
    def test_where_nothing_can_be_tried_it_is_ours(self, tmp_path):
        choice = choose_mover("auto", tmp_path / "none", LIMITS)
        assert choice.name == "posix"
        assert not any(each.usable for each in choice.candidates)


def _candidates(**speeds):
    return [
        Candidate(name, usable=speed > 0, why=name, gb_per_s=speed or None)
        for name, speed in speeds.items()
    ]


class TestDecide:
    @pytest.mark.parametrize(
        ("setting", "speeds", "name", "auto"),
        [
            ("auto", {"posix": 2.0, "nixl": 2.4}, "posix", None),
            ("auto", {"posix": 2.0, "nixl": 2.6}, "nixl", None),
            ("auto", {"posix": 0, "nixl": 0.1}, "nixl", None),
            ("auto", {"posix": 0, "nixl": 0}, None, None),
            ("posix", {"posix": 2.0, "nixl": 2.6}, "posix", "nixl"),
            ("nixl", {"posix": 2.0, "nixl": 0.1}, "nixl", "posix"),
            ("nixl", {"posix": 2.0, "nixl": 0}, None, "posix"),
        ],
    )
    def test_the_setting_wins_and_what_auto_would_take_is_told(self, setting, speeds, name, auto):
        choice = decide(setting, _candidates(**speeds))
        assert choice.name == name
        if auto:
            assert f"auto would take {auto}" in choice.reason


def test_a_mover_that_hangs_does_not_spoil_the_others(vendor, tmp_path, monkeypatch):
    del vendor
    monkeypatch.setattr(mover, "_TIMEOUT_S", 0.3)
    silent, plain = try_movers(["silent", "plain"], [tmp_path], LIMITS)
    assert (silent.usable, plain.usable) == (False, True)
