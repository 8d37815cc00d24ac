"""Notices new weights in a running engine: what was kept under the old ones is no longer its KV.

SGLang empties its own caches then and tells its storage nothing. `watch` is an SGLang plug-in
(entry point group `sglang.srt.plugins`), so that it is there before anything can be updated.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, ClassVar

from kvstrata.connectors.identity import WEIGHT_SUFFIXES
from kvstrata.core.errors import LayoutError

__all__ = ["WeightWatch", "watch"]


class _Seen:
    """How often this process was about to update weights; one engine is one process."""

    count = 0
    from_start = False
    began = 0.0  # before the weights were loaded; 0 if that is not known
    names: ClassVar[dict[str, int]] = {}  # revision -> `count` when it was given first


def watch() -> None:
    """Count updates of weights in this process from now on; called by SGLang at its start."""
    _Seen.began = time.time()
    _install()
    _Seen.from_start = True


def _install() -> None:
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager as Updater,
    )

    # Every way to update asks it which runners to update, before it touches them. The ways
    # themselves are bound to SGLang's table of requests long before a storage is attached.
    original = getattr(Updater, "_select_runners", None)
    if original is None:
        raise LayoutError(
            "this SGLang updates weights in a way that kvstrata does not know",
            hint="use a tested version, see docs/guides/sglang.md",
        )
    if getattr(original, "counts_for_kvstrata", False):
        return

    @functools.wraps(original)
    def counted(*given: Any, **named: Any) -> Any:
        _Seen.count += 1
        return original(*given, **named)

    counted.counts_for_kvstrata = True  # type: ignore[attr-defined]  # a mark of ours
    Updater._select_runners = counted  # noqa: SLF001  # there is no public place that all pass


class WeightWatch:
    """What one attached storage knows of the weights that it was attached under."""

    def __init__(self, revision: str, model: str) -> None:
        """Begin at the weights at hand, which `revision` names if it is not empty.

        Raises LayoutError if they may not be those of the files of `model`, which would name them,
        or if the revision has named others.
        """
        _install()
        blind = not _Seen.from_start
        if not revision:
            self._refuse_changed_files(Path(model))
        elif _Seen.names.setdefault(revision, _Seen.count) != _Seen.count:
            raise LayoutError(
                f"weights_revision: {revision!r} has named other weights of this engine",
                hint="empty SGLang's caches, and give the weights at hand another name",
            )
        if (_Seen.count or blind) and not revision:
            what = "may have been" if blind else "were"
            raise LayoutError(
                f"weights_revision: the engine's weights {what} updated since it started, so its "
                "files do not name them",
                hint="set weights_revision in the extra config to a name of these weights"
                + (
                    ", or let SGLang load kvstrata's plug-in at its start: install the package, "
                    "and add kvstrata to SGLANG_PLUGINS if that is set"
                    if blind
                    else ""
                ),
            )
        self._count = _Seen.count

    def _refuse_changed_files(self, folder: Path) -> None:
        """Raise LayoutError if the files are no longer those that the engine has loaded."""
        files = folder.iterdir() if folder.is_dir() and _Seen.began else ()
        for path in files:
            if path.suffix in WEIGHT_SUFFIXES and path.stat().st_ctime > _Seen.began:
                raise LayoutError(
                    f"weights_revision: {path.name} has changed since the engine started",
                    hint="set weights_revision in the extra config to a name of the loaded weights",
                )

    @property
    def changed(self) -> bool:
        """Whether weights were updated, or an update was begun, since the attach."""
        return self._count != _Seen.count
