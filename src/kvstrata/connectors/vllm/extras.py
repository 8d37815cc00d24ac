"""What a request's KV depends on besides its tokens, block by block."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from blake3 import blake3

__all__ = ["Medium", "MediumDigests", "request_extras"]


_NAMES_MAX: Final = 65536


@dataclass(frozen=True, slots=True)
class Medium:
    """One image, video or sound of a prompt."""

    digest: str
    """Of what the model is given for it."""
    start: int
    """Position of its first placeholder token."""
    length: int
    """How many tokens its placeholder has."""


def request_extras(
    weights_mark: str, adapter_digest: str, media: Iterable[Medium], block_tokens: int
) -> dict[int, bytes]:
    """Return the extra of each block that has one, by the block's index.

    Weights other than the namespace's and an adapter cover the whole request, so its first block
    says them and the chain carries them on.
    A medium is said by each block that its placeholder covers, with its place in that block: a
    block that has only its end is not the block of another medium's end.
    """
    extras: dict[int, bytes] = {}
    for kind, digest in (("weights", weights_mark), ("lora", adapter_digest)):
        if digest:
            extras[0] = extras.get(0, b"") + _spell(kind, digest)
    for medium in media:
        first, last = medium.start, medium.start + medium.length
        for block in range(first // block_tokens, -(-last // block_tokens)):
            place = first - block * block_tokens
            said = _spell("medium", medium.digest, place, medium.length)
            extras[block] = extras.get(block, b"") + said
    return extras


class MediumDigests:
    """Digests of what the model is given for an image; an item that comes again is not read again.

    vLLM's own identifier of an image is not enough: a client may choose it (`multi_modal_uuids`),
    and then it says nothing about the image. It is in the digest all the same, since vLLM looks up
    the image's encoding by it.
    """

    def __init__(self) -> None:
        """Know none."""
        self._seen: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        self._named: dict[str, bytes] = {}  # identifier -> the data that it stood for first

    def media(self, features: Iterable[Any]) -> list[Medium] | None:
        """Return the media of vLLM's `mm_features`, None if they cannot be told.

        That is so where vLLM has not the data of one, or where its identifier has stood for other
        data: then vLLM may compute with what it has cached of that.
        """
        media = []
        for feature in features:
            data = self._data_digest(feature.data)
            if data is None:
                return None
            known = feature.identifier in self._named or len(self._named) < _NAMES_MAX
            if not known or self._named.setdefault(feature.identifier, data) != data:
                return None
            position = feature.mm_position
            digest = blake3(_spell(feature.modality, feature.identifier) + data)
            if position.is_embed is not None:
                _read(digest, position.is_embed)
            media.append(Medium(digest.hexdigest(), position.offset, position.length))
        return media

    def _data_digest(self, item: Any) -> bytes | None:
        """Return the digest of an item's tensors, None if there are none or they are unknown."""
        if not item:
            return None
        number = id(item)
        seen = self._seen.get(number)
        if seen and seen[0]() is item:
            return seen[1]
        digest, tensors = blake3(), 0
        try:
            for name, element in sorted(item.items()):
                digest.update(_spell("field", name))
                tensors += _read(digest, element.data)
        except TypeError:
            return None
        if not tensors:  # an address in memory that vLLM's processor shares with its worker
            return None
        alive = weakref.ref(item, lambda _: self._seen.pop(number, None))
        self._seen[number] = (alive, digest.digest())
        return digest.digest()


def _read(digest: blake3, data: Any) -> int:
    """Mix in a tensor or a nest of them; return how many. Raises TypeError for anything else."""
    if isinstance(data, torch.Tensor):
        digest.update(_spell("tensor", str(data.dtype), *data.shape))
        plain = data.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
        return 1
    if isinstance(data, list | tuple):
        digest.update(_spell("list", len(data)))
        return sum(_read(digest, each) for each in data)
    if isinstance(data, int | float | str):
        digest.update(_spell("value", repr(data)))
        return 0
    raise TypeError(f"no digest of a {type(data).__name__}")


def _spell(*fields: str | int) -> bytes:
    """Return the fields in bytes that no other list of fields spells."""
    plain = [str(field).encode() for field in fields]
    return b"".join(struct.pack("<I", len(field)) + field for field in plain)
