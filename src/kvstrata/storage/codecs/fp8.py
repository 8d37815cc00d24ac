"""Lossy: elements as float8 e4m3 with one scale for each 128 of them. Opt-in, never a default.

    scales, float32 each | codes, one byte each

With s the scale of its group (its largest magnitude / 448), each element x comes back as x' with

    |x - x'| <= max(RELATIVE_ERROR_MAX * |x|, s / 1024 * (1 + RELATIVE_ERROR_MAX)) + t / 2

where t is the smallest number of the element type above zero (2**-24 in float16): what comes back
is rounded to a multiple of it, which matters to subnormal elements only. `measure_error` checks and
prints the bound for real blocks. A block with a NaN or an infinity is not encoded. The seal of a
block stored this way is over the bytes that come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.storage.codecs.base import BlockFacts, BytesLike, CodecSettings

__all__ = ["GROUP", "RELATIVE_ERROR_MAX", "Fp8Codec", "Fp8Error", "measure_error"]

GROUP: Final = 128
"""Elements that share a scale."""
RELATIVE_ERROR_MAX: Final = 2.0**-4 + 2.0**-7
"""Half a step of e4m3's three mantissa bits, and the roundings to and from it."""

_CODE_MAX: Final = 448.0
_STEP_MIN: Final = 1 / 1024  # half of the smallest e4m3 number
_TINY: Final = np.finfo(np.float32).tiny
_DTYPES: Final = frozenset({"bfloat16", "float16", "float32"})


class Fp8Codec:
    """Scaled float8."""

    name = "fp8"
    lossy = True
    authentic = False

    def __init__(self, settings: CodecSettings) -> None:
        """Raise ConfigError for element types that are no wide floats, or without the library."""
        if settings.dtype not in _DTYPES:
            raise ConfigError(
                f"codec fp8: blocks of {settings.dtype} gain nothing from it",
                hint=f"use it for {', '.join(sorted(_DTYPES))}, or use zstd",
            )
        try:
            import ml_dtypes
        except ImportError as error:
            raise ConfigError(
                "codec fp8: ml_dtypes is not installed", hint="pip install 'kvstrata[codecs]'"
            ) from error
        self._dtype = np.dtype(
            ml_dtypes.bfloat16 if settings.dtype == "bfloat16" else settings.dtype
        )

    def label(self, facts: BlockFacts) -> str:
        """Return the name; the layout tells the element type."""
        del facts
        return self.name

    def reads(self, label: str, facts: BlockFacts) -> bool:
        """Return whether it is the name."""
        del facts
        return label == self.name

    def stored_bytes_max(self, raw_bytes: int) -> int:
        """Return the length, which is always the same."""
        elements = -(-raw_bytes // self._dtype.itemsize)
        return 4 * -(-elements // GROUP) + elements

    def encode(self, raw: memoryview, item_bytes: int, facts: BlockFacts) -> BytesLike:
        """Scale and round."""
        del facts
        if item_bytes != self._dtype.itemsize or len(raw) % item_bytes:
            raise TransferError(f"fp8: {len(raw)} bytes are not {self._dtype}s", retryable=False)
        values = np.frombuffer(raw, self._dtype).astype(np.float32)
        groups = np.zeros((-(-len(values) // GROUP), GROUP), np.float32)
        groups.reshape(-1)[: len(values)] = values
        largest = np.abs(groups).max(axis=1)
        if not np.isfinite(largest).all():
            raise TransferError("fp8: the block holds NaN or infinity", retryable=False)
        scales = np.maximum(largest / np.float32(_CODE_MAX), _TINY).astype("<f4")
        # Through float16, whose bits are the index of a table: no library rounds as fast.
        halves = (groups / scales[:, None]).astype(np.float16)
        codes = _codes()[halves.view(np.uint16).reshape(-1)[: len(values)]]
        return b"".join([scales.tobytes(), codes.tobytes()])

    def decode(self, stored: memoryview, into: memoryview, facts: BlockFacts) -> int:
        """Look up and scale."""
        length = facts.raw_bytes
        elements, rest = divmod(length, self._dtype.itemsize)
        if rest or length > len(into) or len(stored) != self.stored_bytes_max(length):
            raise ChecksumError(f"fp8: {len(stored)} bytes are not an encoding of {length}")
        groups = -(-elements // GROUP)
        scales = np.frombuffer(stored, "<f4", groups)
        if not (np.isfinite(scales) & (scales >= _TINY)).all():
            raise ChecksumError("fp8: a scale is no scale")
        values = np.zeros((groups, GROUP), np.float32)
        flat = values.reshape(-1)[:elements]
        np.take(_values(), np.frombuffer(stored, np.uint8, elements, 4 * groups), out=flat)
        if np.isnan(flat).any():  # two of the 256 codes, which we never write
            raise ChecksumError("fp8: a code is no number")
        limit = _largest(self._dtype)
        with np.errstate(over="ignore"):
            values *= scales[:, None]
        np.clip(values, -limit, limit, out=values)
        np.copyto(np.frombuffer(into, np.uint8, length), flat.astype(self._dtype).view(np.uint8))
        return length


@dataclass(frozen=True, slots=True)
class Fp8Error:
    """What one block lost."""

    relative_max: float
    """Largest |x - x'| / |x| among normal numbers above their group's smallest step."""
    root_mean_square: float
    """Root of the mean square of x - x', over that of x."""
    within_bound: bool
    """Whether every element obeys the bound that the module states."""

    def __str__(self) -> str:
        verdict = "within" if self.within_bound else "ABOVE"
        return (
            f"fp8 error: at most {self.relative_max:.2%} of an element ({verdict} the bound of "
            f"{RELATIVE_ERROR_MAX:.2%}), {self.root_mean_square:.2%} root mean square"
        )


def measure_error(codec: Fp8Codec, raw: memoryview, facts: BlockFacts) -> Fp8Error:
    """Encode and decode one block and return what it lost."""
    item = codec._dtype.itemsize  # noqa: SLF001  measures this very class
    back = bytearray(len(raw))
    codec.decode(memoryview(codec.encode(raw, item, facts)), memoryview(back), facts)
    before = np.frombuffer(raw, codec._dtype).astype(np.float64)  # noqa: SLF001
    after = np.frombuffer(back, codec._dtype).astype(np.float64)  # noqa: SLF001
    padded = np.zeros(-(-len(before) // GROUP) * GROUP)
    padded[: len(before)] = np.abs(before)
    scales = np.maximum(padded.reshape(-1, GROUP).max(axis=1) / _CODE_MAX, _TINY)
    floor = np.repeat(scales, GROUP)[: len(before)] * _STEP_MIN
    error, size = np.abs(before - after), np.abs(before)
    normal, subnormal = _smallest(codec._dtype)  # noqa: SLF001
    bound = np.maximum(RELATIVE_ERROR_MAX * size, floor * (1 + RELATIVE_ERROR_MAX)) + subnormal / 2
    counted = (size * RELATIVE_ERROR_MAX >= floor) & (size >= normal)
    relative = float((error[counted] / size[counted]).max(initial=0.0))
    power = float(np.sqrt((size**2).mean())) or 1.0
    return Fp8Error(
        relative, float(np.sqrt((error**2).mean())) / power, bool((error <= bound).all())
    )


@cache
def _codes() -> Any:
    """Return the e4m3 code of each of the 65,536 float16 numbers."""
    import ml_dtypes

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.clip(halves, -_CODE_MAX, _CODE_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@cache
def _values() -> Any:
    """Return the number of each of the 256 codes."""
    import ml_dtypes

    return np.arange(1 << 8, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@cache
def _largest(dtype: Any) -> Any:
    import ml_dtypes

    return np.float32(ml_dtypes.finfo(dtype).max)


def _smallest(dtype: Any) -> tuple[float, float]:
    """Return the smallest normal and the smallest subnormal number."""
    import ml_dtypes

    about = ml_dtypes.finfo(dtype)
    return float(about.smallest_normal), float(about.smallest_subnormal)
