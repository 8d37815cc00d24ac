"""Codecs one after the other, as `zstd+aes`, and which blocks a chain agrees to read.

A header records the chain that a block was written with. A reader takes it if it has every codec
of it and the key, with two exceptions: blocks that lost something are read only by a chain that
is lossy itself, and a chain that encrypts reads nothing that is not encrypted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from kvstrata.core.errors import ChecksumError, ConfigError
from kvstrata.layout.block import DTYPE_BYTES
from kvstrata.storage.codecs.aes import AesCodec
from kvstrata.storage.codecs.base import BlockFacts, BytesLike, Codec, CodecSettings
from kvstrata.storage.codecs.fp8 import Fp8Codec
from kvstrata.storage.codecs.zstd import ZstdCodec
from kvstrata.storage.envelope import CHAIN_BYTES_MAX, PLAIN, Refusal

__all__ = ["ENTRY_POINTS", "SHIPPED", "CodecChain", "codec_names", "make_chain"]

ENTRY_POINTS: Final = "kvstrata.codecs"
"""Entry point group; each entry is a callable that takes `CodecSettings` and returns a `Codec`."""

SHIPPED: Final[Mapping[str, Callable[[CodecSettings], Codec]]] = {
    "zstd": ZstdCodec,
    "fp8": Fp8Codec,
    "aes": AesCodec,
}
"""The codecs of this package."""

_VERBS: Final = ("label", "reads", "stored_bytes_max", "encode", "decode")
_FLAGS: Final = ("lossy", "authentic")
_LENGTH_MAX: Final = 4


class CodecChain:
    """What a tier's blocks are written with, and what they may have been written with."""

    def __init__(self, codecs: Sequence[Codec], item_bytes: int, known: Sequence[Codec]) -> None:
        """Encode with `codecs`, first step first; read those of `known` too. Use `make_chain`."""
        self._codecs = tuple(codecs)
        self._item_bytes = item_bytes
        self._known = {codec.name: codec for codec in (*known, *codecs)}
        self.lossy = any(codec.lossy for codec in codecs)
        self.authentic = any(codec.authentic for codec in codecs)

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of its codecs that change the numbers in a block; empty unless it is lossy."""
        return tuple(codec.name for codec in self._codecs if codec.lossy)

    @property
    def plain(self) -> bool:
        """Whether blocks are stored as they are."""
        return not self._codecs

    def label(self, facts: BlockFacts) -> str:
        """Return what a header records."""
        return "+".join(codec.label(facts) for codec in self._codecs) or PLAIN

    def stored_bytes_max(self, raw_bytes: int) -> int:
        """Return how long a block that this chain reads can be in the store."""
        longest = raw_bytes
        for codec in self._known.values():
            longest = max(longest, codec.stored_bytes_max(longest))
        return longest

    def encode(self, raw: memoryview, facts: BlockFacts) -> BytesLike:
        """Return the stored bytes; raises TransferError for values that a codec cannot hold."""
        stored: BytesLike = raw
        item = self._item_bytes
        for codec in self._codecs:
            stored = codec.encode(memoryview(stored), item, facts)
            item = 1
        return stored

    def decode(
        self, label: str, stored: memoryview, into: memoryview, facts: BlockFacts
    ) -> Refusal | None:
        """Fill `into` exactly, or say why not; what it holds then is nobody's block."""
        codecs = self._readers(label, facts)
        if codecs is None:
            return Refusal.OTHER_CODEC
        room = [len(into)]  # the most that may be there before each step
        for codec in codecs[:-1]:
            room.append(codec.stored_bytes_max(room[-1]))
        try:
            for codec in reversed(codecs):
                last = codec is codecs[0]
                target = into if last else memoryview(bytearray(room.pop()))
                stored = target[: codec.decode(stored, target, facts)]
        except ChecksumError:
            return Refusal.OTHER_BYTES
        if len(stored) != len(into):
            return Refusal.OTHER_BYTES
        if not codecs:
            into[:] = stored
        return None

    def _readers(self, label: str, facts: BlockFacts) -> list[Codec] | None:
        """Return the codecs of a recorded chain, None if it is not to be read here."""
        labels = [] if label == PLAIN else label.split("+")
        found = []
        for each in labels:
            codec = self._known.get(each.partition("@")[0])
            if codec is None or not codec.reads(each, facts):
                return None
            found.append(codec)
        if len(set(map(id, found))) != len(found):
            return None
        if any(codec.lossy for codec in found) and not self.lossy:
            return None
        if self.authentic and not any(codec.authentic for codec in found):
            return None
        return found


def codec_names() -> list[str]:
    """Return every name that a chain may have here, shipped ones first."""
    return [PLAIN, *SHIPPED, *sorted(_plugged().keys() - SHIPPED.keys() - {PLAIN})]


def make_chain(text: str, settings: CodecSettings) -> CodecChain:
    """Return the chain that `text` names, such as `none`, `zstd` or `fp8+zstd+aes`.

    Raises ConfigError for a name nobody offers, a name that comes twice, a lossy codec behind
    another one, anything behind encryption, and a codec that cannot be made.
    """
    names = [] if text == PLAIN else text.split("+")
    if len(set(names)) != len(names) or len(names) > _LENGTH_MAX:
        raise ConfigError(
            f"codec: {text!r} names a codec twice, or more than {_LENGTH_MAX}",
            hint="write each once, as in zstd+aes",
        )
    codecs = [_make(name, settings) for name in names]
    if any(codec.lossy for codec in codecs[1:]):
        raise ConfigError(
            f"codec: in {text!r} a lossy codec is not the first",
            hint="only the first step sees numbers: write it first, as in fp8+zstd",
        )
    if any(codec.authentic for codec in codecs[:-1]):
        raise ConfigError(
            f"codec: in {text!r} encryption is not the last",
            hint="encrypted bytes do not compress: write it last, as in zstd+aes",
        )
    known = []
    for name in SHIPPED.keys() - set(names):
        try:
            known.append(_make(name, settings))
        except ConfigError:  # not installed or not for these blocks: then its blocks are misses
            continue
    chain = CodecChain(codecs, DTYPE_BYTES.get(settings.dtype, 1), known)
    facts = BlockFacts(key=b"\0" * 16, fingerprint=b"", namespace=b"", tenant=b"", raw_bytes=1)  # type: ignore[arg-type]
    if len(chain.label(facts)) > CHAIN_BYTES_MAX:
        raise ConfigError(f"codec: {text!r} is too long for a header", hint="use fewer codecs")
    return chain


def _plugged() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _make(name: str, settings: CodecSettings) -> Codec:
    if name in SHIPPED:
        return SHIPPED[name](settings)
    entry = _plugged().get(name)
    if entry is None or name == PLAIN:
        raise ConfigError(
            f"codec: unknown codec {name!r}", hint=f"known here: {', '.join(codec_names())}"
        )
    try:
        made = entry.load()(settings)
    except Exception as error:  # whatever a plug-in raises: say whose it is
        raise ConfigError(
            f"codec: plug-in {name!r} ({entry.value}) cannot be made: {error}",
            hint="mend or remove the package that offers it",
        ) from error
    missing = [verb for verb in _VERBS if not callable(getattr(made, verb, None))]
    missing += [flag for flag in _FLAGS if not isinstance(getattr(made, flag, None), bool)]
    if missing or getattr(made, "name", None) != name:
        raise ConfigError(
            f"codec: plug-in {name!r} ({entry.value}) lacks {', '.join(missing) or 'its name'}",
            hint="implement Codec, see docs/contracts/codec.md",
        )
    codec: Codec = made
    return codec
