"""A connector for vLLM that does nothing: what it costs is vLLM's own price of having one.

Found by vLLM under the module's name, which `vllm_child.py` puts on the path. It asks for the same
layout as kvstrata's connector does, so that both compute on the same cache.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

__all__ = ["NullConnector"]


class _Nothing(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped
    """A step's plan without a job."""


class NullConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM is untyped
    """Every answer is a miss; nothing is saved."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Ask for what kvstrata asks for."""
        del vllm_config
        return "LBHNC"

    @property
    def requires_kv_delivery(self) -> bool:
        """False, as kvstrata's."""
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Miss."""
        del request, num_computed_tokens
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Plan nothing."""
        del scheduler_output
        return _Nothing()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Let vLLM have its pages back."""
        del request, block_ids
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""
