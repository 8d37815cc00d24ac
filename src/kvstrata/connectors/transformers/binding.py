"""One model and its daemon: everything that is checked once, before the first block moves."""

from __future__ import annotations

import inspect
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from transformers.cache_utils import DynamicCache

from kvstrata.connectors.transformers.eligibility import CACHE_WORDS, cache_word, refuse_model
from kvstrata.connectors.transformers.identity import ModelWatch, model_namespace
from kvstrata.connectors.transformers.prefixes import Geometry, Layers, Prefixes
from kvstrata.core.config import BLOCK_TOKENS_DEFAULT, Limits, NodeConfig, parse_tiers
from kvstrata.core.errors import DaemonError, LayoutError
from kvstrata.runtime.session import Session, SessionLimits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Binding", "Settings"]

_TAIL_TOKENS: Final = 4
_ROUNDING_MAX: Final = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUNDING_MAX_HALF: Final = 0.25
"""Largest difference, as a share of the largest number, that other shapes of the same product may
make; a wrong position or a look ahead makes differences of the size of the numbers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of `KvstrataCache.for_model`."""

    tiers: str
    """Tiers of a private daemon."""
    address: str | None
    """A shared daemon's address, None for a private one."""
    salt: str
    """Blocks of one salt are not found under another."""
    tenant: str
    """Who is charged for what is stored."""
    block_tokens: int = BLOCK_TOKENS_DEFAULT
    """Tokens in one block."""
    weights_revision: str = ""
    """Name of the weights; empty reads them all."""
    prefill_tokens_per_s: float = 0.0
    """How fast the model computes a prompt; 0 loads whatever is kept."""
    load_timeout_s: float = 5.0
    """Longest wait of a prompt for its blocks."""
    secret_file: str | None = None
    """File with the cluster secret of a private daemon."""
    limits: SessionLimits | None = None
    """How long the daemon is waited for."""
    model_name: str = ""
    """Name under which other engines keep blocks of this model; empty shares with none."""


class Binding:
    """A model that is known to be served rightly, with an opened session and a hook in it."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        """Check the model, reach the daemon, store and load one block and compare.

        Raises LayoutError for a model that is not served, ConfigError for settings that cannot
        be, DaemonError if no daemon answers.
        """
        refuse_model(model)
        self.model = model
        self.closed = False
        self.settings = settings
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        whole, tokens = _canary_tokens(model, settings.block_tokens)
        layout = (geometry := _geometry(model, whole)).block_layout(settings.block_tokens)
        namespace = model_namespace(
            model, layout, revision=settings.weights_revision, name=settings.model_name
        )
        limits = Limits(staging_timeout_s=settings.load_timeout_s)
        where = settings.address or NodeConfig(
            parse_tiers(settings.tiers), settings.secret_file, limits
        )
        session = Session(where, layout, namespace, settings.limits, bridges=True)
        session.open()
        self.prefixes = Prefixes(session, geometry, timeout_s=settings.load_timeout_s)
        try:
            self._canary(whole, tokens)
        except BaseException:
            self.prefixes.close()
            raise
        self.prefixes.prefill_tokens_per_s = settings.prefill_tokens_per_s
        self._watch = ModelWatch(model)
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies of a cache share the model and the session."""
        return self

    @property
    def layers(self) -> int:
        """Layers that have KV."""
        return int(self.prefixes.session.layout.dimensions[0].size)

    def unusable(self) -> str:
        """Return why the model computes other numbers than those kept, empty if it does not."""
        if torch.is_autocast_enabled(self.model.device.type):
            return "autocast"
        return self._watch.changed()

    def close(self) -> None:
        """Take the hook out of the model and leave the daemon; twice is harmless."""
        self.closed = True
        self._hook.remove()
        self.prefixes.close()

    def _before_forward(
        self, model: PreTrainedModel, arguments: tuple[Any, ...], given: dict[str, Any]
    ) -> None:
        """Tell a cache of ours what the model is about to compute."""
        del model
        named = dict(zip(self._parameters, arguments, strict=False)) | given
        for cache in map(named.get, CACHE_WORDS):
            if getattr(cache, "binding", None) is self:
                cache.note_forward(named)  # type: ignore[union-attr]
                return

    def _canary(self, whole: _Computed, tokens: list[int]) -> None:
        """Store a block and load it; it must be the same bits, and the model must go on with it.

        A prefix computed alone must agree too: a model that looks ahead would not.
        """
        size, salt = self.settings.block_tokens, f"canary {secrets.token_hex(16)}"
        kept = [(k[:, :, :size], v[:, :, :size]) for k, v in whole.layers]
        prefixes = self.prefixes
        tenant = self.settings.tenant
        if prefixes.store([tokens[:size]], kept, salt=salt, tenant=tenant) != 1:
            raise DaemonError(f"the daemon did not store the canary: {prefixes.statistics}")
        ready, layers = prefixes.load([tokens], salt=salt, tenant=tenant)
        same = ready == size and all(
            torch.equal(_bits(ours), _bits(theirs))
            for pair in zip(layers, kept, strict=True)
            for ours, theirs in zip(*pair, strict=True)
        )
        if not same:
            raise LayoutError(
                "the canary came back as other bits than were stored",
                hint="report it, with the output of kvstrata doctor",
            )
        prefixes.forget(tokens[:size], salt=salt, tenant=tenant)
        alone = _compute(self.model, tokens[:size])
        resumed = _compute(self.model, tokens[size:], layers)
        for ours, theirs in [(resumed.logits, whole.logits), *_pairs(alone.layers, kept)]:
            if _difference(ours, theirs) > _ROUNDING_MAX.get(ours.dtype, _ROUNDING_MAX_HALF):
                raise LayoutError(
                    f"{type(self.model).__name__}: what it computes for a text depends on more "
                    "than the tokens before it",
                    hint="use transformers without this cache",
                )
        prefixes.statistics = type(prefixes.statistics)()


@dataclass(frozen=True, slots=True)
class _Computed:
    logits: torch.Tensor  # of the last token
    layers: Layers


def _canary_tokens(model: PreTrainedModel, block_tokens: int) -> tuple[_Computed, list[int]]:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = [(7 + 7919 * place) % vocabulary for place in range(block_tokens + _TAIL_TOKENS)]
    return _compute(model, tokens), tokens


def _compute(model: PreTrainedModel, tokens: list[int], layers: Layers | None = None) -> _Computed:
    """Return what the model makes of `tokens`, behind those whose KV is given."""
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(layers or ()):
        cache.update(keys, values, number)
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        given = {"input_ids": ids, cache_word(model): cache, "use_cache": True}
        logits = model(**given).logits[0, -1]
    return _Computed(logits, [(layer.keys, layer.values) for layer in cache.layers])


def _geometry(model: PreTrainedModel, computed: _Computed) -> Geometry:
    """Return what the model's KV is, as it was just computed; raises LayoutError if uneven."""
    tensors = [each for pair in computed.layers for each in pair]
    kinds = {(tuple(each.shape), each.dtype) for each in tensors if each is not None}
    if len(kinds) != 1 or any(each is None for each in tensors):
        raise LayoutError(
            f"{type(model).__name__}: its layers have KV of several kinds: {kinds}",
            hint="use transformers without this cache",
        )
    ((shape, dtype),) = kinds
    devices = tuple(keys.device for keys, _ in computed.layers)
    return Geometry(heads=shape[1], channels=shape[3], dtype=dtype, devices=devices)


def _pairs(ours: Layers, theirs: Layers) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        pair
        for one, other in zip(ours, theirs, strict=True)
        for pair in zip(one, other, strict=True)
    ]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = max(float(theirs.abs().max()), torch.finfo(theirs.dtype).tiny)
    share: float = float((ours - theirs).abs().max()) / scale
    return share


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().cpu().view(torch.uint8)
