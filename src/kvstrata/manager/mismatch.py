"""Another namespace or another salt as the reason of a miss.

With another model, revision, KV dtype, geometry or salt nothing of a prompt hits, from its first
block on. The memory of which prompts were stored where is bounded, and ends with the daemon.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Final

from kvstrata.tokens import Namespace
from kvstrata.tokens.family import Family

__all__ = ["FAMILIES_MAX", "Families", "Home", "sentence"]

FAMILIES_MAX: Final = 1 << 16
"""Most prompts that are remembered."""
_HOMES_MAX: Final = 4  # of each, the last ones


Home = tuple[bytes, bytes]
"""Where a prompt was stored: tag of the namespace, tag of the salt."""


class Families:
    """Under which namespaces and salts the first block of a prompt was stored of late."""

    def __init__(self, limit: int = FAMILIES_MAX) -> None:
        """Remember so many prompts; what was stored longest ago is forgotten first."""
        self._limit = limit
        self._homes: OrderedDict[bytes, tuple[Home, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def note(self, family: Family, namespace: bytes) -> None:
        """Remember that a prompt was stored in a namespace."""
        home = (namespace, family.salt)
        others = tuple(each for each in self._homes.get(family.prompt, ()) if each != home)
        self._homes[family.prompt] = (home, *others)[:_HOMES_MAX]
        self._homes.move_to_end(family.prompt)
        if len(self._homes) > self._limit:
            self._homes.popitem(last=False)

    def find(self, family: Family, namespace: bytes, *, across_salts: bool) -> Home | None:
        """Return where else a prompt was stored; under other salts only if that may be told."""
        homes = self._homes.get(family.prompt, ())
        for home in homes:
            if home[1] == family.salt and home[0] != namespace:
                return home
        if across_salts:
            for home in homes:
                if home[1] != family.salt:
                    return home
        return None


def sentence(home: Home, namespace: bytes, known: Callable[[bytes], Namespace | None]) -> str:
    """Return in words where a prompt was stored, seen from one who asked in `namespace`."""
    if home[0] == namespace:
        return "stored under another salt"
    theirs, ours = known(home[0]), known(namespace)
    if theirs is None or ours is None:
        return "stored under another namespace"
    different = [
        f"{field.name.replace('_', ' ')} {getattr(theirs, field.name)!r}, "
        f"not {getattr(ours, field.name)!r}"
        for field in fields(Namespace)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    return f"stored under another namespace ({'; '.join(different)})"
