"""`kvstrata doctor`, as an operator runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvstrata.apps.cli import doctor
from kvstrata.transfer.cuda.torchcuda import driver_absent
from kvstrata.transfer.registry import Choice


def _doctor(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvstrata.apps.cli.main", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "300"},
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What it says as JSON, of a directory that works."""
    done = _doctor("--json", "--directory", str(tmp_path_factory.mktemp("tier")))
    assert done.returncode == 0, done.stderr
    assert "trying backend memcpy" in done.stderr
    return json.loads(done.stdout)


def test_json_is_all_of_stdout_and_names_everything(found):
    names = {(each["group"], each["name"]) for each in found["findings"]}
    assert names >= {
        ("backend", "memcpy"),
        ("backend", "posix"),
        ("backend", "nixl"),
        ("device copier", "batch"),
        ("device copier", "runs"),
        ("device copier", "triton"),
        ("device copier", "torch"),
        ("nixl plug-in", "nixl"),
        ("store", "arena"),
        ("store", "object"),
        ("engine", "vllm"),
        ("host", "memory"),
        ("host", "memlock"),
        ("host", "huge pages"),
        ("host", "cross-memory attach"),
    }


def test_what_is_not_usable_comes_with_a_reason_and_a_remedy(found):
    for each in found["findings"]:
        assert each["why"], each
        assert each["usable"] or each["remedy"], each


def test_each_pair_of_a_node_without_peers_has_a_backend(found):
    chosen = {tuple(each["pair"]): each for each in found["choices"]}
    for pair in (("memory", "memory"), ("memory", "file"), ("file", "memory")):
        assert chosen[pair]["name"]
        assert chosen[pair]["reason"].startswith(chosen[pair]["name"])
        assert all(each["why"] for each in chosen[pair]["candidates"])


def test_without_a_gpu_no_device_copier_is_usable_nor_chosen(found):
    if not driver_absent():
        pytest.skip("a CUDA driver is here: this is about machines without one")
    lines = [each for each in found["findings"] if each["group"] == "device copier"]
    assert len(lines) == 4
    for each in lines:
        assert not each["usable"]
        assert "no CUDA driver" in each["why"]
        assert "install its driver" in each["remedy"]
    assert found["device_choices"] == []


def test_a_table_for_people():
    done = _doctor()
    assert done.returncode == 0, done.stderr
    for word in ("memcpy", "memlock", "device copier", "which backend moves what"):
        assert word in done.stdout


def test_a_directory_that_is_not_there(tmp_path):
    done = _doctor("--json", "--directory", str(tmp_path / "none"))
    assert done.returncode == 1, "without files there is no disk tier"
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert not findings["slab, O_DIRECT"]["usable"]
    assert "No such file" in findings["slab, O_DIRECT"]["why"]


def test_the_status_says_whether_a_node_could_work(monkeypatch, capsys):
    lost = Choice(("memory", "file"), None, "no backend here moves this", ())
    monkeypatch.setattr(doctor, "choose", lambda **_: [])
    monkeypatch.setattr(doctor, "_file_choices", lambda *_: [lost])
    monkeypatch.setattr(doctor, "probe_plugins", lambda **_: [])
    assert doctor.run_doctor(None, "posix", as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["choices"][0]["name"] is None


def test_direct_io_leaves_nothing_behind(tmp_path):
    finding = doctor._direct_io(tmp_path)
    assert finding.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scope", "usable"), [("", True), ("0", True), ("1", False), ("3", False)])
def test_cross_memory_attach_follows_yama(monkeypatch, scope, usable):
    monkeypatch.setattr(doctor, "_read", lambda _: scope)
    finding = doctor._cross_memory()
    assert finding.usable is usable
    assert bool(finding.remedy) is not usable


def test_packages_are_named_with_their_version_or_their_error(tmp_path, monkeypatch):
    info = tmp_path / "vendor_kv-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-kv\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(
        "[kvstrata.stores]\ngood = vendor_kv:open\nlost = vendor_kv_lost:open\n"
        "[kvstrata.backends]\nodd = vendor_kv:number\n"
    )
    (tmp_path / "vendor_kv.py").write_text("number = 7\ndef open(request): raise SystemExit\n")
    monkeypatch.delitem(sys.modules, "vendor_kv", raising=False)  # another test may have had one
    monkeypatch.syspath_prepend(tmp_path)
    found = {each.name: each for each in doctor._packages()}
    good, lost, odd = (found[name] for name in ("store good", "store lost", "backend odd"))
    assert (good.usable, good.why) == (True, "vendor-kv 1.5 (vendor_kv:open)")
    assert not lost.usable
    assert "'lost' of vendor-kv 1.5" in lost.why
    assert "No module named" in lost.why
    assert lost.remedy
    assert not odd.usable
    assert "cannot be called" in odd.why
