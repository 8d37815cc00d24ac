"""The laws of the seam, over a port and over a socket, and as an installed plug-in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvstrata.testing.contracts.keyed_store import KeyedStoreContract, fresh_request
from kvstrata_redis import RedisStore


class TestRedis(KeyedStoreContract):
    @pytest.fixture
    def open_store(self, redis_server):
        request = fresh_request(redis_server.url)
        return lambda: RedisStore(request)


class TestRedisOverASocket(KeyedStoreContract):
    @pytest.fixture
    def open_store(self, redis_server):
        request = fresh_request(f"unix://{redis_server.socket}?prefix=other/place&db=3")
        return lambda: RedisStore(request)


def test_the_suite_of_the_installed_wheel_passes(redis_server, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--pyargs", "kvstrata.testing.contracts.keyed_store"),
        ],
        env=os.environ | {"KVSTRATA_STORE": f"redis={redis_server.url}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
