"""Lines of a JSONL file as checked records; every complaint names file, line and field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvstrata.sim.traces.model import TraceError

__all__ = ["Progress", "first_record", "records"]

Progress = Callable[[int], None]
"""Told of bytes read since it was last told."""

RecordT = TypeVar("RecordT", bound=msgspec.Struct)

_REPORT_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


def records(
    path: Path, kind: type[RecordT], progress: Progress | None = None, *, skip: int = 0
) -> Iterator[tuple[int, RecordT]]:
    """Yield (line number, record) behind the first `skip` lines.

    Raises TraceError at the first line that is not a `kind`.
    """
    decode = msgspec.json.Decoder(kind).decode
    unsaid = 0
    for number, line in islice(_lines(path), skip, None):
        try:
            record = decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _broken(path, number, line, error) from error
        except UnicodeDecodeError as error:
            raise TraceError(
                f"{path.name}, line {number}: not UTF-8 ({error.reason} at byte {error.start})",
                hint="convert the file to UTF-8",
            ) from error
        yield number, record
        unsaid += len(line)
        if progress and unsaid >= _REPORT_BYTES:
            progress(unsaid)
            unsaid = 0
    if progress:
        progress(unsaid)


def first_record(path: Path) -> dict[str, Any] | list[Any]:
    """Return the first line as a JSON object or a list that is not empty; else TraceError."""
    for number, line in _lines(path):
        try:
            found = msgspec.json.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _broken(path, number, line, error) from error
        if not isinstance(found, dict | list) or found == []:
            raise TraceError(
                f"{path.name}, line {number}: {type(found).__name__} where a record must be",
                hint="a trace has one JSON object, or one batch of events, a line",
            )
        return found
    raise TraceError(f"{path.name}: the file is empty", hint="give a trace with requests in it")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                if text:
                    yield number, text
    except OSError as error:
        raise TraceError(
            f"trace: cannot read {str(path)!r} ({error.strerror})", hint="name a readable file"
        ) from error


def _broken(path: Path, number: int, line: bytes, error: Exception) -> TraceError:
    cut_off = not line.endswith(b"}")
    hint = "the line looks cut off: fetch the file again" if cut_off else "mend or drop the line"
    return TraceError(f"{path.name}, line {number}: {error}", hint=hint)
