"""Every shipped policy under the laws of the seam."""

from __future__ import annotations

import pytest

from kvstrata.policy import make_policy, policy_names
from kvstrata.testing.contracts.eviction_policy import EvictionPolicyContract


@pytest.mark.parametrize("name", policy_names())
class TestPolicy(EvictionPolicyContract):
    @pytest.fixture
    def new_policy(self, name):
        return make_policy(name)
