"""Keyed stores that other packages bring, found by entry point: `store:NAME:URL:SIZE`.

An entry is a class or a function that takes one `StoreRequest` and returns a `KeyedStore`. If it
has an attribute `check`, that is called with the URL when the daemon starts, long before the
first client says which layout is to be stored. See docs/guides/write-a-store.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from kvstrata.core.errors import ConfigError
from kvstrata.core.plugins import Plugin, check_verbs, find_plugin, load_plugin, said
from kvstrata.layout import BlockLayout
from kvstrata.storage.checked import CheckedStore
from kvstrata.storage.deadline import HelperThreads, LateError
from kvstrata.storage.keyed import KeyedStore

__all__ = ["ENTRY_POINTS", "StoreRequest", "check_plugged", "open_plugged", "open_unchecked"]

ENTRY_POINTS: Final = "kvstrata.stores"
"""Entry point group; each entry makes a `KeyedStore` of a `StoreRequest`."""

_WHAT: Final = "tiers.store"
_PAGE: Final = "keyed-store.md"
_ARGUMENTS: Final[Mapping[str, int]] = {
    "put": 3,
    "get": 3,
    "peek": 1,
    "exists": 1,
    "delete": 1,
    "entries": 0,
    "statistics": 0,
    "close": 0,
}
"""The methods of a store, and how many arguments each is called with."""


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """What a store is opened with. Later versions may say more; none will say less."""

    url: str
    """Where, as the operator wrote it; never a password in it."""
    layout: BlockLayout
    """What every block in it has; keep layouts apart, best by `layout.fingerprint`."""
    capacity_bytes: int
    """How much this daemon will keep there; it deletes what is too much itself."""
    timeout_s: float
    """Longest time that one call may take."""


def check_plugged(name: str, url: str) -> None:
    """Raise ConfigError for a plug-in that cannot be used, or a URL that it refuses."""
    plugin, make = _load(name)
    try:
        password = urlsplit(url).password
    except ValueError:
        password = None  # no URL as the standard has them: the plug-in knows what it is
    if password is not None:
        raise ConfigError(
            f"{_WHAT}: the URL for {name!r} carries a password",
            hint=f"everybody on this machine could read it; {plugin.distribution} says where it "
            "takes passwords from",
        )
    check = getattr(make, "check", None)
    if callable(check):
        _ours(plugin, "refuses its URL", lambda: check(url))


def open_plugged(name: str, request: StoreRequest) -> KeyedStore:
    """Return the store, behind a `CheckedStore`; raises ConfigError within `timeout_s`, or so."""
    plugin, _ = _load(name)
    threads = HelperThreads(f"store-{name}")
    try:
        with threads.one() as helper:
            store = helper.call(lambda: open_unchecked(name, request), 2 * request.timeout_s)
            label = f"store {name} ({plugin.distribution} {plugin.version})"
            return CheckedStore(store, label, timeout_s=request.timeout_s, threads=threads)
    except LateError as error:
        threads.close()
        raise ConfigError(
            f"{_WHAT}: plug-in {plugin} does not open its store: {error}",
            hint="check that what the URL names can be reached",
        ) from None
    except BaseException:
        threads.close()
        raise


def open_unchecked(name: str, request: StoreRequest) -> KeyedStore:
    """Return the plug-in's store itself, as its tests want it; raises ConfigError."""
    plugin, make = _load(name)
    made = _ours(plugin, "cannot open its store", lambda: make(request))
    check_verbs(made, _ARGUMENTS, plugin, what=_WHAT, page=_PAGE)
    wrong = [*_wrong_signatures(made), *_wrong_properties(made)]
    if wrong:
        raise ConfigError(
            f"{_WHAT}: plug-in {plugin} returned a {type(made).__name__} {'; '.join(wrong)}",
            hint=f"mend or update {plugin.distribution}; the seam is in docs/contracts/{_PAGE}",
        )
    store: KeyedStore = made
    return store


def _load(name: str) -> tuple[Plugin, Callable[..., Any]]:
    plugin = find_plugin(ENTRY_POINTS, name, what="store")
    return plugin, load_plugin(plugin, what=_WHAT)


def _ours(plugin: Plugin, what: str, call: Callable[[], Any]) -> Any:
    """Return what `call` of the plug-in returns; a ConfigError is its own, others say whose."""
    try:
        return call()
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(
            f"{_WHAT}: plug-in {plugin} {what}: {said(error)}",
            hint=f"mend or update {plugin.distribution}, or report it there",
        ) from error


def _wrong_signatures(made: object) -> list[str]:
    wrong = []
    for verb, count in _ARGUMENTS.items():
        try:
            inspect.signature(getattr(made, verb)).bind(*range(count))
        except TypeError:
            wrong.append(f"whose {verb} does not take {count} arguments")
        except ValueError:  # code without a signature, as in C: its first call will tell
            continue
    return wrong


def _wrong_properties(made: Any) -> list[str]:
    wrong = []
    try:
        exclusive, capacity = made.exclusive, made.capacity_bytes
    except Exception as error:  # noqa: BLE001  # a property may raise anything
        return [f"whose exclusive or capacity_bytes cannot be read ({said(error)})"]
    if not isinstance(exclusive, bool):
        wrong.append(f"whose exclusive is {type(exclusive).__name__}, not True or False")
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        wrong.append("whose capacity_bytes is neither None nor a number of bytes")
    return wrong
