"""A connector to stand beside ours: it says what the test wants, and loads nothing."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)


class Plan(KVConnectorMetadata):
    """Pages that are said to be loaded, and are not."""

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages


class SiblingConnector(KVConnectorBase_V1):
    """Promises `promise` tokens to the next request, within a step, and fails to bring them."""

    promise: ClassVar[int] = 0
    asked: ClassVar[list[str]] = []

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._pages: list[int] = []
        self._failed: set[int] = set()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return KVConnectorHandshakeMetadata()

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        type(self).asked.append(request.request_id)
        return max(0, type(self).promise - computed), False

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        del request
        if external:
            (pages,) = blocks.get_block_ids()
            self._pages += pages[: external // 32]
            type(self).promise = 0

    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        del scheduler_output
        pages, self._pages = self._pages, []
        return Plan(pages)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any]]:
        del request, block_ids
        return False, {"sibling": True}

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        del forward_context, kwargs
        self._failed |= set(self._get_connector_metadata().pages)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""


class HybridSiblingConnector(SiblingConnector, SupportsHMA):
    """The same for models with several cache groups."""

    def request_finished_all_groups(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, dict[str, Any]]:
        return self.request_finished(request, block_ids)
