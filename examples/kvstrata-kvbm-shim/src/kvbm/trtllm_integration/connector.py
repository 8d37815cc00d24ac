"""The two classes of the preset."""

from __future__ import annotations

import os

from kvbm.trtllm_integration.variables import translated
from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker
from kvstrata.connectors.trtllm.settings import ConnectorSettings, read_settings

__all__ = ["DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"]


class DynamoKVBMConnectorLeader(KvstrataScheduler):
    """kvstrata's scheduler half, by the preset's name."""

    @classmethod
    def connector_settings(cls) -> ConnectorSettings:
        """Return kvstrata's settings, from KVBM's variables if there are none of ours."""
        return read_settings(translated(os.environ))


class DynamoKVBMConnectorWorker(KvstrataWorker):
    """kvstrata's worker half, by the preset's name."""

    @classmethod
    def connector_settings(cls) -> ConnectorSettings:
        """Return kvstrata's settings, from KVBM's variables if there are none of ours."""
        return read_settings(translated(os.environ))
