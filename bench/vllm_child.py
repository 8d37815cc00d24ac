"""One vLLM of `engines.py`, in a process of its own: JSON lines in, JSON lines out.

    python vllm_child.py ORDERS_FD ANSWERS_FD ARGUMENTS_JSON

Arguments: `model` (a folder), `way` (see `transfer_config`), `folder`, `address`, `context_tokens`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",  # the other core is the daemon's, the copying threads' and the disk's
    HF_HUB_OFFLINE="1",
    LMCACHE_TRACK_USAGE="false",
)
# A script's own folder comes first on the path, and this one has files named like packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]

BLOCK_TOKENS = 64
PAGE_TOKENS = 32
HOST_BYTES = 1 << 30


def transfer_config(way: str, folder: str, address: str) -> dict[str, Any] | None:
    """Return what `way` adds to vLLM's configuration; None for a vLLM alone."""
    if way == "alone":
        return None
    if way == "kvstrata":
        return {
            "kv_connector": "KvstrataConnector",
            "kv_connector_module_path": "kvstrata.connectors.vllm",
            "kv_connector_extra_config": {
                "tiers": f"host:{HOST_BYTES},disk:{folder}:4GiB",
                "block_tokens": BLOCK_TOKENS,
            },
        }
    if way == "null":
        return {"kv_connector": "NullConnector", "kv_connector_module_path": "vllm_null"}
    if way == "tiering":  # vLLM's own, with its file system tier; it has no CPU platform itself
        return {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "vllm_tiering",
                "cpu_bytes_to_use": HOST_BYTES,
                "blocks_per_chunk": 1,
                "secondary_tiers": [{"type": "fs", "root_dir": folder}],
            },
        }
    host, _, port = address.rpartition(":")
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_extra_config": {"lmcache.mp.host": host, "lmcache.mp.port": int(port)},
    }


def make_engine(arguments: dict[str, Any]) -> Any:
    """Return a vLLM."""
    if arguments["way"] in {"tiering", "null"}:
        sys.path.append(str(Path(__file__).parent / "peers"))
    if arguments["way"] == "lmcache":
        _let_numba_be()
    from vllm import LLM
    from vllm.config import KVTransferConfig

    added = transfer_config(arguments["way"], arguments["folder"], arguments["address"])
    return LLM(
        arguments["model"],
        enforce_eager=True,
        dtype="float32",
        block_size=PAGE_TOKENS,
        max_model_len=arguments["context_tokens"],
        max_num_seqs=8,
        max_num_batched_tokens=arguments["context_tokens"],
        kv_cache_memory_bytes=arguments["cache_bytes"],
        skip_tokenizer_init=True,
        kv_transfer_config=added and KVTransferConfig(kv_role="kv_both", **added),
    )


def _let_numba_be() -> None:
    """Let vLLM's dispatcher pass over what numba, which LMCache imports, put into modules."""
    import builtins

    from vllm.triton_utils import dispatcher

    def only_dicts(value: Any) -> Any:
        found = builtins.vars(value)
        return found if isinstance(found, dict) else {}

    dispatcher.vars = only_dicts  # type: ignore[attr-defined]


def ask(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Answer all prompts greedily, and say how long that took."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=order["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        extra_args=order.get("extra"),
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
    began = time.perf_counter(), time.process_time(), time.thread_time(), daemon_seconds(llm)
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    ended = time.perf_counter(), time.process_time(), time.thread_time(), daemon_seconds(llm)
    took, process, thread, daemon = (b - a for a, b in zip(began, ended, strict=True))
    return {
        "seconds": took,
        "cpu": {"engine": thread, "engine's other threads": process - thread, "daemon": daemon},
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "cached": [each.num_cached_tokens or 0 for each in outputs],
    }


def daemon_seconds(llm: Any) -> float:
    """Return the CPU time that the engine's daemon has spent so far, 0 without one."""
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    pid = getattr(connector, "daemon_pid", 0)
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


SCHEDULER_CALLS = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
    "update_connector_output", "request_finished_all_groups", "get_kv_connector_stats",
    "take_events",
)  # fmt: skip
WORKER_CALLS = (
    "bind_connector_metadata", "start_load_kv", "wait_for_layer_load", "save_kv_layer",
    "wait_for_save", "get_transfer_results", "get_block_ids_with_load_errors",
    "build_connector_worker_meta", "get_kv_connector_stats", "clear_connector_metadata",
)  # fmt: skip


def account(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Answer like `ask` and say, for each call of vLLM to its connector, how often and how long.

    Inner calls are named after a dot: each message to kvstrata's daemon, waiting included.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector
    calls: dict[str, list[float]] = {}
    worker = get_kv_transfer_group()
    watched = [(scheduler, name, f"scheduler: {name}") for name in SCHEDULER_CALLS]
    watched += [(worker, name, f"worker: {name}") for name in WORKER_CALLS]
    for owner, name, label in watched:
        setattr(owner, name, _timed(getattr(owner, name), calls, label))
    half = getattr(scheduler, "_scheduler", None)
    if half is not None:
        watched += [(half.session, name, f". {name}") for name in ("call", "tell_all")]
        for name in ("call", "tell_all"):
            setattr(half.session, name, _timed(getattr(half.session, name), calls, f". {name}"))
    try:
        answer = ask(llm, order)
    finally:
        for owner, name, _ in watched:
            delattr(owner, name)
    return {"seconds": answer["seconds"], "cached": answer["cached"], "calls": calls}


def _timed(function: Any, calls: dict[str, list[float]], label: str) -> Any:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            name = f"{label} {type(arguments[0]).__name__}" if label == ". call" else label
            entry = calls.setdefault(name, [0, 0.0])
            entry[0] += 1
            entry[1] += time.perf_counter() - began

    return timed


def settle(llm: Any, way: str) -> None:
    """Wait until what was saved is where it is to be."""
    if way in {"alone", "null"}:
        return
    if way != "kvstrata":
        for _ in range(20):  # nobody else can be asked
            time.sleep(0.1)
            llm.llm_engine.engine_core.engine_core.step()
        return
    from kvstrata.runtime.admin import AdminClient

    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    with AdminClient(connector.daemon_address) as admin:
        admin.wait_idle(60.0)


def forget(llm: Any) -> None:
    """Empty vLLM's own cache; a connector tells in a step of its own that it let pages go."""
    deadline = time.monotonic() + 60
    while not llm.reset_prefix_cache():
        assert time.monotonic() < deadline, "vLLM's cache does not come to rest"
        time.sleep(0.05)
        llm.llm_engine.engine_core.engine_core.step()


def main() -> None:
    """Start, say so, and serve until the orders end."""
    orders, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    arguments = json.loads(sys.argv[3])
    llm = make_engine(arguments)
    answers.write('"started"\n')
    answers.flush()
    for line in orders:
        order = json.loads(line)
        answer: Any = True
        if order["do"] == "ask":
            answer = ask(llm, order)
        elif order["do"] == "account":
            answer = account(llm, order)
        elif order["do"] == "settle":
            settle(llm, arguments["way"])
        else:
            forget(llm)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    llm.llm_engine.engine_core.shutdown()
    engine = llm.llm_engine.vllm_config.kv_transfer_config
    if arguments["way"] == "tiering":  # vLLM leaves its host region behind
        Path(f"/dev/shm/vllm_offload_{engine.engine_id}.mmap").unlink(  # noqa: S108  # its name
            missing_ok=True
        )


if __name__ == "__main__":
    main()
