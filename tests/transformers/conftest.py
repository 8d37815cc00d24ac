"""Tiny models of transformers, made here with random weights: no network, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

VOCABULARY = 300
BLOCK = 16
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # answers that vary with the whole prompt
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_model(kind: str = "Llama", seed: int = 0, dtype: str = "float32", **changes: Any) -> Any:
    """A model of `kind` in evaluation mode; the same arguments give the same weights."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sizes = SIZES | ({"head_dim": 16} if kind.startswith("Qwen3") else {}) | changes
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._attn_implementation = changes.get("attn_implementation", "sdpa")
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.to(getattr(torch, dtype)).eval()


def make_ids(tokens: int, seed: int = 0, rows: int = 1) -> Any:
    """Random token ids, `[rows, tokens]`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests say `past_key_values` as users of all releases do; 5.24 warns of it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"))


def answer(source: Any, ids: Any, tokens: int = 6, **options: Any) -> Any:
    """What a model, or a cache for it, answers greedily; prompt included."""
    return source.generate(ids, max_new_tokens=tokens, **({"do_sample": False} | options))


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What tests share: models, inputs, answers."""
    return SimpleNamespace(model=make_model, ids=make_ids, answer=answer)


@pytest.fixture(scope="session")
def llama() -> Any:
    """One model for the tests that do not change it."""
    return make_model()


@pytest.fixture
def make_cache() -> Iterator[Callable[..., Any]]:
    """Makes caches, and closes them with the test."""
    from kvstrata.connectors.transformers import KvstrataCache

    made = []

    def make(model: Any, **settings: Any) -> Any:
        cache = KvstrataCache.for_model(
            model, **({"tiers": "host:16MiB", "block_tokens": BLOCK} | settings)
        )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()
