from __future__ import annotations

import pytest

from kvstrata.connectors.speeds import CopyMeter, PrefillMeter

# Recorded steps: (when scheduled, prompt tokens, all tokens, when ended), in seconds.
SYNCHRONOUS = [
    (0.000, 2048, 2048, 0.205),  # one prompt of 5000 tokens in three steps ...
    (0.206, 2048, 2048, 0.412),
    (0.413, 904, 904, 0.503),
    (0.504, 0, 1, 0.524),  # ... and its answer
    (0.525, 0, 1, 0.545),
    (9.000, 2000, 2000, 9.200),  # after a pause
    (9.201, 64, 264, 9.300),  # little of a prompt beside 200 answers
]
AHEAD = [  # the next step is scheduled while the device is busy with the one before
    (0.000, 2048, 2048, 0.205),
    (0.001, 2048, 2048, 0.410),
    (0.205, 904, 904, 0.500),
    (0.410, 0, 1, 0.520),
    (0.500, 0, 1, 0.540),
    (9.000, 2000, 2000, 9.200),
    (9.001, 0, 1, 9.220),
]


def play(recording) -> PrefillMeter:
    meter = PrefillMeter()
    events = []
    for step, (began, prompt, tokens, ended) in enumerate(recording, 1):
        events += [(began, 0, step, prompt, tokens), (ended, 1, step, 0, 0)]
    for at, is_end, step, prompt, tokens in sorted(events):
        if is_end:
            meter.ended(step, at)
        else:
            meter.scheduled(step, prompt, tokens, at)
    return meter


@pytest.mark.parametrize("recording", [SYNCHRONOUS, AHEAD])
def test_prompts_are_measured_and_answers_and_pauses_are_not(recording):
    assert play(recording).tokens_per_s == pytest.approx(10_000, rel=0.02)


def test_nothing_is_known_without_prompts():
    answers = [step for step in SYNCHRONOUS if not step[1]]
    assert play(answers).tokens_per_s == 0.0
    assert PrefillMeter().tokens_per_s == 0.0


def test_one_step_that_was_held_up_changes_nothing():
    steps = [(float(each), 1000, 1000, each + 0.1) for each in range(10)]
    steps[4] = (4.0, 1000, 1000, 4.99)
    assert play(steps).tokens_per_s == pytest.approx(10_000)


def test_short_prompts_do_not_outvote_a_long_one():
    long = (0.0, 8000, 8000, 1.0)
    short = [(float(each), 20, 20, each + 0.05) for each in range(1, 20)]  # 400 tokens/s
    assert play([long, *short]).tokens_per_s == pytest.approx(8000)


def test_it_follows_the_engine():
    fast = [(float(each), 1000, 1000, each + 0.1) for each in range(40)]
    slow = [(float(each), 1000, 1000, each + 0.5) for each in range(40, 60)]
    assert play(fast + slow).tokens_per_s == pytest.approx(2000)


def test_steps_that_nobody_reports_are_forgotten():
    meter = PrefillMeter()
    for step in range(1, 1000):
        meter.scheduled(step, 1000, 1000, float(step))
    meter.ended(5, 1000.0)  # of those that are no longer known
    assert meter.tokens_per_s == 0.0
    meter.ended(999, 1000.0)
    assert meter.tokens_per_s == 0.0, "nothing is left of a step that ended in no time"
    meter.scheduled(1000, 1000, 1000, 1000.0)
    meter.ended(1000, 1000.1)
    meter.ended(1000, 1000.2)
    assert meter.tokens_per_s == pytest.approx(10_000)


def test_a_clock_that_stands_or_goes_back_divides_nothing_by_zero():
    meter = PrefillMeter()
    for step, (began, ended) in enumerate([(1.0, 1.0), (0.0, 0.5), (0.6, 0.7), (5.0, 5.1)]):
        meter.scheduled(step, 100, 100, began)
        meter.ended(step, ended)
    assert meter.tokens_per_s == pytest.approx(1000)


def test_copies_are_bytes_over_seconds_and_recent_ones_count_more():
    meter = CopyMeter()
    assert meter.bytes_per_s == 0.0
    meter.copied(100, 0.0)
    meter.copied(0, 1.0)
    assert meter.bytes_per_s == 0.0
    meter.copied(1000, 0.1)
    assert meter.bytes_per_s == pytest.approx(10_000)
    for _ in range(60):
        meter.copied(1000, 1.0)
    assert meter.bytes_per_s == pytest.approx(1000, rel=0.01)
