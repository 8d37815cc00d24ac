"""What is known of one request of the engine, and whether its tokens say what its KV is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvstrata.core.ids import LineageDigest, SequenceHash
from kvstrata.tokens import lineage_digests

__all__ = ["Identity", "Offer", "Tracked", "read_identity"]

_MISSING: Final = object()
_OTHER_INPUTS: Final = (
    "multimodal_hashes", "multimodal_positions", "multimodal_lengths", "multimodal_embedding",
    "prompt_embedding_table", "mrope_rotary_cos_sin", "encoder_tokens", "input_token_extra_ids",
)  # fmt: skip
"""What else than tokens decides a request's KV, and is not in the identity."""
_SALT_ID: Final = "\0trtllm-salt-id:"
_RUN: Final = secrets.token_bytes(16)


@dataclass(frozen=True, slots=True)
class Identity:
    """What isolates a request's blocks besides its tokens."""

    salt: str
    """The engine's cache salt; the empty one is a salt too."""
    extra: bytes = b""
    """What its adapter is; mixed into every block."""
    problem: str = ""
    """Why it is neither loaded nor saved; empty if it is."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Pages that the engine was told it can have."""

    first: int
    """First page, counted from the request's first token."""
    last: int
    """One behind the last."""
    slots: list[int]
    """Slots of the request's blocks, from its first token on."""
    generations: list[int]
    """Generation of each slot."""


@dataclass(slots=True)
class Tracked:
    """One life of a request: from its question, or a question after a reset, to its end."""

    request: int
    """The engine's id; a request that starts anew has the same."""
    name: str
    """Ours, never used again."""
    identity: Identity
    """What isolates its blocks."""
    tokens: list[int]
    """Its tokens so far."""
    prompt_tokens: int
    """How many it had when it asked."""
    usable: bool = True
    """False: nothing more is saved from it."""
    started: bool = False
    """The engine has scheduled it, so its tokens and pages are told from the first on."""
    digests: list[LineageDigest] = field(default_factory=list)
    """Lineage of its full blocks."""
    hashes: list[SequenceHash] = field(default_factory=list)
    """Their keys, in `epoch`."""
    epoch: int = 0
    """Session epoch of `hashes`, `saved_blocks` and its lease."""
    computed: int = 0
    """Tokens from the first on whose KV is surely in its pages when the step has computed."""
    saved_blocks: int = 0
    """Leading blocks that were offered to the daemon."""
    pages: list[list[int]] = field(default_factory=list)
    """For each group of layers its page numbers, from the first token on."""
    offer: Offer | None = None
    """Promised and not handed to the worker half yet."""
    allocated: list[list[int]] | None = None
    """Pages that the engine allocated for the offer, as `pages`."""
    filled: dict[int, list[int]] = field(default_factory=dict)
    """Pages that were loaded: position -> page numbers."""
    loading: set[int] = field(default_factory=set)
    """Loads under way."""

    def extend(self, blocks: int, block_tokens: int) -> None:
        """Hash the first `blocks` blocks; raises ValueError for ids that are no tokens."""
        known = len(self.digests)
        if blocks <= known:
            return
        new = self.tokens[known * block_tokens : blocks * block_tokens]
        extra = self.identity.extra
        self.digests += lineage_digests(
            new,
            block_tokens,
            parent=self.digests[-1] if known else None,
            extras=dict.fromkeys(range(blocks - known), extra) if extra else None,
        )

    def note(self, data: Any, *, new: bool, groups: int) -> str:
        """Take what the engine says of the step; return what is wrong with it, empty if nothing."""
        told = [list(each) for each in getattr(data, "new_block_ids_by_layer_group", ())]
        told = told or [list(data.new_block_ids)]
        if not new and told == [[]]:  # a step that needs no more pages, told without its groups
            told = [[] for _ in range(groups)]
        if new:
            prompt, self.tokens = self.tokens[: self.prompt_tokens], list(data.new_tokens)
            self.pages, self.started = told, True
            if self.tokens[: self.prompt_tokens] != prompt:
                return "other tokens"
        elif not self.started:
            return "not announced as new"
        else:
            self.tokens += data.new_tokens
            for pages, more in zip(self.pages, told, strict=False):
                pages.extend(more)
        if len(told) != groups:
            return "other groups of layers"
        salt, known = getattr(data, "cache_salt", None), self.identity.salt
        if salt and salt != known and not known.startswith(_SALT_ID):
            return "other cache_salt"
        # The first time the engine leaves out what we have loaded: then this is too little, never
        # too much, and the next step makes it good.
        computed = data.computed_position + data.num_scheduled_tokens
        self.computed = max(self.computed, min(computed, len(self.tokens)))
        return ""

    def finish(self, tokens: Sequence[int], groups: Sequence[Sequence[int]]) -> bool:
        """Take tokens and pages at the end; False if they do not go on from those we know."""
        told = [list(each) for each in groups]
        grown = len(told) == len(self.pages) and all(
            now[: len(before)] == before for before, now in zip(self.pages, told, strict=True)
        )
        if not grown or list(tokens[: len(self.tokens)]) != self.tokens:
            return False
        self.tokens, self.pages = list(tokens), told
        if len(self.tokens) > self.prompt_tokens:  # it has answered: all but the last is computed
            self.computed = max(self.computed, len(self.tokens) - 1)
        return True

    def row(self, position: int, pages: Sequence[Sequence[int]]) -> list[int] | None:
        """Return the page at a position in each group, None if there is none yet."""
        if not pages or any(position >= len(each) for each in pages):
            return None
        return [each[position] for each in pages]


def read_identity(request: Any, adapters: Mapping[int, str]) -> Identity:
    """Return what isolates the request's blocks.

    An adapter that is not named in `adapters` is known by its id within this process only.
    """
    other = next((name for name in _OTHER_INPUTS if _present(request, name)), "")
    if other:
        return Identity("", problem=other)
    salt, salt_id = _read(request, "cache_salt"), _read(request, "cache_salt_id")
    if salt is _MISSING and salt_id is _MISSING:
        return Identity("", problem="no cache_salt known")
    if not salt or salt is _MISSING:
        salt = "" if salt_id in {None, _MISSING} else f"{_SALT_ID}{salt_id}"
    elif not isinstance(salt, str) or salt.startswith(_SALT_ID):
        return Identity("", problem="odd cache_salt")
    adapter = _read(request, "lora_task_id")
    if adapter is _MISSING:
        return Identity("", problem="no lora_task_id known")
    if adapter is None:
        return Identity(salt)
    name = adapters.get(int(adapter))
    named = b"lora-run\0" + _RUN + str(adapter).encode() if name is None else b""
    return Identity(salt, named or b"lora\0" + str(name).encode())


def _read(request: Any, name: str) -> Any:
    return getattr(request, name, _MISSING)


def _present(request: Any, name: str) -> bool:
    value = _read(request, name)
    if value is _MISSING or value is None:
        return False
    length = getattr(value, "__len__", None)
    return length is None or length() > 0
