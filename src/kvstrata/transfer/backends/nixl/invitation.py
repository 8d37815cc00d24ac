"""What one agent must know of another before it may reach its memory, as bytes to carry.

    | "KVNIXL" | version: 2 | BLAKE3 of the rest: 32 | msgpack body |

The caller carries the bytes. NIXL's own metadata travels inside, and NIXL sees it only after the
digest was checked: one flipped bit in bare metadata can make NIXL refuse that peer for good
(docs/adr/0007-nixl.md). With a secret the digest is keyed, so that only its holders can invite.
"""

from __future__ import annotations

import hmac
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from kvstrata.core.errors import TransferError

__all__ = ["INVITATION_BYTES_MAX", "Invitation", "PeerMemory", "decode_invitation",
           "encode_invitation"]  # fmt: skip

INVITATION_BYTES_MAX: Final = 1 << 20
"""Longest invitation: about twenty thousand regions, far above what a node exports."""

_MAGIC: Final = b"KVNIXL\x00\x01"
_DIGEST_BYTES: Final = 32
_HEAD_BYTES: Final = len(_MAGIC) + _DIGEST_BYTES
_ADDRESS_END: Final = 1 << 64


class PeerMemory(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Memory of another process: a region that a transfer may read from or write to.

    Nothing but an agreement keeps it valid: NIXL reports a write into memory that its owner has
    given up as done. Use it only while its owner holds it for you.
    """

    peer: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    """Name of the agent that owns it; new for each life of a process."""
    label: Annotated[str, msgspec.Meta(max_length=128)]
    """What its owner calls it."""
    address: Annotated[int, msgspec.Meta(ge=0)]
    """Where it begins in its owner's address space."""
    length: Annotated[int, msgspec.Meta(gt=0)]
    """Its length in bytes."""


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How to reach one agent, and which of its memory."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    """The agent's name."""
    regions: list[PeerMemory]
    """What it lets others reach."""
    metadata: bytes
    """NIXL's own description of the agent."""


_decoder = msgspec.msgpack.Decoder(Invitation)


def encode_invitation(invitation: Invitation, secret: bytes | None = None) -> bytes:
    """Return the bytes of an invitation, its digest keyed by `secret` (32 bytes) if given.

    Raises TransferError if it is longer than `INVITATION_BYTES_MAX`.
    """
    body = msgspec.msgpack.encode(invitation)
    if _HEAD_BYTES + len(body) > INVITATION_BYTES_MAX:
        raise TransferError(
            f"an invitation of {len(body)} bytes is too long; export fewer, larger regions",
            retryable=False,
        )
    return _MAGIC + _digest(body, secret) + body


def decode_invitation(data: bytes, secret: bytes | None = None) -> Invitation:
    """Return what `encode_invitation` made; raises TransferError for any other bytes."""
    if len(data) > INVITATION_BYTES_MAX:
        raise _refusal(f"{len(data)} bytes are longer than any invitation")
    if data[: len(_MAGIC)] != _MAGIC:
        raise _refusal("these bytes are no invitation, or one of another version of kvstrata")
    body = data[_HEAD_BYTES:]
    if not hmac.compare_digest(data[len(_MAGIC) : _HEAD_BYTES], _digest(body, secret)):
        raise _refusal("its digest does not match: damaged, or made under another secret")
    try:
        invitation = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # not all wrapped
        raise _refusal(f"its body cannot be read: {error}") from error
    for region in invitation.regions:
        if region.peer != invitation.name:
            raise _refusal(f"{invitation.name} offers memory of {region.peer}")
        if region.address + region.length > _ADDRESS_END:
            raise _refusal(f"{region.label!r} ends behind the last address")
    return invitation


def _digest(body: bytes, secret: bytes | None) -> bytes:
    return (blake3(body, key=secret) if secret else blake3(body)).digest()


def _refusal(why: str) -> TransferError:
    return TransferError(
        f"invitation refused: {why} (hint: pass on, whole, what the peer exported last, and use "
        "the same cluster secret on both sides)",
        retryable=False,
    )
