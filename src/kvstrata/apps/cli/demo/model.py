"""The demo's model: a small Llama with random weights and a byte-level tokenizer, made offline.

Sizes are a compromise: enough multiplications per token that a long prompt
takes seconds on two cores, few KV heads so that a block of 64 tokens stays at half a MiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["CONTEXT_TOKENS_MAX", "SPECIAL_TOKENS", "make_model"]

CONTEXT_TOKENS_MAX: Final = 4096
"""Longest context that the model declares."""

SPECIAL_TOKENS: Final = (
    "<pad>",
    "<s>",
    "</s>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
"""Tokens that are no byte, in the order of their ids, which start at 0."""

_HIDDEN: Final = 768
_INTERMEDIATE: Final = 4096
_LAYERS: Final = 8
_HEADS: Final = 12
_KV_HEADS: Final = 2
_HEAD: Final = 64
_VOCABULARY: Final = 256 + len(SPECIAL_TOKENS)
# Wide enough that greedy answers vary with the whole prompt; Llama's 0.02 soon repeats itself.
_WEIGHT_DEVIATION: Final = 0.05

# Of the seeds tried, the one whose answers leave most room for rounding: in the whole conversation
# the best token leads the next by 0.005 in log-probability or more; rounding moves it by 0.00001.
_SEED: Final = 11

_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(target: Path, *, seed: int = _SEED) -> None:
    """Write model and tokenizer into the directory `target`; the same seed gives the same bytes."""
    target.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    weights = {name: _tensor(generator, shape) for name, shape in _shapes()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", _model_config())
    _write_json(target / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _tokenizer().save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config())


def _tensor(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    if len(shape) == 1:  # the only vectors are the scales of the norms
        return np.ones(shape, dtype=np.float32)
    tensor = generator.standard_normal(shape, dtype=np.float32)
    tensor *= np.float32(_WEIGHT_DEVIATION)
    return tensor


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (_VOCABULARY, _HIDDEN)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (_HIDDEN,)
        yield prefix + "self_attn.q_proj.weight", (_HEADS * _HEAD, _HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (_KV_HEADS * _HEAD, _HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (_KV_HEADS * _HEAD, _HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (_HIDDEN, _HEADS * _HEAD)
        yield prefix + "post_attention_layernorm.weight", (_HIDDEN,)
        yield prefix + "mlp.gate_proj.weight", (_INTERMEDIATE, _HIDDEN)
        yield prefix + "mlp.up_proj.weight", (_INTERMEDIATE, _HIDDEN)
        yield prefix + "mlp.down_proj.weight", (_HIDDEN, _INTERMEDIATE)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_VOCABULARY, _HIDDEN)


def _model_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "initializer_range": _WEIGHT_DEVIATION,
        "intermediate_size": _INTERMEDIATE,
        "max_position_embeddings": CONTEXT_TOKENS_MAX,
        "mlp_bias": False,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": _VOCABULARY,
    }


def _tokenizer() -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    assert len(vocabulary) == _VOCABULARY, "a special token collides with a byte"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS_MAX,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
