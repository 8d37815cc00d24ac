"""Namespaces: everything that must be equal for two blocks to be the same KV, as a hash key.

The sequence hash is keyed BLAKE3 of the lineage digest, cut to 16 bytes. The key comes in two
steps, so that a connector can make the key of each request's tenant without the cluster secret:

    model key     = BLAKE3(key = cluster secret,  fields: scheme, model, weights, numerics,
                           KV dtype, geometry, block tokens)
    namespace key = BLAKE3(key = model key,       fields: salt, and tenant if it has a name)

Fields are written as length-prefixed name and value, so that no two lists of fields spell the
same bytes. Nobody without a tenant's salt and the model key can make or probe its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NewType

from blake3 import blake3

from kvstrata.core.ids import HASH_BYTES, LineageDigest, SequenceHash
from kvstrata.core.tenants import TAG_BYTES

__all__ = [
    "ModelKey",
    "Namespace",
    "NamespaceKey",
    "namespace_tag",
    "salted_key",
    "sequence_hashes",
]

NamespaceKey = NewType("NamespaceKey", bytes)
"""32 bytes under which one tenant's digests become sequence hashes."""

ModelKey = NewType("ModelKey", bytes)
"""32 bytes from which the namespace keys of one model's tenants are derived."""

_SCHEME: Final = "kvstrata-1"  # a change of the scheme is another namespace: old blocks are misses


@dataclass(frozen=True, slots=True)
class Namespace:
    """What decides the numbers in a block besides its tokens, the tenant excepted."""

    model: str
    """The model's name."""
    weights: str
    """Revision of the weights: a commit, or a digest of the files."""
    numerics: str
    """Whatever else changes the numbers: rope scaling, compute dtype, quantisation."""
    kv_dtype: str
    """Element type of the stored KV."""
    geometry: str
    """Layers, heads and channels, independent of the order in memory (`BlockLayout.geometry`)."""
    block_tokens: int
    """Tokens in one block, the hash granularity."""

    def model_key(self, secret: bytes) -> ModelKey:
        """Return the key of this model under `secret` (32 bytes)."""
        fields = (
            ("scheme", _SCHEME),
            ("model", self.model),
            ("weights", self.weights),
            ("numerics", self.numerics),
            ("kv_dtype", self.kv_dtype),
            ("geometry", self.geometry),
            ("block_tokens", str(self.block_tokens)),
        )
        return ModelKey(blake3(_encode(fields), key=secret).digest())


def namespace_tag(model_key: ModelKey) -> bytes:
    """Return the 8 bytes by which a daemon names the namespace of this key; nothing is found by it.

    Tenants of one model, whatever their salts, are in one namespace here.
    """
    return blake3(b"namespace tag", key=model_key).digest(TAG_BYTES)


def salted_key(model_key: ModelKey, salt: str, tenant: str = "") -> NamespaceKey:
    """Return the namespace key of `tenant` with this salt; empty ones are a salt and a tenant too.

    A tenant without a name adds no field, so that its keys are those of before tenants had any.
    """
    fields = [("salt", salt), *([("tenant", tenant)] if tenant else [])]
    return NamespaceKey(blake3(_encode(fields), key=model_key).digest())


def sequence_hashes(key: NamespaceKey, digests: Sequence[LineageDigest]) -> list[SequenceHash]:
    """Return the cache key of each digest in this namespace, in order."""
    hasher = blake3(key=key)
    hashes = []
    for each in digests:  # one hasher for all: making one costs as much as hashing 32 bytes
        hashes.append(SequenceHash(hasher.update(each).digest(HASH_BYTES)))
        hasher.reset()
    return hashes


def _encode(fields: Iterable[tuple[str, str]]) -> bytes:
    parts = bytearray()
    for pair in fields:
        for text in pair:
            data = text.encode()
            parts += len(data).to_bytes(4, "little") + data
    return bytes(parts)
