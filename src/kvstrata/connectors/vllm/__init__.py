"""vLLM's KV connector: name `kvstrata.connectors.vllm` as `kv_connector_module_path`.

Nothing here may import numba, early or at all: vLLM's CPU build does not survive it.
"""

from kvstrata.connectors.vllm.connector import KvstrataConnector

__all__ = ["KvstrataConnector"]
