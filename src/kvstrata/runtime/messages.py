"""What clients and the daemon say to each other: msgspec structs, MessagePack on the wire.

Every call travels in an `Envelope` with an id and a deadline on the machine's monotonic clock,
which all processes of a node share; the daemon drops a call whose caller has stopped waiting.
Hashes travel joined, `HASH_BYTES` each. Types, lengths and counts are checked on arrival by
`decode_envelope` and `split_hashes`, so handlers see only well-formed calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec

from kvstrata.core.errors import CallRefusedError
from kvstrata.core.ids import HASH_BYTES, LineageDigest, SequenceHash
from kvstrata.core.retention import HINTS_MAX, BlockHint
from kvstrata.core.tenants import TAG_BYTES, TENANT_NAME_MAX
from kvstrata.layout import BlockLayout
from kvstrata.storage.arena import ArenaAddress
from kvstrata.tokens import Namespace, NamespaceKey
from kvstrata.tokens.family import FAMILY_BYTES, Family, FamilyKey, family_of
from kvstrata.tokens.namespace import ModelKey, salted_key

__all__ = [
    "PROTOCOL_VERSION",
    "SPEED_MAX",
    "Abort",
    "Acquire",
    "Acquired",
    "Answer",
    "Because",
    "Bye",
    "Call",
    "Changed",
    "Changes",
    "Clear",
    "Cleared",
    "Done",
    "Envelope",
    "Fence",
    "Forget",
    "Found",
    "Hello",
    "Lease",
    "Leased",
    "Lookup",
    "Process",
    "Refused",
    "Release",
    "Reply",
    "Reserve",
    "Reserved",
    "Seal",
    "Stats",
    "StatsAnswer",
    "Welcome",
    "Why",
    "decode_envelope",
    "decode_reply",
    "encode",
    "join_hashes",
    "split_family",
    "split_hashes",
]

PROTOCOL_VERSION: Final = 6
"""Raised whenever a message changes; client and daemon must agree."""
SPEED_MAX: Final = 1e18
"""Above any speed in tokens or bytes per second: more is refused, as is what is no number."""

MessageT = TypeVar("MessageT")

_Request: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Hashes: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=HASH_BYTES << 18)]
_Hints: TypeAlias = Annotated[list[BlockHint], msgspec.Meta(max_length=HINTS_MAX)]
_Window: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 30)]
_Windows: TypeAlias = Annotated[tuple[_Window, ...], msgspec.Meta(min_length=1, max_length=64)]
_Tenant: TypeAlias = Annotated[str, msgspec.Meta(max_length=TENANT_NAME_MAX)]
_Family: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=FAMILY_BYTES)]
_Speed: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=SPEED_MAX)]
_Slots: TypeAlias = list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]]


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process whose life fences the slots of a session."""

    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    """Its id."""
    started: int
    """When it started, in clock ticks since boot, so that a reused id is noticed."""


_Processes: TypeAlias = Annotated[list[Process], msgspec.Meta(min_length=1, max_length=4096)]


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of every call and answer; the tag is the class name."""


class Hello(_Message, frozen=True):
    """Opens a session for blocks of one layout in one namespace."""

    protocol: int
    """The caller's `PROTOCOL_VERSION`."""
    processes: _Processes
    """The caller first, then every process that may write to this session's slots."""
    layout: BlockLayout
    """How the caller's blocks lie in memory."""
    namespace: Namespace
    """What decides the numbers in its blocks."""
    replaces: int = 0
    """An earlier session of the same process that this one takes the place of; 0 for none."""
    bridges: bool = False
    """Whether the caller re-arranges its blocks if the daemon holds them in another layout."""


class Fence(_Message, frozen=True):
    """Names further processes that may write to this session's slots, before any of them does."""

    processes: _Processes
    """The processes; those known already may be named again."""


class Lookup(_Message, frozen=True):
    """Asks how much of a prefix is kept, and is worth loading."""

    request: _Request
    """The caller's name of the request."""
    hashes: _Hashes
    """Keys of the prefix, root first, joined; one group of layers after the other."""
    windows: _Windows = (0,)
    """The window of each group in blocks, 0 for full attention."""
    prefill_tokens_per_s: _Speed = 0.0
    """Prompt tokens that the caller's engine computes per second; 0 if it does not know."""
    copy_bytes_per_s: _Speed = 0.0
    """Speed of its copies from the host to its device; 0 if it does not know."""


class Acquire(_Message, frozen=True):
    """Holds the longest ready prefix for reading."""

    request: _Request
    """The caller's name of the request."""
    hashes: _Hashes
    """Keys of the blocks, root first, joined; one group of layers after the other."""
    windows: _Windows = (0,)
    """The window of each group in blocks, 0 for full attention."""


class Lease(_Message, frozen=True):
    """Keeps the longest prefix that is in the host from eviction for a while."""

    request: _Request
    """The lease's name; another lease of this name takes its place."""
    hashes: _Hashes
    """Keys of the blocks, root first, joined."""
    seconds: float
    """For how long from now; 0 to end it."""


class Release(_Message, frozen=True):
    """Ends what requests hold for reading."""

    requests: list[_Request]
    """Names of the requests."""


class Reserve(_Message, frozen=True):
    """Asks for slots to fill with a chain of blocks."""

    request: _Request
    """The caller's name of the request."""
    parent: Annotated[bytes, msgspec.Meta(max_length=HASH_BYTES)]
    """Key before the first of `hashes`; empty at the root."""
    hashes: _Hashes
    """Keys of the blocks, joined."""
    hints: _Hints = []
    """How long blocks among them are to be kept."""
    tenant: _Tenant = ""
    """Who is charged for the slots; the empty name is a tenant too."""
    family: _Family = b""
    """At the root: tags of the prompt and of its salt, joined; else empty."""


class Seal(_Message, frozen=True):
    """Hands filled slots over."""

    request: _Request
    """The name under which they were reserved."""
    slots: _Slots
    """The slots."""


class Abort(_Message, frozen=True):
    """Gives reserved slots back unfilled."""

    request: _Request
    """The name under which they were reserved."""
    slots: _Slots
    """The slots."""


class Why(_Message, frozen=True):
    """Asks why the first block of a prompt is not kept."""

    key: Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
    """Its key."""
    family: _Family
    """Tags of the prompt and of its salt, joined."""


class Clear(_Message, frozen=True):
    """Forgets every block in some tiers, or in all tiers what a namespace or a tenant stored."""

    tiers: list[str]
    """Names of the tiers; empty for all."""
    namespace: Annotated[str, msgspec.Meta(max_length=512)] = ""
    """Only what was stored in this one: a model's name, or a tag in hexadecimal; empty for any."""
    tenant: _Tenant | None = None
    """Only what this one is charged for; None for any."""


class Forget(_Message, frozen=True):
    """Forgets a block and every block behind it, in every tier."""

    key: Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
    """Its key."""


class Changes(_Message, frozen=True):
    """Asks what came to be in the tiers and what left them since an earlier answer."""

    cursor: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    """From that answer; 0 asks from now on."""


class Stats(_Message, frozen=True):
    """Asks for counters and the state of the tiers."""


class Bye(_Message, frozen=True):
    """Closes the session while its process lives on."""


class Welcome(_Message, frozen=True):
    """Answer to `Hello`."""

    session: int
    """Goes into every later envelope."""
    pid: int
    """The daemon's process."""
    model_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """From which the caller derives its tenants' namespace keys."""
    arena: ArenaAddress
    """The host tier, to map."""
    family_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """Under which the caller makes tags of prompts and salts (`tokens.family`)."""
    layout: BlockLayout
    """The layout of the blocks in the arena; the caller's, unless it bridges."""
    share_tenants: bool = False
    """Whether tenants of one salt find each other's blocks."""

    def namespace_key(self, salt: str, tenant: str) -> NamespaceKey:
        """Return the key under which blocks of this salt and tenant are found."""
        kept_apart = "" if self.share_tenants else tenant
        return salted_key(ModelKey(self.model_key), salt, kept_apart)

    def family(self, digest: LineageDigest, salt: str, tenant: str) -> Family:
        """Return what explains, to those who ask later, where a prompt was stored."""
        kept_apart = "" if self.share_tenants else tenant
        return family_of(FamilyKey(self.family_key), digest, salt, kept_apart)


class Found(_Message, frozen=True):
    """Answer to `Lookup`; the fields of `LookupAnswer`."""

    ready: int
    """Leading blocks that are in the host and held."""
    staged: dict[str, int]
    """How many of them were staged for this request, by the tier that they came from."""
    pending: int
    """Blocks being staged behind them."""
    until: float
    """When staging is given up, on the monotonic clock."""
    why: str
    """Why the first block that is not ready is not."""


class Acquired(_Message, frozen=True):
    """Answer to `Acquire`; the fields of `AcquireAnswer`."""

    blocks: int
    """Leading blocks that the slots serve."""
    slots: _Slots
    """Host slots, root first, of each group those that it needs."""
    generations: list[int]
    """Generation of each."""
    staged: dict[str, int]
    """How many were staged for this request, by the tier that they came from."""


class Leased(_Message, frozen=True):
    """Answer to `Lease`."""

    blocks: int
    """How many leading blocks it keeps."""


class Reserved(_Message, frozen=True):
    """Answer to `Reserve`; the fields of `ReserveAnswer`."""

    indices: list[int]
    """Which of the offered blocks are wanted."""
    slots: _Slots
    """The slot of each."""
    throttled: int
    """Wanted blocks for which there is no slot now."""


class Because(_Message, frozen=True):
    """Answer to `Why`."""

    why: str
    """In words; empty if the block is kept."""


class Cleared(_Message, frozen=True):
    """Answer to `Clear`."""

    blocks: int
    """How many blocks were forgotten."""


class Changed(_Message, frozen=True):
    """Answer to `Changes`; the fields of `ChangesAnswer`."""

    cursor: int
    """For the next question."""
    lost: bool
    """Whether something in between is forgotten."""
    more: bool
    """Whether there is more to ask for at once."""
    changes: list[tuple[str, bool, _Hashes]]
    """Name of a tier, whether blocks can be found there from now on or not any more, and their
    keys, joined; in order."""


class StatsAnswer(_Message, frozen=True):
    """Answer to `Stats`."""

    stats: dict[str, Any]
    """Nested names and numbers; see docs/guides/client.md."""


class Done(_Message, frozen=True):
    """Answer to a call that has nothing to say but that it was carried out."""


class Refused(_Message, frozen=True):
    """Answer to a call that is not acceptable; nothing was changed."""

    message: str
    """One sentence."""
    hint: str = ""
    """What to do about it."""
    kind: str = "call"
    """`config` where the operator must change something, else `call`."""


Call: TypeAlias = (
    Hello
    | Fence
    | Lookup
    | Acquire
    | Release
    | Lease
    | Reserve
    | Seal
    | Abort
    | Why
    | Clear
    | Forget
    | Changes
    | Stats
    | Bye
)
Answer: TypeAlias = (
    Welcome
    | Found
    | Acquired
    | Leased
    | Reserved
    | Because
    | Cleared
    | Changed
    | StatsAnswer
    | Done
    | Refused
)


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call on its way."""

    id: int
    """Unique among the caller's calls; the reply carries it back."""
    deadline: float
    """When the caller stops waiting, on the monotonic clock."""
    session: int
    """From `Welcome`; 0 before there is one."""
    call: Call
    """What is asked."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer on its way."""

    id: int
    """The id of the call."""
    answer: Answer
    """What is answered."""


_envelopes = msgspec.msgpack.Decoder(Envelope)
_replies = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Envelope | Reply) -> bytes:
    """Return the message's bytes."""
    return _encoder.encode(message)


def decode_envelope(data: bytes) -> Envelope:
    """Return the call in `data`; raises msgspec.MsgspecError or a KvstrataError if malformed."""
    return _decode(_envelopes, data)


def decode_reply(data: bytes) -> Reply:
    """Return the answer in `data`; raises msgspec.MsgspecError if malformed."""
    return _decode(_replies, data)


def _decode(decoder: msgspec.msgpack.Decoder[MessageT], data: bytes) -> MessageT:
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # not wrapped by msgspec
        raise msgspec.DecodeError(str(error)) from error


def join_hashes(hashes: Sequence[SequenceHash]) -> bytes:
    """Return `hashes` as one run of bytes."""
    return b"".join(hashes)


def split_hashes(joined: bytes) -> list[SequenceHash]:
    """Return the hashes in a run of bytes.

    Raises CallRefusedError for a broken length, or a hash that is named twice: a chain has none.
    """
    if len(joined) % HASH_BYTES:
        raise CallRefusedError(f"hashes: {len(joined)} bytes are not whole hashes")
    hashes = [
        SequenceHash(joined[start : start + HASH_BYTES])
        for start in range(0, len(joined), HASH_BYTES)
    ]
    if len(set(hashes)) != len(hashes):
        raise CallRefusedError("hashes: the same hash is named twice")
    return hashes


def split_family(joined: bytes) -> Family:
    """Return the family in a run of bytes; raises CallRefusedError for a broken length."""
    if len(joined) != FAMILY_BYTES:
        raise CallRefusedError(f"family: {len(joined)} bytes are not {FAMILY_BYTES}")
    return Family(joined[:TAG_BYTES], joined[TAG_BYTES:])
