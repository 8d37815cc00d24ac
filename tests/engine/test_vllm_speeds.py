"""The connector measures its engine and says so with each lookup."""

from __future__ import annotations

import random
import time

import pytest

pytestmark = pytest.mark.engine


def test_prefill_and_copies_are_measured_and_sent(engine_on):
    from kvstrata.runtime import messages as wire

    luck = random.Random(1)
    prompts = [[luck.randrange(3, 512) for _ in range(500)] for _ in range(12)]
    with engine_on({"tiers": "host:64MiB"}) as engine:
        session = engine.connector._scheduler.session
        said = []
        call = session.call

        def listen(message, kind):
            if isinstance(message, wire.Lookup):
                said.append(message)
            return call(message, kind)

        session.call = listen
        took = []
        for prompt in prompts:
            began = time.monotonic()
            engine.ask([prompt], max_tokens=4)
            took.append(time.monotonic() - began)
        engine.forget()
        engine.ask(prompts[:2], max_tokens=1)
        engine.ask([prompts[2]], max_tokens=1)
    assert said[0].prefill_tokens_per_s == 0.0, "nothing was measured yet"
    seen_outside = 500 / sorted(took)[len(took) // 2]  # with four tokens of answer in it
    assert seen_outside <= said[11].prefill_tokens_per_s * 1.5
    assert said[11].prefill_tokens_per_s <= 10 * seen_outside
    assert said[11].copy_bytes_per_s == 0.0, "nothing was loaded yet"
    assert said[-1].copy_bytes_per_s > 1e6
