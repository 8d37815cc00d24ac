"""The canary: before any block of a prompt, a made-up one goes to the daemon and comes back."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Final

import torch

from kvstrata.connectors.trtllm.desk import Desk
from kvstrata.connectors.trtllm.jobs import LoadJob, PageCopy, SaveJob
from kvstrata.connectors.trtllm.pages import EnginePages
from kvstrata.core.errors import DaemonError, LayoutError
from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session

__all__ = ["fly_canary"]

log = logging.getLogger("kvstrata.trtllm")

_NAME: Final = "canary"
_WAIT_S: Final = 10.0
_POLL_S: Final = 0.001


def fly_canary(session: Session, desk: Desk, pages: EnginePages) -> bool:
    """Store made-up bytes from the engine's first pages, load them back, and compare bit for bit.

    What the pages held is put back. Returns False if the daemon had no room or was not heard;
    raises LayoutError if what came back is not what was written.
    """
    places = session.layout.block_tokens // pages.page_tokens
    if any(pages.count(group) < places for group in range(pages.groups)):
        raise LayoutError(
            f"the engine has fewer pages than the {places} of one block",
            hint="set block_tokens to tokens_per_block, or give the engine more memory",
        )
    before = [region.rows[:places].clone() for region in pages.regions]
    sent = [torch.frombuffer(bytearray(_random(rows)), dtype=torch.uint8) for rows in before]
    key = SequenceHash(secrets.token_bytes(HASH_BYTES))
    numbers = list(range(places))
    try:
        _write(pages, places, sent)
        reserved = session.reserve(_NAME, None, [key])
        if not reserved.slots:
            log.warning("kvstrata's canary was not stored: no room")
            return False
        slots = reserved.slots * places
        copy = PageCopy(slots, numbers, [numbers] * pages.groups)
        if not _carry_out(desk, SaveJob(-1, -1, session.epoch, copy)):
            session.abort(_NAME, reserved.slots)
            raise _odd("a page could not be read")
        session.seal(_NAME, reserved.slots)
        acquired = _acquire(session, key)
        if acquired is None:
            log.warning("kvstrata's canary was stored and not found again")
            return False
        _write(pages, places, [torch.zeros_like(each) for each in sent])
        copy = PageCopy(acquired.slots * places, numbers, [numbers] * pages.groups)
        generations = acquired.generations * places
        load = LoadJob(-2, -1, session.epoch, copy, generations, background=False)
        if not _carry_out(desk, load):
            raise _odd("a page could not be written")
        found = [region.rows[:places].cpu().reshape(-1) for region in pages.regions]
        if not all(torch.equal(one, other) for one, other in zip(found, sent, strict=True)):
            raise _odd("pages that were stored and loaded came back with other bytes")
        session.release([_NAME])
        session.call(wire.Forget(key), wire.Cleared)
    except DaemonError as error:
        log.warning("kvstrata's canary did not come back in time: %s", error)
        return False
    finally:
        _write(pages, places, [each.cpu().reshape(-1) for each in before])
    return True


def _acquire(session: Session, key: SequenceHash) -> wire.Acquired | None:
    """Wait until the block is sealed, and hold it; None if it is not there in time."""
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        if session.lookup(_NAME, [key]).ready:
            acquired = session.acquire(_NAME, [key])
            if acquired.slots:
                return acquired
        time.sleep(_POLL_S)
    return None


def _carry_out(desk: Desk, job: SaveJob | LoadJob) -> bool:
    desk.carry_out(job)
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        for report in desk.take_reports():
            if report.job == job.id:
                return report.done
        time.sleep(_POLL_S)
    return False


def _write(pages: EnginePages, places: int, rows: list[torch.Tensor]) -> None:
    for region, given in zip(pages.regions, rows, strict=True):
        region.rows[:places] = given.reshape(places, -1).to(region.rows.device)
    if pages.device.type == "cuda":
        torch.cuda.synchronize(pages.device)  # the thread reads them on a stream of its own


def _random(rows: torch.Tensor) -> bytes:
    return secrets.token_bytes(rows.numel())


def _odd(what: str) -> LayoutError:
    return LayoutError(
        f"canary: {what}",
        hint="this TensorRT-LLM's pages are not as kvstrata knows them; run without the connector",
    )
