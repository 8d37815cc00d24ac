"""The tree of errors, pinned: who catches a parent must know what it will get."""

from __future__ import annotations

import inspect

import pytest

from kvstrata.core import errors

TREE = {
    "KvstrataError": "Exception",
    "ConfigError": "KvstrataError",
    "LayoutError": "ConfigError",
    "CapacityError": "KvstrataError",
    "TransferError": "KvstrataError",
    "ChecksumError": "TransferError",
    "DaemonError": "KvstrataError",
    "DaemonGoneError": "DaemonError",
    "CallTimeoutError": "DaemonError",
    "CallRefusedError": "DaemonError",
}


def test_shape() -> None:
    found = {
        name: kind.__bases__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }
    assert {name: [base.__name__ for base in bases] for name, bases in found.items()} == {
        name: [parent] for name, parent in TREE.items()
    }
    assert sorted(errors.__all__) == sorted(TREE)


def test_the_docstring_draws_it() -> None:
    drawn: dict[str, str] = {}
    parents = {0: "Exception"}
    for line in errors.__doc__.splitlines():
        bullet = line.lstrip()
        if bullet[:2] in {"* ", "+ ", "- "}:
            depth = (len(line) - len(bullet)) // 2
            name = bullet[2:].split()[0]
            drawn[name] = parents[depth]
            parents[depth + 1] = name
    assert drawn == TREE


def test_what_they_carry() -> None:
    config = errors.LayoutError("x: is wrong", hint="do y")
    assert (config.message, config.hint, str(config)) == (
        "x: is wrong",
        "do y",
        "x: is wrong (hint: do y)",
    )
    assert str(errors.ConfigError("x: is wrong")) == "x: is wrong"
    capacity = errors.CapacityError("full", requested=3, available=1)
    assert (capacity.requested, capacity.available) == (3, 1)
    assert errors.TransferError("slow", retryable=True).retryable
    assert not errors.ChecksumError("bad").retryable


@pytest.mark.parametrize("name", errors.__all__)
def test_each_says_when(name) -> None:
    assert getattr(errors, name).__doc__.strip().endswith(".")
