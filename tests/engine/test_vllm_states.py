"""Models with recurrent states (Qwen3-Next): a hit needs the state at its very end."""

from __future__ import annotations

import random

import pytest
from kit import write_qwen3_next

from kvstrata.core.errors import ConfigError

pytestmark = pytest.mark.engine

PAGE = 96
"""vLLM makes pages of attention as long as states are."""
LENGTHS = (1, 60, 95, 96, 97, 98, 120, 150, 180, 191, 192, 193, 200, 240, 287, 288, 289, 300)
LENGTHS += (350, 383, 384, 385, 400, 450, 480, 481, 530, 600, 671, 672)
HITS = [(length - 1) // PAGE * PAGE for length in LENGTHS]
"""All but the last token may be loaded, up to where a state was kept: the last end of a block."""
NOTHING = [0] * len(LENGTHS)
OPTIONS = {"dtype": "bfloat16", "max_model_len": 1024}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_qwen3_next(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def prompts():
    luck = random.Random(0)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def longer(prompts):
    """Prompts that go on where others ended."""
    return [prompt + [7 + place % 300 for place in range(250)] for prompt in prompts[5:24:6]]


@pytest.fixture(scope="module")
def alone(engine_on, qwen, prompts, longer):
    """What vLLM answers without kvstrata: to the prompts, the longer ones, and a conversation."""
    with engine_on(model=qwen, **OPTIONS) as engine:
        answers, more = _tokens(engine.ask(prompts, 8)), _tokens(engine.ask(longer, 8))
        said = engine.ask([prompts[7]], max_tokens=130)[0].tokens
        next_turn = [*prompts[7], *said, 5, 6, 7]
        spoken = said, next_turn, engine.ask([next_turn])[0].tokens
    assert len(set(answers)) == len(answers), "answers that are all the same show nothing"
    return answers, more, spoken


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from.get(tier, 0) for answer in answers]


def test_host_then_disk_after_restart(engine_on, qwen, prompts, longer, alone, tmp_path):
    extra = {"tiers": f"host:128MiB,disk:{tmp_path}:128MiB"}
    answers, more, (said, next_turn, spoken) = alone
    with engine_on(extra, model=qwen, **OPTIONS) as engine:
        cold = engine.ask(prompts, 8)
        engine.forget()
        warm = engine.ask(prompts, 8)
        engine.forget()
        single = [engine.ask([prompt], 8)[0] for prompt in prompts[4::5]]
        engine.forget()
        extended = engine.ask(longer, 8)
        salted = engine.ask(prompts[10:20], 8, cache_salt="another")
        engine.forget()
        first = engine.ask([prompts[7]], max_tokens=130)[0]
        engine.forget()
        second = engine.ask([next_turn])[0]
        engine.wait_idle()
        assert engine.counters()["corrupt_blocks"] == 0
    assert _tokens(cold) == _tokens(warm) == answers
    assert _tokens(single) == answers[4::5]
    assert _from(cold, "host") == NOTHING
    assert _from(warm, "host") == HITS
    assert _from(single, "host") == HITS[4::5]
    assert _tokens(extended) == more
    assert _from(extended, "host") == HITS[5:24:6], "where the shorter prompt had its state"
    assert _tokens(salted) == answers[10:20]
    assert sum(_from(salted, "host")) == 0
    assert (first.tokens, second.tokens) == (said, spoken)
    assert second.tokens_from["host"] == 288, "a state that was computed while decoding"
    with engine_on(extra, model=qwen, **OPTIONS) as engine:
        restarted = engine.ask(prompts, 8)
    assert _tokens(restarted) == answers
    assert _from(restarted, "disk") == HITS
