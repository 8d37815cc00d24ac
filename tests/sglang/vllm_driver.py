"""Runs one vLLM engine and answers orders, one JSON line each; for another environment's Python.

python vllm_driver.py ORDERS_FD ANSWERS_FD ARGUMENTS_JSON
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)


def main() -> None:
    """Start the engine, say so, and serve until the orders end."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    orders, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    arguments = json.loads(sys.argv[3])
    transfer = KVTransferConfig(
        kv_connector="KvstrataConnector",
        kv_connector_module_path="kvstrata.connectors.vllm",
        kv_role="kv_both",
        kv_connector_extra_config=arguments.pop("kvstrata"),
    )
    llm = LLM(**arguments, kv_transfer_config=transfer)
    say("started")
    for line in orders:
        order = json.loads(line)
        if order["do"] == "forget":
            say(llm.reset_prefix_cache())
            continue
        given = order["given"]
        sampling = SamplingParams(
            temperature=0, max_tokens=given["max_tokens"], ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        said = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "from": (output.kv_transfer_params or {})["kvstrata"]["tokens_from"],
            }
            for output in outputs
        ]
        say(said)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
