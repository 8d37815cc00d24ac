"""Requests whose KV depends on more than tokens and salt are served without the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def kept_engine(engine_on, prompts):
    """An engine whose daemon keeps the blocks of every prompt."""
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.wait_idle()
        yield engine


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, 256),
        ({"resumable": True}, 0),
        ({"mm_features": [SimpleNamespace(data=None)]}, 0),
        ({"prompt_embeds": object()}, 0),
        ({"pooling_params": object()}, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_tokens_do_not_say_is_not_served(kept_engine, prompts, change, served):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    request = Request(
        request_id=f"probe-{'-'.join(change)}",
        prompt_token_ids=prompts[2],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
    )
    for name, value in change.items():
        setattr(request, name, value)
    connector = kept_engine.connector
    assert connector.get_num_new_matched_tokens(request, 0) == (served, served > 0)
    connector.request_finished(request, [])
