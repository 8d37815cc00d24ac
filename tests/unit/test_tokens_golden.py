"""Identity, pinned: a changed number here makes every stored block unfindable."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from hashlib import sha256

import pytest
from blake3 import blake3

from kvstrata.tokens import Namespace, lineage_digests, sequence_hashes
from kvstrata.tokens.namespace import salted_key

TOKENS = list(range(1, 36))  # two blocks of 16 or eight of 4, and a rest of 3
SECRET = bytes(range(32))
SPACE = Namespace("m", "w", "n", "float16", "g", 16)
EXTRAS = {1: b"adapter:7"}

LINEAGE_4 = [
    "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72",
    "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6",
    "eddb4ab93695109cc0853fa0167c53aa0dc373ece757e530a734981168bdeebc",
    "e6e688fa1045e868bee0d08c9ce33d0a63f1adf39518456e0189991147d38b21",
    "cab63143ef5337d975f50efe5d59cb392b0e8347cb4886aa6bc416399d216008",
    "bc9df1cce90c301fa27906972fc6b441c167795ce8e2425f5f6803b04e413d62",
    "5e1d6d5d67332ba98e67ec21e068f341d3bc9edc7cdcb15c281571d213f2ed07",
    "888d83e4e2255f7cd2619eca164d89dbcbe240401ad537d218075d1919b1aa09",
]
LINEAGE_16 = [
    "77d735ce838418aa151bd96b5b1e78ee63860892e0a95c00fe34178442be9b07",
    "1170426cf2449cebf4d17f087ce5bb43b6a910ce91b3f40922868e913e8ee91d",
]
LINEAGE_16_EXTRAS = [
    LINEAGE_16[0],
    "7d28e062c0a0d6f7ea25082527a44455129f7eece0895303db38dff5b8560614",
]
MODEL_KEY = "4af3368cdcb58a370c5c0f960370e7daee38eb8db386e565dbe09e5b9def02a1"
SALTED_KEYS = {
    "": "bfe8da08f57f6d23cd638f3a27b4e7adf586a1ca9e98efba2b17c9423c4ee56a",
    "tenant-a": "4864ede9d74622bec965eb5da5bea2d9defa192c32da7811cf5c5234c977c391",
}
HASHES = {
    "": ["562651d7eaf90d63f1e0b69c55649c72", "9ca2fd2caba71a233a0bc2eb9b158a81"],
    "tenant-a": ["196692773d1841ff28975bae0d3fd09c", "d71ae2d3750d10c806d6cbbfe2a3abb6"],
}

ELSEWHERE = """
import json
from kvstrata.tokens import Namespace, lineage_digests, sequence_hashes
from kvstrata.tokens.namespace import salted_key
digests = lineage_digests(list(range(1, 36)), 16)
key = Namespace("m", "w", "n", "float16", "g", 16).model_key(bytes(range(32)))
hashes = {salt: sequence_hashes(salted_key(key, salt), digests) for salt in ("", "tenant-a")}
print(json.dumps({salt: [each.hex() for each in found] for salt, found in hashes.items()}))
"""


@pytest.mark.parametrize(
    ("block_tokens", "extras", "expected"),
    [
        (4, None, LINEAGE_4),
        (16, None, LINEAGE_16),
        (16, EXTRAS, LINEAGE_16_EXTRAS),
        (36, None, []),
    ],
)
def test_lineage(block_tokens, extras, expected) -> None:
    digests = lineage_digests(TOKENS, block_tokens, extras=extras)
    assert [each.hex() for each in digests] == expected


def test_model_key() -> None:
    assert SPACE.model_key(SECRET).hex() == MODEL_KEY


@pytest.mark.parametrize("salt", SALTED_KEYS)
def test_salted_key_and_sequence_hashes(salt) -> None:
    key = salted_key(SPACE.model_key(SECRET), salt)
    assert key.hex() == SALTED_KEYS[salt]
    hashes = sequence_hashes(key, lineage_digests(TOKENS, 16))
    assert [each.hex() for each in hashes] == HASHES[salt]


def test_lineage_by_hand() -> None:
    first = sha256(struct.pack("<16I", *range(1, 17))).digest()
    second = sha256(first + struct.pack("<16I", *range(17, 33))).digest()
    assert [first.hex(), second.hex()] == LINEAGE_16
    marked = sha256(b"\xff" * 16 + second + b"adapter:7").digest()
    assert marked.hex() == LINEAGE_16_EXTRAS[1]


def test_keys_and_hash_by_hand() -> None:
    def field(name: str, value: str) -> bytes:
        return b"".join(struct.pack("<I", len(text)) + text.encode() for text in (name, value))

    fields = [
        ("scheme", "kvstrata-1"),
        ("model", "m"),
        ("weights", "w"),
        ("numerics", "n"),
        ("kv_dtype", "float16"),
        ("geometry", "g"),
        ("block_tokens", "16"),
    ]
    model = blake3(b"".join(field(*each) for each in fields), key=SECRET).digest()
    assert model.hex() == MODEL_KEY
    tenant = blake3(field("salt", "tenant-a"), key=model).digest()
    assert tenant.hex() == SALTED_KEYS["tenant-a"]
    digest = bytes.fromhex(LINEAGE_16[1])
    assert blake3(digest, key=tenant).digest()[:16].hex() == HASHES["tenant-a"][1]


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_another_process_has_the_same_keys(seed) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == HASHES
