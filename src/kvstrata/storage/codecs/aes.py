"""Encryption: AES-256-GCM, a key for each tenant, and a nonce that cannot come twice.

    incarnation 16 | counter 12 | ciphertext | tag 16

    tenant key = HKDF-SHA256(secret, info = "kvstrata aes-256-gcm 1 tenant" + namespace + tenant)
    key id     = HKDF-SHA256(tenant key, info = "... id"), 8 bytes, recorded in the header
    block key  = HKDF-SHA256(tenant key, salt = incarnation, info = "... incarnation")

An incarnation is 16 random bytes drawn by each process, and again after a fork; below its key the
counter is the nonce. So no nonce repeats under a key as long as no two incarnations are equal,
however many blocks are written. Key, layout, tags and length of the block are authenticated with
it: a ciphertext that is moved to another key, tenant or layout is not accepted.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any, Final

from kvstrata.core.errors import ChecksumError, ConfigError
from kvstrata.storage.codecs.base import BlockFacts, BytesLike, CodecSettings

__all__ = ["AesCodec"]

_SECRET_BYTES: Final = 32
_INCARNATION_BYTES: Final = 16
_COUNTER_BYTES: Final = 12
_TAG_BYTES: Final = 16
_EXTRA_BYTES: Final = _INCARNATION_BYTES + _COUNTER_BYTES + _TAG_BYTES
_SCHEME: Final = b"kvstrata aes-256-gcm 1 "
_KEYS_MAX: Final = 4096


class AesCodec:
    """Encrypts under keys derived from the secret in its settings."""

    name = "aes"
    lossy = False
    authentic = True

    def __init__(self, settings: CodecSettings) -> None:
        """Raise ConfigError without a secret of 32 bytes, or without the library."""
        if settings.secret is None or len(settings.secret) != _SECRET_BYTES:
            raise ConfigError(
                f"codec aes: it needs a secret of {_SECRET_BYTES} bytes",
                hint="give the daemon a secret file that all readers share",
            )
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError(
                "codec aes: cryptography is not installed", hint="pip install 'kvstrata[codecs]'"
            ) from error
        self._secret = settings.secret
        self._cipher: Any = AESGCM
        self._invalid: type[Exception] = InvalidTag
        self._lock = threading.Lock()
        self._owner = 0
        self._incarnation = b""
        self._counter = 0
        # Bounded, and of this object alone: keys go when it goes.
        self._tenant = lru_cache(_KEYS_MAX)(self._derive_tenant)
        self._block_cipher = lru_cache(_KEYS_MAX)(self._derive_cipher)

    def label(self, facts: BlockFacts) -> str:
        """Return the name and the id of the tenant's key."""
        return f"{self.name}@{self._tenant(facts.namespace, facts.tenant)[1].hex()}"

    def reads(self, label: str, facts: BlockFacts) -> bool:
        """Return whether it was written under the key that we have for this tenant."""
        return label == self.label(facts)

    def stored_bytes_max(self, raw_bytes: int) -> int:
        """Return the length, which is always the same."""
        return raw_bytes + _EXTRA_BYTES

    def encode(self, raw: memoryview, item_bytes: int, facts: BlockFacts) -> BytesLike:
        """Encrypt."""
        del item_bytes
        incarnation, nonce = self._next_nonce()
        cipher = self._block_cipher(incarnation, facts.namespace, facts.tenant)
        sealed: bytes = cipher.encrypt(nonce, raw, _bound(facts))
        return b"".join([incarnation, nonce, sealed])

    def decode(self, stored: memoryview, into: memoryview, facts: BlockFacts) -> int:
        """Decrypt; nothing of it is given out unless all of it is authentic."""
        length = len(stored) - _EXTRA_BYTES
        if not 0 <= length <= len(into):
            raise ChecksumError(f"aes: {len(stored)} bytes are not an encoding for {len(into)}")
        incarnation = bytes(stored[:_INCARNATION_BYTES])
        nonce = bytes(stored[_INCARNATION_BYTES : _INCARNATION_BYTES + _COUNTER_BYTES])
        cipher = self._block_cipher(incarnation, facts.namespace, facts.tenant)
        try:
            plain = cipher.decrypt(
                nonce, stored[_INCARNATION_BYTES + _COUNTER_BYTES :], _bound(facts)
            )
        except self._invalid:
            raise ChecksumError("aes: not what was encrypted for this block") from None
        into[:length] = plain
        return length

    def _next_nonce(self) -> tuple[bytes, bytes]:
        with self._lock:
            if self._owner != os.getpid():  # a fork would count on from the same number
                self._owner, self._counter = os.getpid(), 0
                self._incarnation = os.urandom(_INCARNATION_BYTES)
            self._counter += 1
            return self._incarnation, self._counter.to_bytes(_COUNTER_BYTES, "big")

    def _derive_tenant(self, namespace: bytes, tenant: bytes) -> tuple[bytes, bytes]:
        key = _derive(self._secret, b"", _SCHEME + b"tenant" + namespace + tenant, 32)
        return key, _derive(key, b"", _SCHEME + b"id", 8)

    def _derive_cipher(self, incarnation: bytes, namespace: bytes, tenant: bytes) -> Any:
        key = self._tenant(namespace, tenant)[0]
        return self._cipher(_derive(key, incarnation, _SCHEME + b"incarnation", 32))


def _bound(facts: BlockFacts) -> bytes:
    """Return what is authenticated beside the payload; every part has a fixed length."""
    parts = [facts.key, facts.fingerprint, facts.namespace, facts.tenant]
    return b"".join([*parts, facts.raw_bytes.to_bytes(8, "little")])


def _derive(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived: bytes = HKDF(SHA256(), length, salt or None, info).derive(secret)
    return derived
