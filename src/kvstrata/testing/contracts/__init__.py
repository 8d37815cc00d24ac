"""One suite a seam: subclass it, give the fixtures, and pytest holds your code to the laws."""

import pytest

# So that a broken law shows the values that broke it, as in a test module.
for _suite in ("codec", "eviction_policy", "keyed_store", "tier_store", "transfer_backend"):
    pytest.register_assert_rewrite(f"{__name__}.{_suite}")
