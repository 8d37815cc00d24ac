"""A tiny Llama with random weights, so that the examples run offline and on a laptop."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["PROMPT", "write_tiny_llama"]

PROMPT = [3 + (17 * place + place * place // 5) % 500 for place in range(300)]
"""A prompt of 300 tokens: four blocks of 64, and 44 tokens that fill none."""


def write_tiny_llama(folder: Path) -> Path:
    """Write the model into `folder` and return it; its greedy answers vary with the prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder
