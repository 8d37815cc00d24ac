"""The `kvstrata` command as an operator meets it: real processes, their words and statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvstrata import __version__
from kvstrata.apps.cli.settings import ServeSettings
from kvstrata.storage.memory import machine_memory_bytes

COMMAND = [sys.executable, "-m", "kvstrata.apps.cli.main"]


def assert_told(done, status: int, *words: str) -> None:
    """The error is one sentence, a blank line and a hint on stderr, and nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert not done.stdout
    error, blank, hint, *rest = done.stderr.split("\n")
    assert error.startswith("error: ")
    assert (blank, rest) == ("", [""])
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ")
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tiers", "gpu:1GiB"], "tiers: unknown tier 'gpu'"),
        (["--tiers", "host:1GiB,host:1GiB"], "tiers: 'host,host'"),
        (["--tiers", "host:lots"], "tiers.host: 'lots'"),
        (["--tiers", f"host:{machine_memory_bytes()}"], "tiers.host: "),
        (["--tiers", "host:1MiB,disk:/proc/no:1MiB"], "tiers.disk: directory '/proc/no'"),
        (["--tiers", "host:1MiB", "--address", "tcp://*:1"], "address: "),
        (["--tiers", "host:1MiB", "--address", "ipc://relative"], "address: "),
        (["--tiers", "host:1MiB", "--address", "ipc:///" + "x" * 107], "address: "),
        (["--tiers", "host:1MiB", "--address", "ipc:///proc/no/n.sock"], "address: cannot listen"),
        (["--tiers", "host:1MiB", "--staging-timeout-s", "0"], "staging_timeout_s: "),
        (["--tiers", "host:1MiB", "--offload-priority-min", "101"], "offload_priority_min: "),
        (["--tiers", "host:1MiB", "--secret-file", "/proc/no"], "secret_file: "),
        (["--tiers", "host:1MiB", "--tenant", "a=lots"], "tenants.a: 'lots'"),
        (["--tiers", "host:1MiB", "--tenant", "a=disk:1MiB"], "tier 'disk', which"),
        (["--tiers", "host:1MiB", "--tenant", "a=60%", "--tenant", "b=60%"], "add up to 120.0%"),
    ],
)
def test_serve_refuses(command, run_directory, arguments, word) -> None:
    assert_told(command("serve", *arguments), 2, word)
    assert not list(run_directory.rglob("*.*")), "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVSTRATA_STAGING_TIMEOUT_S", "soon"),
        ("KVSTRATA_TRANSFER_THREADS", "0"),
        ("KVSTRATA_CHECKSUM_THREADS", "many"),
        ("KVSTRATA_ADDRESS", "tcp://*:1"),
    ],
)
def test_a_wrong_variable_is_named(command, name, value) -> None:
    done = command("serve", **{name: value})
    assert_told(done, 2, name.removeprefix("KVSTRATA_").lower(), repr(value))
    assert name in done.stderr


def test_wrong_tiers_in_the_environment(command) -> None:
    assert_told(command("serve", KVSTRATA_TIERS="gpu:1GiB"), 2, "tiers: unknown tier 'gpu'")


def test_variables_set_defaults_and_options_win(run_directory, serve, command) -> None:
    other = f"ipc://{run_directory / 'o.sock'}"
    daemon = serve("host:1MiB", KVSTRATA_ADDRESS=other, KVSTRATA_TIERS="gpu:1")
    assert (
        json.loads(command("stats", "--json", "--address", daemon.address).stdout)["sessions"] == 0
    )
    process = subprocess.Popen(
        [*COMMAND, "serve"],
        env=os.environ | {"KVSTRATA_ADDRESS": other, "KVSTRATA_TIERS": "host:2MiB"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr.readline() == f"kvstrata {__version__} serves host:2MiB at {other}\n"
        process.terminate()
        assert process.wait(10) == 0


def test_the_default_address_needs_no_option(run_directory, command) -> None:
    process = subprocess.Popen([*COMMAND, "serve", "--tiers", "host:1MiB"], stderr=subprocess.PIPE)
    with process:
        expected = f"ipc://{run_directory / 'kvstrata' / 'node.sock'}"
        assert process.stderr.readline().decode().endswith(f" at {expected}\n")
        assert expected in command("stats", "--json").stdout
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_when_told_and_leaves_nothing(run_directory, serve, number) -> None:
    daemon = serve()
    assert {path.name for path in run_directory.iterdir()} == {"n.sock", "n.sock.lock"}
    daemon.signal(number)
    assert daemon.process.wait(10) == 0
    assert not list(run_directory.iterdir())


def test_stats(serve, connect, make_blocks, command) -> None:
    daemon = serve()
    bare = command("stats", "--address", daemon.address)
    assert bare.returncode == 0
    assert f"daemon pid {daemon.pid}" in bare.stdout
    assert "no client has connected yet" in bare.stdout
    client = connect(address=daemon.address)
    client.put(*make_blocks(1, 3))
    client.get(make_blocks(1, 3)[0])
    table = command("stats", "--address", daemon.address, COLUMNS="120")
    assert (table.returncode, table.stderr) == (0, "")
    assert "array [axis0=3 axis1=5] float32 4 tokens" in table.stdout
    cells = [line.replace("┃", "│").split("│")[1:-1] for line in table.stdout.splitlines()]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row}
    assert rows["stored blocks"] == ["3"]
    assert rows["hit blocks host"] == ["3"]
    assert rows["host"][4] == "3", "three idle slots"
    done = command("stats", "--json", "--address", daemon.address)
    told = json.loads(done.stdout)
    assert (told["pid"], told["sessions"]) == (daemon.pid, 1)
    assert told["node"]["counters"]["stored_blocks"] == 3
    assert told["node"]["tiers"]["host"]["idle"] == 3
    assert rows["host"][8] == "3", "hits"
    assert rows["host"][0] == str(told["node"]["tiers"]["host"]["total"])


def test_clear(serve, connect, make_blocks, command) -> None:
    daemon = serve()
    client = connect(address=daemon.address)
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    assert command("clear", "--address", daemon.address).stdout == "3 blocks forgotten\n"
    assert client.lookup(tokens) == 0
    refused = command("clear", "--address", daemon.address, "--tier", "gpu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: tiers: unknown tier 'gpu'\n\nhint: this daemon has host\n"


@pytest.mark.parametrize("name", ["stats", "clear"])
def test_nothing_listens(command, run_directory, name) -> None:
    begin = time.monotonic()
    done = command(name, "--address", f"ipc://{run_directory}/n.sock")
    assert time.monotonic() - begin < 4, "less than the timeout of a call"
    assert_told(done, 3, "nothing listens at ")
    assert "kvstrata serve" in done.stderr
    assert_told(command(name), 3, "nothing listens at ")


def test_a_wrong_address_is_a_mistake_of_configuration(command) -> None:
    assert_told(command("stats", "--address", "tcp://localhost:1"), 2, "address: ")


def test_version(command) -> None:
    done = command("version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_no_arguments_show_help(command) -> None:
    done = command()
    for name in ("serve", "stats", "clear", "demo", "version"):
        assert name in done.stdout + done.stderr


def test_tenants_from_the_environment_in_stats_and_in_clear(
    command, serve, connect, make_blocks
) -> None:
    daemon = serve("host:64KiB", "n.sock", KVSTRATA_TENANTS="vip=50%;it's=host:8KiB")
    for seed, name in enumerate(["vip", ""]):
        connect(address=daemon.address, tenant=name).put(*make_blocks(seed, 2))
    at = ["--address", daemon.address]
    said = command("stats", *at)
    half = json.loads(command("stats", "--json", *at).stdout)["node"]["tenants"][0]["guaranteed"]
    assert "slots by tenant" in said.stdout
    assert f"2 ({half['host']})" in said.stdout
    assert "(default)" in said.stdout
    assert_told(command("clear", "--tenant", "who", *at), 2, "tenant: nothing of 'who' is kept")
    assert "known here: '' (the default), vip" in command("clear", "--tenant", "who", *at).stderr
    assert_told(command("clear", "--namespace", "who", *at), 2, "nothing of 'who' is kept")
    assert_told(command("clear", "--tier", "host", "--tenant", "vip", *at), 2, "in every tier")
    assert command("clear", "--tenant", "vip", *at).stdout == "2 blocks forgotten\n"
    assert command("clear", "--namespace", "default", *at).stdout == "2 blocks forgotten\n"


def test_two_namespaces_are_told_apart_in_stats(command, serve, connect, make_blocks) -> None:
    daemon = serve()
    for name in ("llama", "[qwen]"):
        connect(address=daemon.address, namespace=name).put(*make_blocks(1, 2))
    said = command("stats", "--address", daemon.address).stdout
    assert "slots by namespace" in said
    assert "llama" in said
    assert "[qwen]" in said


def test_the_mover_of_blocks_is_a_setting(monkeypatch):
    monkeypatch.delenv("KVSTRATA_BACKEND", raising=False)
    assert ServeSettings.read({}).node_config().backend == "posix"
    monkeypatch.setenv("KVSTRATA_BACKEND", "auto")
    assert ServeSettings.read({"backend": None}).node_config().backend == "auto"
    assert ServeSettings.read({"backend": "nixl"}).node_config().backend == "nixl"
