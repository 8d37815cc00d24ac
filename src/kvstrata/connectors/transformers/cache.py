"""The cache that transformers is given: it loads what is kept, and keeps what is computed.

A cache of transformers sees keys and values and no tokens. So that nothing is ever stored under
tokens that it was not computed from, a hook in the model tells the cache what each forward is
about to compute: which tokens, at which positions, under which mask. What does not agree with
what the cache was begun for is refused if blocks were loaded, and not kept if none were.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvstrata.connectors.transformers.binding import Binding, Settings
from kvstrata.connectors.transformers.eligibility import CACHE_WORDS, cache_word, unserved
from kvstrata.connectors.transformers.prefixes import CacheStatistics
from kvstrata.core.config import BLOCK_TOKENS_DEFAULT
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX
from kvstrata.runtime.session import SessionLimits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KvstrataCache"]

log = logging.getLogger("kvstrata.transformers")

_KNOWN: Final = frozenset({
    *CACHE_WORDS, "input_ids", "attention_mask", "position_ids", "use_cache",
    "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states", "labels",
})  # fmt: skip
"""Arguments of a forward that are looked at, or that do not change keys and values."""


class KvstrataCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """A `DynamicCache` for one model whose prefixes are kept in kvstrata's tiers.

    It holds one sequence, or one batch of equally long ones, at a time: `begin` empties it and
    loads the longest kept prefix, `keep` stores the full blocks that it then holds; `generate`
    does both around the model's. A cache that was not begun refuses to be computed with.
    Not thread-safe: one cache, and one model, a thread.
    """

    def __init__(self, binding: Binding) -> None:
        """Use `for_model`."""
        super().__init__()
        self.binding = binding
        self.layer_class_to_replicate = None  # the layers are ours to make
        self._told: list[list[int]] = []  # tokens that the cache was begun for
        self._rows: list[list[int]] = []  # tokens that were computed or loaded
        self._seen = 0  # how many that are, known even where the tokens are not
        self._loaded = 0
        self._open = False
        self._unkept = ""  # why nothing of this sequence is stored
        self._salt = self._tenant = ""
        self._warned: set[str] = set()

    @classmethod
    def for_model(  # noqa: PLR0913  # settings, all by name
        cls,
        model: PreTrainedModel,
        *,
        tiers: str = "host:1GiB",
        address: str | None = None,
        salt: str = "",
        tenant: str = "",
        block_tokens: int = BLOCK_TOKENS_DEFAULT,
        model_name: str = "",
        weights_revision: str = "",
        prefill_tokens_per_s: float = 0.0,
        load_timeout_s: float = 5.0,
        secret_file: str | None = None,
        limits: SessionLimits | None = None,
    ) -> Self:
        """Return a cache for `model`, with the daemon at `address` or a private one with `tiers`.

        Reads all weights to name them, unless `weights_revision` does, and stores and loads one
        block to see that it comes back. With `model_name` blocks are shared with vLLM and
        SGLang engines of this name and of the same revision. Raises LayoutError for a model that
        is not served, ConfigError for settings that cannot be, DaemonError if no daemon answers.
        """
        _check(tenant, block_tokens)
        settings = Settings(
            tiers, address, salt, tenant, block_tokens, weights_revision,
            prefill_tokens_per_s, load_timeout_s, secret_file, limits, model_name,
        )  # fmt: skip
        return cls(Binding(model, settings))

    @property
    def address(self) -> str:
        """The daemon's address, for other clients and for `kvstrata stats`."""
        return self.binding.prefixes.session.daemon_address

    @property
    def statistics(self) -> CacheStatistics:
        """What was loaded, stored and left out so far."""
        return self.binding.prefixes.statistics

    # -- around a generation -------------------------------------------------------------------

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        salt: str | None = None,
        tenant: str | None = None,
        **options: Any,
    ) -> Any:
        """Return what `model.generate(input_ids, **options)` returns, computing less.

        What the cache does not serve (beams, padding, assisted decoding, ...) is passed to the
        model as it is, and counted in `statistics.unserved`.
        """
        if input_ids is None:
            input_ids = options.pop("inputs", None)
        model = self.binding.model
        reason = unserved(model, input_ids, options)
        if input_ids is not None and not reason:
            past = self.begin(input_ids, salt=salt, tenant=tenant)
            reason = self._unkept
        if input_ids is None or reason:
            self._open = False
            self._count(self.statistics.unserved, reason)
            return model.generate(input_ids, **options)
        try:
            output = model.generate(input_ids, **{cache_word(model): past}, **options)
        except BaseException:
            self._open = False
            raise
        self.keep()
        return output

    def begin(
        self,
        input_ids: torch.Tensor | Sequence[int],
        *,
        salt: str | None = None,
        tenant: str | None = None,
    ) -> Self:
        """Empty the cache, load the longest kept prefix of every row, and return the cache.

        `input_ids` is one row, or `[rows, tokens]`, with no padding. At least one token is left to
        compute. Raises ValueError for anything else, and after `close`.
        """
        if self.binding.closed:
            raise ValueError("this cache is closed (hint: make another with for_model)")
        rows = _rows_of(input_ids)
        self._reset(rows)
        settings = self.binding.settings
        self._salt = settings.salt if salt is None else salt
        self._tenant = settings.tenant if tenant is None else tenant
        _check(self._tenant, settings.block_tokens)
        self._unkept = self.binding.unusable()
        if self._unkept:
            return self
        tokens, layers = self.binding.prefixes.load(rows, salt=self._salt, tenant=self._tenant)
        for layer, (keys, values) in zip(self.layers, layers, strict=bool(tokens)):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        self._rows = [row[:tokens] for row in rows]
        self._seen = self._loaded = tokens
        return self

    def keep(self) -> int:
        """Store the full blocks that the cache holds, and close it until the next `begin`.

        Returns how many blocks were new. Errors of the daemon are counted, not raised.
        """
        if not self._open:
            return 0
        self._open = False
        reason = self._unkept or self.binding.unusable() or self._odd_layers()
        if reason:
            self._count(self.statistics.unkept, reason)
            return 0
        layers = [(layer.keys, layer.values) for layer in self.layers]
        return self.binding.prefixes.store(self._rows, layers, salt=self._salt, tenant=self._tenant)

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        self._open = False
        self.binding.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what transformers calls ---------------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *more: Any,
        **kw: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's KV of the tokens that the hook has told of."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        length = layer.get_seq_length() + key_states.shape[-2] if layer else -1
        if not self._open or length != self._seen:
            raise ValueError(
                "this cache is not begun for what is computed: call cache.begin(input_ids) before "
                "each generation, and give it to the model that it was made for"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *more, **kw)
        return keys, values

    def crop(self, *arguments: Any, **options: Any) -> None:
        """Take back the last tokens."""
        super().crop(*arguments, **options)
        self._seen = self.get_seq_length()
        self._rows = [row[: self._seen] for row in self._rows]
        self._told = [row[: self._seen] for row in self._told]
        self._loaded = min(self._loaded, self._seen)

    def reset(self) -> None:
        """Empty the cache; it must be begun again."""
        self._reset([])
        self._open = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Change the rows, as beam search does; nothing of them is kept then."""
        self._unkept = self._unkept or "rows reordered"
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows; nothing of them is kept then."""
        self._unkept = self._unkept or "rows repeated"
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows; nothing of them is kept then."""
        self._unkept = self._unkept or "rows selected"
        super().batch_select_indices(indices)

    def note_forward(self, given: Mapping[str, Any]) -> None:
        """Take note of what is about to be computed; raises ValueError if it is not what we hold.

        If nothing was loaded any computation is right, it is just not kept.
        """
        ids, inputs = given.get("input_ids"), given.get("inputs_embeds")
        if not self._open or (ids is None and inputs is None):
            return  # `update` refuses the first, the model the second
        reason = self._disagreement(given)
        if reason and self._loaded:
            self._open = False
            raise ValueError(
                f"{reason}: {self._loaded} tokens were loaded for another input (hint: call "
                "cache.begin with the input_ids of this generation, or use cache.generate)"
            )
        if reason:
            self._unkept = self._unkept or reason
        if ids is not None and not self._unkept:
            for row, new in zip(self._rows, ids.tolist(), strict=True):
                row.extend(new)
        shown: Any = inputs if ids is None else ids
        self._seen += int(shown.shape[1])

    # -- private -------------------------------------------------------------------------------

    def _reset(self, told: list[list[int]]) -> None:
        self.layers = [DynamicLayer() for _ in range(self.binding.layers)]
        self._told, self._rows = told, [[] for _ in told]
        self._seen = self._loaded = 0
        self._unkept = ""
        self._open = True

    def _disagreement(self, given: Mapping[str, Any]) -> str:
        """Return what keeps a forward from going on with what was begun, empty if nothing does."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        positions = given.get("position_ids")
        odd = [name for name, value in given.items() if value is not None and name not in _KNOWN]
        if torch.is_autocast_enabled(self.binding.model.device.type):
            odd.append("autocast")
        if odd or ids is None:
            return str(odd[0]) if odd else "no input_ids"
        if ids.ndim != 2 or ids.shape[0] != len(self._told):  # noqa: PLR2004
            return "other rows"
        begin, end = self._seen, self._seen + int(ids.shape[1])
        for told, new in zip(self._told, ids.tolist(), strict=True):
            ahead = told[begin:end]
            if new[: len(ahead)] != ahead:
                return "other tokens"
        whole = mask is None or (
            tuple(mask.shape) == (len(self._told), end) and bool((mask == 1).all())
        )
        if whole and positions is not None:
            expected = torch.arange(begin, end, device=positions.device)
            whole = positions.shape[-1] == len(expected)
            return "" if whole and bool((positions == expected).all()) else "position_ids"
        return "" if whole else "attention_mask"

    def _odd_layers(self) -> str:
        """Return what is wrong with the KV that we hold, empty if it is as it must be."""
        layout = self.binding.prefixes.session.layout
        sizes = {each.name: each.size for each in layout.dimensions}
        shape = (len(self._rows), sizes["head"], self._seen, sizes["channel"])
        if any(len(row) != self._seen for row in self._rows) or not self._rows:
            return "tokens not seen"
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is None or tuple(tensor.shape) != shape:
                    return "shape"
                if str(tensor.dtype) != f"torch.{layout.dtype}":
                    return "dtype"
        return ""

    def _count(self, counts: dict[str, int], reason: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("kvstrata does not serve this: %s (said once)", reason)


def _rows_of(input_ids: Any) -> list[list[int]]:
    rows = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    if rows and not isinstance(rows[0], list):
        rows = [rows]
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError("input_ids: give one row of token ids, or [rows, tokens] without padding")
    return rows


def _check(tenant: str, block_tokens: int) -> None:
    """Raise ConfigError for what no daemon would take."""
    if len(tenant) > TENANT_NAME_MAX:
        raise ConfigError(
            f"tenant: a name of {len(tenant)} characters", hint=f"at most {TENANT_NAME_MAX}"
        )
    if not 1 <= block_tokens <= 65536:  # noqa: PLR2004
        raise ConfigError(f"block_tokens: {block_tokens}", hint="give 1 to 65536, such as 64")
