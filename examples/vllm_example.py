"""A prompt answered by vLLM twice; the second time its KV comes from kvstrata.

python examples/vllm_example.py

With a model of your own: put its path or hub name where the tiny one is written.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tiny_llama import PROMPT, write_tiny_llama
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import KVTransferConfig

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def main(folder: Path) -> None:
    """Answer, forget what vLLM itself has cached, answer again, and compare."""
    llm = LLM(
        str(write_tiny_llama(folder / "model")),
        dtype="float32",
        max_model_len=512,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvstrataConnector",
            kv_connector_module_path="kvstrata.connectors.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"tiers": f"host:256MiB,disk:{folder}/blocks:256MiB"},
        ),
    )
    first = ask(llm, "first time")
    assert llm.reset_prefix_cache()  # from here on, every hit is kvstrata's
    again = ask(llm, "again")
    if first != again:
        sys.exit("the answers differ")
    print("the answers are the same")


def ask(llm: LLM, when: str) -> list[int]:
    """Return the answer's tokens; print where the prompt's KV came from."""
    output: RequestOutput
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], GREEDY, use_tqdm=False)
    tokens_from = output.kv_transfer_params["kvstrata"]["tokens_from"]
    print(f"{when}: of {len(PROMPT)} tokens loaded {tokens_from}")
    return list(output.outputs[0].token_ids)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
