"""Every shipped policy under the laws of the seam."""

from __future__ import annotations

import pytest

from kvstrata.policy import RankedPolicy, make_policy, policy_names
from kvstrata.testing.contracts.eviction_policy import EvictionPolicyContract


@pytest.mark.parametrize("name", policy_names())
class TestPolicy(EvictionPolicyContract):
    @pytest.fixture
    def new_policy(self, name):
        return make_policy(name)


class Split(RankedPolicy):
    """Has more than one priority from the start, though no slot has another than the default."""

    def bind(self, capacity, keys) -> None:
        super().bind(capacity, keys)
        self.rank((), 50)
        self.rank((), 10)


@pytest.mark.parametrize("make", [RankedPolicy, Split])
@pytest.mark.parametrize("name", policy_names())
class TestRankedPolicy(EvictionPolicyContract):
    @pytest.fixture
    def new_policy(self, name, make):
        return make(make_policy(name))
