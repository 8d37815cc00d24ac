"""Backends by name, plug-ins from other packages, and the choice with its reason."""

from __future__ import annotations

import sys

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.transfer import registry
from kvstrata.transfer.backends.memcpy import MemcpyBackend
from kvstrata.transfer.registry import Candidate, backend_names, choose, make_backend

PLUGIN = """
import time
from kvstrata.core.errors import ConfigError
from kvstrata.transfer.backends.memcpy import MemcpyBackend

class Slow(MemcpyBackend):
    def move(self, op, source, target):
        time.sleep(0.01)
        super().move(op, source, target)

class Broken(MemcpyBackend):
    def move(self, op, source, target):
        raise OSError("the card is out")

class Odd(MemcpyBackend):
    def submit(self, *given):
        raise LookupError("odd")

class Verbless:
    def __init__(self, *, notify):
        pass

class Boastful(MemcpyBackend):
    def capabilities(self):
        return {("memory", "moon"), ("memory", "memory")}

class Sealing(Slow):
    def capabilities(self):
        return [("file", "sealed memory"), ("memory", "memory")]

class Silent(MemcpyBackend):
    def capabilities(self):
        return []

class Twice(MemcpyBackend):
    pass

number = 7

def refuses(*, notify):
    raise ConfigError("vendor: no card", hint="plug one in")

def raises(*, notify):
    raise LookupError("what")
"""
ENTRIES = (
    *("Slow", "Broken", "Odd", "Verbless", "refuses", "raises", "absent"),
    *("Boastful", "Silent", "Sealing", "Twice", "number"),
)


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A package beside ours, as pip would leave it."""
    (tmp_path / "vendor_kv.py").write_text(PLUGIN)
    info = tmp_path / "vendor_kv-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-kv\nVersion: 1.0\n")
    lines = [f"{name.lower()} = vendor_kv:{name}" for name in ENTRIES]
    lines.append("memcpy = vendor_kv:Slow")
    (info / "entry_points.txt").write_text("\n".join(["[kvstrata.backends]", *lines, ""]))
    other = tmp_path / "other_kv-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-kv\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[kvstrata.backends]\ntwice = vendor_kv:Twice\n")
    monkeypatch.delitem(sys.modules, "vendor_kv", raising=False)  # another test may have had one
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def only_memory(monkeypatch):
    """Leave NIXL and files out: what is chosen then does not depend on the machine."""
    monkeypatch.setattr(registry, "SHIPPED", {"memcpy": MemcpyBackend})


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown backend 'carrier'") as refusal:
        make_backend("carrier")
    assert "memcpy, posix, nixl" in refusal.value.hint


@pytest.mark.usefixtures("plugins")
def test_plugins_join_and_cannot_take_a_shipped_name():
    assert backend_names()[:3] == ["memcpy", "posix", "nixl"]
    assert sorted(backend_names()[3:]) == sorted(name.lower() for name in ENTRIES)
    for name, kind in (("slow", "Slow"), ("sealing", "Sealing"), ("memcpy", "MemcpyBackend")):
        backend = make_backend(name)
        assert type(backend).__name__ == kind
        backend.close()


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("verbless", "has no submit, poll, cancel, capabilities, close"),
        ("refuses", "vendor: no card"),
        ("raises", r"'raises' of vendor-kv 1\.0 .* cannot be made: LookupError: what"),
        ("absent", r"'absent' of vendor-kv 1\.0 .* cannot be imported"),
        ("number", r"'number' of vendor-kv 1\.0 .* is a int and cannot be called"),
        ("boastful", r"Boastful\) declares \('memory', 'moon'\) as capabilities"),
        ("silent", r"declares nothing as capabilities"),
        ("twice", r"'twice' is offered by other-kv 2\.0 and vendor-kv 1\.0"),
    ],
)
def test_plugins_that_are_none_are_refused(name, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        make_backend(name)
    assert refusal.value.hint


@pytest.mark.usefixtures("plugins", "only_memory")
def test_the_choice_names_everybody_and_why_not():
    (choice,) = choose([("memory", "memory")])
    assert choice.name == "memcpy"
    assert choice.reason.startswith("memcpy moved ")
    found = {each.name: each for each in choice.candidates}
    assert found["slow"].usable
    assert found["slow"].gb_per_s < found["memcpy"].gb_per_s
    assert (found["broken"].usable, found["broken"].why) == (False, "broken: the card is out")
    assert (found["odd"].usable, found["odd"].why) == (False, "odd: odd")
    assert (found["refuses"].why, found["refuses"].remedy) == ("vendor: no card", "plug one in")
    assert not found["verbless"].usable


@pytest.mark.usefixtures("only_memory")
def test_a_pair_that_nobody_moves():
    (choice,) = choose([("peer", "memory")])
    assert (choice.name, choice.candidates) == (None, ())
    assert choice.reason == "no backend here moves this"


def _candidates(**speeds):
    return [Candidate(name, usable=True, why=name, gb_per_s=each) for name, each in speeds.items()]


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({"a": 1.0, "b": 1.2}, "a"),
        ({"a": 1.0, "b": 1.3}, "b"),
        ({"a": 1.0, "b": 1.3, "c": 1.5}, "b"),
        ({"a": 2.0, "b": 1.0}, "a"),
    ],
)
def test_the_earlier_one_is_kept_unless_another_is_clearly_faster(speeds, best):
    choice = registry._choose(("memory", "memory"), _candidates(**speeds))
    assert choice.name == best
    assert choice.reason.startswith(best)
