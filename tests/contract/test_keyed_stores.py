"""Every shipped keyed store, and every wrapper, under the laws of the seam."""

from __future__ import annotations

import errno
import os
import random
import uuid

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.testing.contracts.keyed_store import KeyedStoreContract
from kvstrata.testing.keyed import (
    DelayedKeyedStore,
    FaultyKeyedStore,
    KeyedFaults,
    MemoryKeyedStore,
)


class TestMemory(KeyedStoreContract):
    durable = False

    @pytest.fixture
    def open_store(self):
        return MemoryKeyedStore


class TestFaultyWithoutFaults(KeyedStoreContract):
    durable = False

    @pytest.fixture
    def open_store(self):
        return lambda: FaultyKeyedStore(MemoryKeyedStore(), KeyedFaults(), random.Random(1))


class TestDelayed(KeyedStoreContract):
    """Late is no fault."""

    durable = False

    @pytest.fixture
    def open_store(self):
        return lambda: DelayedKeyedStore(MemoryKeyedStore(), 0.005, random.Random(1))


LAYOUT = BlockLayout((Dimension("layer", 3), Dimension("channel", 1000)), "int8", 8, "test")
QUIET = DirectoryLimits(collect_interval_s=None)


class TestDirectory(KeyedStoreContract):
    direct = True

    @pytest.fixture
    def open_store(self, tmp_path):
        def open_one():
            return DirectoryStore.open(
                str(tmp_path / "share"), 1 << 30, LAYOUT, limits=QUIET, direct=self.direct
            )

        return open_one


class TestDirectoryThroughThePageCache(TestDirectory):
    direct = False


class TestDirectoryWithoutLinks(TestDirectory):
    """Some file systems have no hard links: the last of several writers wins there."""

    @pytest.fixture(autouse=True)
    def _no_links(self, monkeypatch):
        def refuse(*_names):
            raise PermissionError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)

    def test_it_says_so(self, store):
        assert not store.exclusive


class TestFaultyDirectoryWithoutFaults(TestDirectory):
    @pytest.fixture
    def open_store(self, tmp_path):
        def open_one():
            inner = DirectoryStore.open(str(tmp_path), 1 << 30, LAYOUT, limits=QUIET)
            return FaultyKeyedStore(inner, KeyedFaults(), random.Random(1))

        return open_one


class TestObjectsOfRclone(KeyedStoreContract):
    """A real server, which checks signatures and ignores conditions."""

    @pytest.fixture
    def open_store(self, s3_url):
        from kvstrata.storage.objects import ObjectStore

        return lambda: ObjectStore.open(s3_url, LAYOUT)

    def test_it_says_that_conditions_are_ignored(self, store):
        assert not store.exclusive


class TestObjectsWithConditions(KeyedStoreContract):
    """The client's own store in memory, which honours conditions."""

    @pytest.fixture
    def open_store(self):
        stores = pytest.importorskip("obstore.store", reason="no obstore installed")
        from kvstrata.storage.location import parse_location
        from kvstrata.storage.objects import ObjectStore

        client, place = stores.MemoryStore(), parse_location("s3://bucket/some/prefix")
        return lambda: ObjectStore.open_client(client, place, LAYOUT)

    def test_it_says_that_conditions_are_honoured(self, store):
        assert store.exclusive


class TestObjectsOfAzurite(KeyedStoreContract):
    """A real server of another protocol, which honours conditions."""

    @pytest.fixture
    def open_store(self, azure_server, monkeypatch):
        from kvstrata.storage.objects import ObjectStore

        for name, value in azure_server.environment.items():
            monkeypatch.setenv(name, value)
        container, _, endpoint = azure_server.url.partition("?")
        url = f"{container}/{uuid.uuid4().hex}?{endpoint}"
        return lambda: ObjectStore.open(url, LAYOUT)

    def test_it_says_that_conditions_are_honoured(self, store):
        assert store.exclusive

    def test_wrong_credentials_and_a_missing_container(self, azure_server, open_store, monkeypatch):
        from kvstrata.storage.objects import ObjectStore

        open_store().close()
        with pytest.raises(ConfigError, match="ContainerNotFound"):
            ObjectStore.open(azure_server.url.replace("kvstrata-test?", "nobody?"), LAYOUT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aHVudGVyMmh1bnRlcjI=")
        with pytest.raises(ConfigError, match="credentials") as caught:
            ObjectStore.open(azure_server.url, LAYOUT)
        assert "aHVudGVyMm" not in str(caught.value)


class TestObjectsOfAGivenServer(KeyedStoreContract):
    """Any server of yours: KVSTRATA_TEST_OBJECTS=s3://bucket?endpoint=..., and its credentials."""

    @pytest.fixture
    def open_store(self):
        from kvstrata.storage.objects import ObjectStore

        given = os.environ.get("KVSTRATA_TEST_OBJECTS")
        if not given:
            pytest.skip("KVSTRATA_TEST_OBJECTS names no server (a Ceph RGW, for example)")
        bucket, _, endpoint = given.partition("?")
        url = f"{bucket}/{uuid.uuid4().hex}?{endpoint}"
        return lambda: ObjectStore.open(url, LAYOUT)

    def test_conditions_are_honoured_or_it_says_so(self, store, open_store):
        other = open_store()
        assert other.exclusive is store.exclusive
        other.close()
