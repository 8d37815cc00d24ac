"""TensorRT-LLM: both halves of its KV cache connector. Not run with TensorRT-LLM itself yet.

Name them in `kv_connector_config`; this package is importable without TensorRT-LLM.
"""

from kvstrata.connectors.trtllm.scheduler import KvstrataScheduler
from kvstrata.connectors.trtllm.worker import KvstrataWorker

__all__ = ["KvstrataScheduler", "KvstrataWorker"]
