"""What names weights and configurations, for every connector."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from kvstrata.connectors.identity import numerics_digest, plain_config, weights_revision
from kvstrata.core.errors import ConfigError


def test_revision_that_may_move_is_refused(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    unknown, known = SimpleNamespace(), SimpleNamespace(_commit_hash=commit)
    assert weights_revision("owner/model", "v1.0", known, setting="x") == f"commit:{commit}"
    assert weights_revision("owner/model", commit, unknown, setting="x") == f"commit:{commit}"
    for moving in (None, "main", "v1.0", commit[:12]):
        with pytest.raises(ConfigError, match="weights_revision"):
            weights_revision("owner/model", moving, unknown, setting="x")
    with pytest.raises(ConfigError, match="no weight files"):
        weights_revision(str(tmp_path), None, unknown, setting="x")


def test_an_edited_file_is_another_revision(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w" * 1000)
    first = weights_revision(str(tmp_path), None, None, setting="x")
    assert weights_revision(str(tmp_path), None, None, setting="x") == first
    status = file.stat()
    file.write_bytes(b"w" * 999 + b"v")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_revision(str(tmp_path), None, None, setting="x") != first


def test_configuration_without_what_changes_from_run_to_run():
    config = {
        "layers": 2,
        "_commit_hash": "x",
        "rope": {"factor": 2.0, "_seen": 1},
        "odd": [1, {2}],
    }
    assert plain_config(config) == {"layers": 2, "rope": {"factor": 2.0}, "odd": [1, "{2}"]}
    assert numerics_digest({"a": 1, "b": 2}) == numerics_digest({"b": 2, "a": 1})
    assert numerics_digest({"a": 1}) != numerics_digest({"a": 2})
