"""One of several connectors under vLLM's MultiConnector."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.core.errors import ConfigError

pytestmark = pytest.mark.engine

OURS = {
    "kv_connector": "KvstrataConnector",
    "kv_connector_module_path": "kvstrata.connectors.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"tiers": "host:64MiB"},
}
SIBLING = {
    "kv_connector": "SiblingConnector",
    "kv_connector_module_path": "sibling",
    "kv_role": "kv_both",
}


@pytest.fixture
def multi(engine_on, monkeypatch):
    """`with multi(first, second) as engine:`; its `connector` is ours."""
    from contextlib import contextmanager

    from vllm.config import KVTransferConfig

    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    @contextmanager
    def start(*connectors):
        transfer = KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"connectors": list(connectors)},
        )
        with engine_on(kv_transfer_config=transfer) as engine:
            yield engine

    return start


def ours(engine):
    from kvstrata.connectors.vllm.connector import KvstrataConnector

    connectors = engine.connector.sub_connectors
    (found,) = [each for each in connectors if isinstance(each, KvstrataConnector)]
    return found


def settle(engine):
    from kvstrata.runtime.admin import AdminClient

    with AdminClient(ours(engine).daemon_address) as admin:
        admin.wait_idle(30)
        return admin.stats()["node"]["counters"]


@pytest.mark.parametrize("order", [(OURS, SIBLING), (SIBLING, OURS)], ids=["first", "second"])
def test_beside_another_connector_we_serve_as_alone(multi, prompts, reference, order):
    with multi(*order) as engine:
        # Whose handshake vLLM passes on depends on the order; a first step makes up for it.
        engine.ask([[5] * 40], max_tokens=2)
        for kept in ([0, 0, 0, 0], [64, 128, 256, 0]):
            engine.forget()
            answers = engine.ask(prompts)
            assert [answer.tokens for answer in answers] == reference
            assert [answer.cached for answer in answers] == kept
        assert settle(engine)["stored_blocks"] == 7
        transfer = engine.llm.llm_engine.vllm_config.kv_transfer_config
        assert transfer.kv_load_failure_policy == "recompute"


def test_statistics_come_together_by_name():
    """As in the API server, which has plain dictionaries from the engine's process."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    import kvstrata.connectors.vllm  # noqa: F401 - importing it is what registers the name

    found = MultiConnector.build_kv_connector_stats({"KvstrataConnector": {"loads": 3}})
    assert found["KvstrataConnector"].data == {"loads": 3}


def test_two_of_us_are_refused(multi):
    with pytest.raises(ConfigError, match="stands there twice") as caught, multi(OURS, OURS):
        pass
    assert caught.value.hint


def test_what_was_computed_on_a_siblings_failed_load_is_not_kept(multi, prompts, reference):
    from sibling import SiblingConnector

    with multi(SIBLING, OURS) as engine:
        engine.ask([[5] * 40], max_tokens=2)
        SiblingConnector.promise = 192
        (answer,) = engine.ask(prompts[2:3])
        assert SiblingConnector.promise == 0, "it was asked and has promised"
        assert answer.tokens == reference[2], "vLLM computes what did not come"
        settle(engine)
        engine.forget()
        (answer,) = engine.ask(prompts[2:3])
        assert answer.tokens == reference[2], "and we kept nothing of what came between"
