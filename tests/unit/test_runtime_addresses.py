"""Where daemons listen and where the secret is: for this user alone, and nothing left behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.core.config import NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.runtime.addresses import (
    check_address,
    default_address,
    lock_path,
    private_address,
    socket_path,
)
from kvstrata.runtime.secret import SECRET_NAME, load_secret


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not Path("/proc", str(process.pid)).exists()
    return process.pid


def test_the_default_lies_in_a_directory_of_ours(run_directory) -> None:
    assert default_address() == f"ipc://{run_directory}/kvstrata/node.sock"
    status = (run_directory / "kvstrata").stat()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert default_address() == default_address()


def test_private_addresses_differ(run_directory) -> None:
    found = {private_address() for _ in range(50)}
    assert len(found) == 50
    prefix = f"ipc://{run_directory}/kvstrata/private-{os.getpid()}-"
    assert all(address.startswith(prefix) for address in found)


def test_files_of_dead_owners_are_swept(run_directory) -> None:
    folder = run_directory / "kvstrata"
    folder.mkdir(mode=0o700)
    dead, alive = dead_pid(), os.getpid()
    gone = [f"private-{dead}-0a.sock", f"private-{dead}-0a.lock"]
    kept = [f"private-{alive}-0a.sock", "private-1-0a.sock", "private-x-0a.sock", "node.sock"]
    for name in [*gone, *kept]:
        (folder / name).touch()
    private_address()
    assert {path.name for path in folder.iterdir()} == set(kept)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_directory_that_others_can_enter_is_refused(run_directory, mode) -> None:
    (run_directory / "kvstrata").mkdir()
    (run_directory / "kvstrata").chmod(mode)
    for address in (default_address, private_address):
        with pytest.raises(ConfigError, match="not a directory of this user alone") as caught:
            address()
        assert "0700" in caught.value.hint


def test_a_link_in_its_place_is_refused(run_directory, tmp_path) -> None:
    tmp_path.chmod(0o700)
    (run_directory / "kvstrata").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a directory of this user alone"):
        default_address()


@pytest.mark.parametrize(
    "address",
    [
        *("", "ipc://", "ipc://relative", "tcp://127.0.0.1:1", "/n.sock", "ipc://@abstract"),
        *("inproc://x", "ipc://*", "ipc:///" + "x" * 107, "ipc:///" + "ü" * 54),
    ],
)
def test_addresses_refused(address) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(address)
    assert caught.value.message.startswith("address: ")
    assert caught.value.hint


def test_the_longest_path_serves(run_directory, serve, connect, make_blocks) -> None:
    name = "x" * (107 - len(f"{run_directory}/"))
    address = check_address(f"ipc://{run_directory / name}")
    assert len(socket_path(address).as_posix()) == 107
    assert serve("host:1MiB", name).address == address
    client = connect(address=address)
    assert client.put(*make_blocks(1, 1)) == 1
    assert lock_path(address) != socket_path(address)


def test_a_long_run_directory_is_told_by_a_private_daemon(tmp_path, connect, monkeypatch) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    with pytest.raises(ConfigError, match="longer than the 107 bytes"):
        connect(tiers="host:1MiB")


def config(tmp_path, secret_file=None) -> NodeConfig:
    return NodeConfig(parse_tiers(f"host:1MiB,disk:{tmp_path}/kv:1MiB"), secret_file)


def test_a_secret_is_made_once_for_this_user_alone(tmp_path) -> None:
    before = os.umask(0)
    try:
        secret = load_secret(config(tmp_path))
    finally:
        os.umask(before)
    path = tmp_path / "kv" / SECRET_NAME
    assert path.read_bytes() == secret
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(config(tmp_path)) == secret


def test_secrets_differ(tmp_path) -> None:
    host_only = NodeConfig(parse_tiers("host:1MiB"))
    found = {load_secret(host_only), load_secret(host_only)}
    assert len(found | {load_secret(config(tmp_path)), load_secret(config(tmp_path / "2"))}) == 4


def test_a_named_secret_is_read(tmp_path) -> None:
    named = tmp_path / "cluster"
    named.write_bytes(bytes(range(32)))
    assert load_secret(config(tmp_path, str(named))) == bytes(range(32))
    assert not (tmp_path / "kv").exists(), "no second secret is made"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_secret_that_others_may_write_is_refused(tmp_path, mode) -> None:
    named = tmp_path / "cluster"
    named.write_bytes(bytes(range(32)))
    named.chmod(mode)
    with pytest.raises(ConfigError, match=r"secret_file: .* can be written by others"):
        load_secret(config(tmp_path, str(named)))


def test_a_secret_of_another_user_is_refused(tmp_path) -> None:
    named = tmp_path / "cluster"
    named.write_bytes(bytes(range(32)))
    named.chmod(0o644)
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(named, 12345, 12345)
    with pytest.raises(ConfigError, match=r"secret_file: .* can be written by others"):
        load_secret(config(tmp_path, str(named)))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(tmp_path, length) -> None:
    named = tmp_path / "cluster"
    named.write_bytes(bytes(length))
    with pytest.raises(ConfigError, match=f"holds {length} bytes, not 32") as caught:
        load_secret(config(tmp_path, str(named)))
    assert caught.value.message.startswith("secret_file: ")
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / SECRET_NAME).write_bytes(bytes(length))
    with pytest.raises(ConfigError, match=f"holds {length} bytes, not 32") as caught:
        load_secret(config(tmp_path))
    assert caught.value.message.startswith("tiers.disk: ")


def test_a_missing_secret_is_told(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_secret(config(tmp_path, str(tmp_path / "no")))
    assert "head -c 32 /dev/urandom" in caught.value.hint


def test_a_file_that_is_no_socket_is_not_deleted(run_directory, serve) -> None:
    (run_directory / "n.sock").write_text("a letter")
    with pytest.raises(AssertionError, match="address: "):
        serve()
    assert (run_directory / "n.sock").read_text() == "a letter"
