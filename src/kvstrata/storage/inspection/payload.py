"""Checks a stored payload against its own header, with whatever codecs and secrets are at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout.block import DTYPE_BYTES
from kvstrata.storage.codecs import BlockFacts, CodecChain, CodecSettings, make_chain
from kvstrata.storage.envelope import PLAIN, Envelope, Refusal, decode_envelope
from kvstrata.storage.seal import seal

__all__ = ["UNREAD", "PayloadChecker"]

UNREAD: Final = frozenset({Refusal.NEWER, Refusal.OTHER_CODEC})
"""Not to be told from good: whoever has the version, the codec or the key must look."""

_DTYPE: Final = re.compile(r"\] (\w+) \d+ tokens")
_CHAINS_MAX: Final = 64


class PayloadChecker:
    """Checks the blocks of one layout. Any thread may call."""

    def __init__(self, fingerprint: bytes, description: str, secrets: Sequence[bytes]) -> None:
        """Take the layout's dtype from its description; `secrets` are tried in turn."""
        found = _DTYPE.search(description)
        dtype = found[1] if found and found[1] in DTYPE_BYTES else "uint8"
        self._fingerprint = fingerprint
        self._settings = [CodecSettings(dtype, secret) for secret in (*secrets, None)]
        self._chains = lru_cache(_CHAINS_MAX)(self._make_chains)

    def header(self, key: SequenceHash, header: bytes | memoryview) -> Envelope | Refusal:
        """Return the header if it is the one of the block that has this name."""
        envelope = decode_envelope(header)
        if isinstance(envelope, Refusal):
            return envelope
        if envelope.key != key:
            return Refusal.OTHER_KEY
        if envelope.fingerprint != self._fingerprint:
            return Refusal.OTHER_LAYOUT
        return envelope

    def refusal(self, envelope: Envelope, stored: memoryview) -> Refusal | None:
        """Return why `stored` is not the payload that the header says, None if it is."""
        if len(stored) != envelope.stored_bytes:
            return Refusal.SHORT if len(stored) < envelope.stored_bytes else Refusal.LONG
        raw = stored
        if envelope.codec != PLAIN:
            raw = memoryview(bytearray(envelope.raw_bytes))
            if (refusal := self._decode(envelope, stored, raw)) is not None:
                return refusal
        good = seal(envelope.key + self._fingerprint, raw) == envelope.seal
        return None if good else Refusal.OTHER_BYTES

    def _decode(self, envelope: Envelope, stored: memoryview, raw: memoryview) -> Refusal | None:
        facts = BlockFacts(
            envelope.key,
            self._fingerprint,
            envelope.namespace,
            envelope.tenant,
            envelope.raw_bytes,
        )
        names = "+".join(each.partition("@")[0] for each in envelope.codec.split("+"))
        for chain in self._chains(names):  # a label names its key: at most one secret has it
            refusal = chain.decode(envelope.codec, stored, raw, facts)
            if refusal is not Refusal.OTHER_CODEC:
                return refusal
        return Refusal.OTHER_CODEC

    def _make_chains(self, names: str) -> list[CodecChain]:
        """Return a chain of just these codecs for each secret; none for what cannot be made."""
        chains = []
        for settings in self._settings:
            try:
                chains.append(make_chain(names, settings))
            except ConfigError:
                continue
        return chains
