"""What other packages offer by entry point: found, named with its distribution, and loaded.

A group is one seam; an entry's name is the word that configuration uses. Two distributions that
offer one name are both refused, since which of them came first would be luck.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from kvstrata.core.errors import ConfigError

__all__ = ["Plugin", "check_verbs", "find_plugin", "load_plugin", "plugins", "said"]

_TEXT_MAX: Final = 300


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point of one distribution."""

    name: str
    """The word of configuration."""
    distribution: str
    """The package that offers it, as pip calls it."""
    version: str
    """Version of that package."""
    entry: EntryPoint
    """Where it is in that package."""

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution} {self.version} ({self.entry.value})"


def plugins(group: str) -> dict[str, list[Plugin]]:
    """Return by name what is installed for `group`; more than one of a name is a clash."""
    found: dict[str, list[Plugin]] = {}
    for entry in entry_points(group=group):
        distribution = entry.dist.name if entry.dist else "an unknown package"
        version = entry.dist.version if entry.dist else "?"
        found.setdefault(entry.name, []).append(Plugin(entry.name, distribution, version, entry))
    return dict(sorted(found.items()))


def find_plugin(group: str, name: str, *, what: str, known: Iterable[str] = ()) -> Plugin:
    """Return the plug-in of this name; `what` says in errors what it would be.

    Raises ConfigError for a name nobody offers, which lists `known` and what is installed, and for
    one that several distributions offer.
    """
    found = plugins(group)
    offers = found.get(name, [])
    if not offers:
        names = ", ".join([*known, *(each for each in found if each not in set(known))])
        raise ConfigError(
            f"{what}: unknown {what} {name!r}",
            hint=f"known here: {names or 'none'}; pip install, into this environment, the package "
            f"that offers {name!r} in the entry-point group {group}",
        )
    if len(offers) > 1:
        owners = " and ".join(sorted(f"{each.distribution} {each.version}" for each in offers))
        raise ConfigError(
            f"{what}: {name!r} is offered by {owners}", hint="uninstall all of them but one"
        )
    return offers[0]


def load_plugin(plugin: Plugin, *, what: str) -> Any:
    """Import what `plugin` names; raises ConfigError that says whose fault it is."""
    try:
        loaded = plugin.entry.load()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{what}: plug-in {plugin} cannot be imported: {said(error)}",
            hint=f"mend, update or uninstall {plugin.distribution}",
        ) from error
    if not callable(loaded):
        raise ConfigError(
            f"{what}: plug-in {plugin} is a {type(loaded).__name__} and cannot be called",
            hint=f"mend the entry point of {plugin.distribution}: it names a class or a function",
        )
    return loaded


def check_verbs(
    made: object, verbs: Iterable[str], plugin: Plugin, *, what: str, page: str
) -> None:
    """Raise ConfigError unless `made`, which `plugin` returned, has all of these methods."""
    missing = [verb for verb in verbs if not callable(getattr(made, verb, None))]
    if missing:
        raise ConfigError(
            f"{what}: plug-in {plugin} returned a {type(made).__name__}, which has no "
            f"{', '.join(missing)}",
            hint=f"implement the whole seam, see docs/contracts/{page}",
        )


def said(error: BaseException) -> str:
    """Return an error of somebody else's code as one short line, even if it cannot be printed."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  # its own __str__ may be what is broken
        text = ""
    kind = type(error).__name__
    return f"{kind}: {text[:_TEXT_MAX]}" if text else kind
