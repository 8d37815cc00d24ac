"""`kvstrata ls`, `verify` and `gc`: what the command line makes of what inspections find."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvstrata.core.config import parse_bytes
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import NO_TAG
from kvstrata.runtime.secret import lossy_secret, read_secret
from kvstrata.storage.codecs.chain import SHIPPED
from kvstrata.storage.inspection import (
    Checked,
    FoundBlock,
    GcOptions,
    Inspected,
    Verdict,
    open_place,
    reclaim,
)

__all__ = ["list_blocks", "reclaim_place", "verify_place"]

_FAULTS: Final = frozenset({Verdict.BAD, Verdict.UNREADABLE})
_FINGERPRINT_BYTES: Final = 16
ItemT = TypeVar("ItemT")
_HEAD: Final = f"{'key':13}{'place':14}{'bytes':>12}{'block':>12}  {'codec':14}{'namespace':17}"


def list_blocks(place: str, *, as_json: bool) -> None:
    """Print a line for each block as it is found, then a summary."""
    with open_place(place) as stores:
        for store in stores:
            _list(store, as_json=as_json)


def verify_place(place: str, secret_file: Path | None, *, quarantine: bool, as_json: bool) -> int:
    """Read everything again, print what is bad; return 1 if something is."""
    secrets = _secrets(secret_file)
    bad = 0
    with open_place(place, alone=True, write=quarantine, secrets=secrets) as stores:
        for store in stores:
            counts: Counter[Verdict] = Counter()
            quarantined = 0
            with _progress(f"verify {store.kind}", store.verify(), store) as checks:
                for checked in checks:
                    counts[checked.verdict] += 1
                    if checked.verdict not in _FAULTS:
                        continue
                    if quarantine and checked.verdict is Verdict.BAD:
                        store.quarantine(checked)
                        quarantined += 1
                    _write(_told(store, checked, as_json=as_json))
            found = sum(counts[each] for each in _FAULTS)
            bad += found
            total: dict[str, Any] = {each.value.replace(" ", "_"): counts[each] for each in Verdict}
            if as_json:
                _write(json.dumps(_summary(store, total | {"quarantined": quarantined})))
                continue
            parts = [f"{count} {each.value}" for each, count in counts.items() if count]
            gone = [f"{quarantined} quarantined"] if quarantined else []
            _write(f"{store.kind} {store.name}: {', '.join(parts + gone) or 'empty'}")
            for note in store.notes():
                _write(f"  {note}")
    return int(bad > 0)


def reclaim_place(
    place: str, keep: Sequence[str], size: str | None, *, dry_run: bool, as_json: bool
) -> None:
    """Remove what nobody uses, print each thing, then the sum."""
    size_bytes = None if size is None else parse_bytes(size, field="size")
    options = GcOptions(tuple(map(_fingerprint, keep)), size_bytes, dry_run)
    count = total = 0
    with _progress("gc", reclaim(place, options)) as found:
        for each in found:
            count, total = count + each.count, total + each.size_bytes
            if as_json:
                fields = {"what": each.what, "name": each.name, "count": each.count}
                record = {"type": "reclaimed", **fields, "bytes": each.size_bytes}
                _write(json.dumps(record))
            elif each.count:
                _write(f"{each.what}: {each.count}, {each.size_bytes} bytes  {each.name}")
    if as_json:
        summary = {"type": "summary", "count": count, "bytes": total, "dry_run": dry_run}
        _write(json.dumps(summary))
    elif not count:
        _write("nothing to reclaim")
    else:
        _write(f"{'would reclaim' if dry_run else 'reclaimed'} {total} bytes")


def _list(store: Inspected, *, as_json: bool) -> None:
    if not as_json:
        _write(f"{store.kind} {store.name}")
        _write(f"layout {store.fingerprint.hex()}  {store.description}")
        _write(f"{_HEAD}{'tenant':17}written")
    blocks = stored_bytes = faulty = 0
    with _progress(f"ls {store.kind}", store.blocks(), store, listed=True) as found:
        for block in found:
            blocks, stored_bytes = blocks + 1, stored_bytes + block.stored_bytes
            faulty += bool(block.fault)
            _write(json.dumps(_record(store, block)) if as_json else _line(block))
    total = {"blocks": blocks, "stored_bytes": stored_bytes, "faulty_headers": faulty}
    if as_json:
        _write(json.dumps(_summary(store, total)))
        return
    notes = [f"{faulty} with a header that is not to be believed"] if faulty else []
    told = "; ".join([*notes, *store.notes()])
    _write(f"{blocks} blocks, {stored_bytes} bytes" + (f"; {told}" if told else ""))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # a million times: typer's echo is ten times slower


def _line(block: FoundBlock) -> str:
    key = "-" if block.key is None else block.key.hex()[:12]
    place = block.place.rpartition("/")[2]
    tags = [each.hex() if each != NO_TAG else "-" for each in (block.namespace, block.tenant)]
    where = place if len(place) < len("slot 00000000") else "-"
    codec = block.codec or f"({block.fault})"
    return (
        f"{key:13}{where:14}{block.stored_bytes:>12}{block.block_bytes:>12}  {codec:14}"
        f"{tags[0]:17}{tags[1]:17}{_when(block)}"
    )


def _when(block: FoundBlock) -> str:
    if block.used_s is None:
        return str(block.written)
    return datetime.fromtimestamp(block.used_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(store: Inspected, block: FoundBlock) -> dict[str, Any]:
    """Return one block as it is printed with --json."""
    return {
        "type": "block",
        "store": store.name,
        "layout": block.fingerprint.hex(),
        "key": None if block.key is None else block.key.hex(),
        "place": block.place,
        "stored_bytes": block.stored_bytes,
        "block_bytes": block.block_bytes,
        "codec": block.codec,
        "namespace": block.namespace.hex(),
        "tenant": block.tenant.hex(),
        "written": block.written,
        "used_s": block.used_s,
        "fault": block.fault,
    }


def _summary(store: Inspected, counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "summary",
        "kind": store.kind,
        "store": store.name,
        "layout": store.fingerprint.hex(),
        "description": store.description,
        **counts,
        "notes": store.notes(),
    }


def _told(store: Inspected, checked: Checked, *, as_json: bool) -> str:
    verdict, reason = checked.verdict.value, checked.reason
    if as_json:
        found = {**_record(store, checked.block), "verdict": verdict, "reason": reason}
        return json.dumps(found | {"type": "bad"})
    key = "" if checked.block.key is None else f" {checked.block.key.hex()}"
    return f"{verdict}: {store.kind} {store.name} {checked.block.place}{key}: {reason}"


@contextmanager
def _progress(
    what: str, items: Iterator[ItemT], store: Inspected | None = None, *, listed: bool = False
) -> Iterator[Iterator[ItemT]]:
    """Show a bar on stderr while items come, if somebody looks, and not at a list of them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    watched = sys.stdout.isatty()
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal or (listed and watched),
        redirect_stdout=watched,  # above the bar; elsewhere it would end on stderr, too
    ) as bar:
        task = bar.add_task(what, total=store.total if store else None)

        def counted() -> Iterator[ItemT]:
            for each in items:
                yield each
                bar.update(task, advance=1, total=store.total if store else None)

        yield counted()


def _secrets(path: Path | None) -> list[bytes]:
    """Return what blocks may be encrypted under: the secret, and what lossy tiers make of it."""
    if path is None:
        return []
    secret = read_secret(path, "secret_file")
    lossy = [name for name, codec in SHIPPED.items() if getattr(codec, "lossy", False)]
    return [secret, *(lossy_secret(secret, [name]) for name in lossy)]


def _fingerprint(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != _FINGERPRINT_BYTES:
        raise ConfigError(
            f"other_layouts: {text!r} is no layout's fingerprint",
            hint="`kvstrata ls` shows it: 32 characters of 0-9 and a-f",
        )
    return found
