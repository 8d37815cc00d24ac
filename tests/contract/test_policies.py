"""Every shipped policy under the laws of the seam."""

from __future__ import annotations

import pytest

from kvstrata.policy import LruPolicy
from kvstrata.testing.contracts.eviction_policy import EvictionPolicyContract


class TestLru(EvictionPolicyContract):
    @pytest.fixture
    def policy(self):
        return LruPolicy()

    def test_the_longest_idle_leaves_first(self, policy):
        policy.admit([0, 1, 2])
        policy.reclaim([0])
        policy.admit([0])
        assert policy.victims(3) == [1, 2, 0]
