"""What the Ceph lane shares: one cluster for all of it, and a prefix of its own for each test."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory):
    """A real Ceph of this session's own; skips, by name, where its programs are missing."""
    from kvstrata.testing.ceph import CephServer, find_ceph

    pytest.importorskip("obstore", reason="no obstore installed (pip install 'kvstrata[object]')")
    if find_ceph() is None:
        pytest.skip("no Ceph RGW here (.ci/ceph unpacks Debian's; make test-rgw finds it)")
    with CephServer(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture
def rgw_url(ceph_server, monkeypatch):
    """An empty prefix of its bucket, and the credentials for it in the environment."""
    for name, value in ceph_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket, _, endpoint = ceph_server.url.partition("?")
    return f"{bucket}/{uuid.uuid4().hex}?{endpoint}"
