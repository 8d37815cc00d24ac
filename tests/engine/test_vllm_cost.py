"""What an engine that finds nothing pays, in messages and calls instead of in seconds."""

from __future__ import annotations

import random
from collections import Counter

import pytest

pytestmark = pytest.mark.engine

REQUESTS = 4
BLOCKS = 3
ANSWER_TOKENS = 8


def _prompts(seed):
    luck = random.Random(seed)
    return [[luck.randrange(3, 512) for _ in range(64 * BLOCKS + 5)] for _ in range(REQUESTS)]


class _Count:
    """Counts steps, and messages to the daemon."""

    def __init__(self, engine):
        self.steps = 0
        self.messages = Counter()
        half = engine.connector._scheduler
        link, build = half.session._link, half.build_plan
        send = link.send

        def built(output):
            self.steps += 1
            return build(output)

        def sent(call, timeout_s):
            self.messages[type(call).__name__] += 1
            return send(call, timeout_s)

        half.build_plan, link.send = built, sent


def test_a_missing_engine_sends_what_it_must_and_no_more(engine_on):
    with engine_on({"tiers": "host:64MiB"}) as engine:
        count = _Count(engine)
        answers = engine.ask(_prompts(1), ANSWER_TOKENS)
        assert not any(each.cached for each in answers)
        assert count.steps >= ANSWER_TOKENS
        # One question a request; one message for all that missed in one step; and for each request
        # that completes blocks slots to fill and their seal.
        said = count.messages
        assert set(said) == {"Lookup", "Release", "Reserve", "Seal"}
        assert said["Lookup"] == REQUESTS
        assert 1 <= said["Release"] <= 2, "requests that miss in one step are let go of together"
        assert REQUESTS <= said["Reserve"] <= REQUESTS + 1
        assert said["Seal"] == said["Reserve"]

        count.messages.clear()
        store = {"extra_args": {"kv_transfer_params": {"kvstrata": {"store": False}}}}
        answers = engine.ask(_prompts(2), ANSWER_TOKENS, sampling=store)
        assert not any(each.cached for each in answers)
        assert set(said) == {"Lookup", "Release"}
        assert said["Lookup"] == REQUESTS
        assert 1 <= said["Release"] <= 2

        # Steps that neither begin a request nor complete a block say nothing at all.
        steps, lengths = count.steps, [each[:60] for each in _prompts(3)]
        count.messages.clear()
        engine.ask(lengths, 2)
        assert count.steps > steps
        assert not said
