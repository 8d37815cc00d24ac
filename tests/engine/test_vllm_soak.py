"""64 mixed requests at once, over tiers that are too small; see tests/shared/soak.py."""

from __future__ import annotations

import pytest
from soak import soak

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_64_mixed_requests_at_once_answer_as_without_a_cache(engine_on, tiny_model, tmp_path):
    def run(model, extra, **options):
        return engine_on(extra, model=model, **options)

    report = soak(run, tmp_path, model=tiny_model, seconds=20, prompts=40)
    assert not report["mismatches"], report["wrong"]
    assert report["answers"] + report["aborts"] == report["requests"] > 64
    for seen in ("salted", "not_to_be_kept", "aborts", "resets", "preemptions"):
        assert report[seen] > 0, f"the mix had no {seen}"
    for tier in ("host", "disk"):
        assert report[f"requests_from_{tier}"] > 0, f"nothing came from {tier}"
    for daemon in report["daemons"]:  # 6 MiB of host are 48 blocks, 12 MiB of disk fewer than 97
        assert daemon["counters"]["stored_blocks"] > 48
        assert daemon["counters"]["written_blocks"] > 96
        assert daemon["counters"]["corrupt_blocks"] == 0
