"""Replays against a plain program for the same rule, and the commands that run them."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from kvstrata.apps.cli.main import app
from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import DISK, Admission, TierName
from kvstrata.policy import policy_names
from kvstrata.sim.hardware import EXAMPLE, TierSpeed, load_hardware
from kvstrata.sim.plan import best, candidates, plan
from kvstrata.sim.replay import BELADY, LowerSlots, Replay, next_uses
from kvstrata.sim.sweep import Load, parse_capacities, parse_extents
from kvstrata.sim.traces import TraceRequest, open_trace

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_head.jsonl"
HARDWARE = """
name = "test"
prefill_tokens_per_s = 10000.0
engines = 2
kv_bytes_per_token = 1024
[host]
read_bytes_per_s = 1e9
price_per_gib = 4.0
[disk]
read_bytes_per_s = 1e8
latency_s = 0.001
price_per_gib = 0.1
"""


def chats(seed: int, count: int = 400) -> list[TraceRequest]:
    """Return conversations that grow, branch, and come back."""
    luck = random.Random(seed)
    trunks: list[list[SequenceHash]] = [[]]
    requests, names = [], iter(range(10**9))
    for turn in range(count):
        trunk = luck.choice(trunks[-40:])
        new = [SequenceHash(next(names).to_bytes(16, "big")) for _ in range(luck.randint(1, 6))]
        chain = (trunk + new)[:30] if luck.random() < 0.8 else trunk or new
        trunks.append(chain)
        requests.append(TraceRequest(turn * 0.1, chain, len(chain) * 64 + 7, 10))
    return requests


def plain_lru(requests: list[TraceRequest], slots: int) -> int:
    """Count leading resident blocks; then use each block once, last block first."""
    order: OrderedDict[SequenceHash, None] = OrderedDict()
    hits = 0
    for request in requests:
        for key in request.blocks:
            if key not in order:
                break
            hits += 1
        # As the manager: what is there is held while room is made for the rest, then all age.
        held = [key for key in request.blocks if key in order]
        for key in held:
            del order[key]
        new = [key for key in request.blocks if key not in held]
        while len(order) + len(held) + len(new) > slots:
            order.popitem(last=False)
        order.update(dict.fromkeys(reversed(new)))
        order.update(dict.fromkeys(reversed(held)))
    return hits


def below(slots: int, admission: Admission = Admission.WRITE_THROUGH) -> list[LowerSlots]:
    return [LowerSlots(DISK, slots, admission)] if slots else []


def replayed(policy: str, requests: list[TraceRequest], host: int, disk: int = 0):
    replay = Replay(policy, host, below(disk), EXAMPLE, 64)
    replay.play(requests, next_uses(requests))
    return replay.report()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slots", [35, 100, 400])
def test_the_manager_hits_what_the_plain_program_hits(seed, slots) -> None:
    requests = chats(seed)
    report = replayed("lru", requests, slots)
    assert sum(report.hit_blocks.values()) == plain_lru(requests, slots)
    assert report.blocks == sum(len(each.blocks) for each in requests)
    assert 0 < report.hit < 1


@pytest.mark.parametrize("name", policy_names())
def test_nobody_beats_the_one_who_knows_the_future(name) -> None:
    requests = chats(9)
    for slots in (40, 120, 300):
        report = replayed(name, requests, slots)
        assert report.hit <= replayed(BELADY, requests, slots).hit
        assert report.dropped_blocks == 0


def test_enough_room_hits_everything_that_was_seen_before() -> None:
    requests, seen, most = chats(3), set(), 0
    for request in requests:
        for key in request.blocks:
            if key not in seen:
                break
            most += 1
        seen.update(request.blocks)
    for name in (*policy_names(), BELADY):
        assert sum(replayed(name, requests, len(seen) + 1).hit_blocks.values()) == most


def test_a_disk_gives_back_what_the_host_lost() -> None:
    requests = chats(4)
    alone, both = replayed("lru", requests, 60), replayed("lru", requests, 60, 5000)
    assert both.hit_blocks["disk"] > 0
    assert both.hit > alone.hit
    size = EXAMPLE.block_bytes(64)
    assert both.moved_bytes["disk to host"] == both.hit_blocks["disk"] * size
    assert both.moved_bytes["host to engine"] == sum(both.hit_blocks.values()) * size
    assert both.ttft_s["mean"] < alone.ttft_s["mean"], "reading is faster than computing here"


def test_time_is_laid_over_the_hits() -> None:
    key = [SequenceHash(bytes([number]) * 16) for number in range(4)]
    first, again = (TraceRequest(at, key, 4 * 64 + 36, 1) for at in (0.0, 100.0))
    report = replayed("lru", [first, again], 10)
    cold = 292 / EXAMPLE.prefill_tokens_per_s
    load = EXAMPLE.host.latency_s + 4 * EXAMPLE.block_bytes(64) / EXAMPLE.host.read_bytes_per_s
    warm = load + 36 / EXAMPLE.prefill_tokens_per_s
    assert report.ttft_s["mean"] == pytest.approx((cold + warm) / 2)


def test_the_same_trace_gives_the_same_report() -> None:
    for name in (*policy_names(), BELADY):
        assert replayed(name, chats(5), 90, 200) == replayed(name, chats(5), 90, 200)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host,host",
        "disk:1GiB",
        "host,disk",
        "gpu:1GiB",
        "host:0%",
        "host:101%",
        "host:x",
        "host,disk:1GiB:never",
        "host,disk::on-evict",
        "host,disk:1GiB,host",
    ],
)
def test_tiers_that_cannot_be(text) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_extents(text)
    assert caught.value.hint
    assert caught.value.message.startswith("tiers")


def test_sizes_are_floors() -> None:
    host, (lower,) = parse_extents("host:5%,disk:1GiB")
    disk = lower.extent
    assert (host.slots(1999, 1), disk.slots(1, 1000)) == (99, (1 << 30) // 1000)
    assert [each.slots(182790, 1) for each in parse_capacities("1%,3%,20%")] == [1827, 5483, 36558]


def test_a_plan_stays_within_its_budget_and_takes_the_fastest(tmp_path) -> None:
    path = tmp_path / "hardware.toml"
    path.write_text(HARDWARE)
    hardware, load = load_hardware(path), Load(open_trace(SAMPLE))
    outcomes = list(plan(load, hardware, 1.0, ["lru", "auto"]))
    chosen, report = best(outcomes)
    assert all(candidate.price <= 1.0 for candidate, _ in outcomes)
    assert report.ttft_s["mean"] <= 1.01 * min(each.ttft_s["mean"] for _, each in outcomes)
    assert chosen in candidates(load, hardware, 1.0)
    with pytest.raises(ConfigError, match="buys no tiers"):
        candidates(load, hardware, 1e-9)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("engines = 0", "engines"),
        ("engines = 'two'", "engines"),
        ("enginges = 2", "enginges"),
        ("prefill_tokens_per_s = -1", "prefill_tokens_per_s"),
        ("engines = ", "hardware"),
    ],
)
def test_hardware_that_cannot_be(tmp_path, change, field) -> None:
    name = change.split()[0].replace("enginges", "engines")
    lines = [change if line.startswith(name) else line for line in HARDWARE.splitlines()]
    path = tmp_path / "hardware.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=field) as caught:
        load_hardware(path)
    assert caught.value.hint


def run(*arguments: object):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_replay_prints_json_tables_and_pictures(tmp_path) -> None:
    picture = tmp_path / "out.png"
    result = run("replay", SAMPLE, "--capacity", "10%,50%", "--json", "--plot", picture)
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)["cells"]
    assert len(cells) == 2 * (len(policy_names()) + 1)
    assert {cell["capacity"] for cell in cells} == {0.1, 0.5}
    assert all(0 <= cell["hit"] < 1 for cell in cells)
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = run("replay", SAMPLE, "--policy", "arc", "--tiers", "host:10%,disk:50%")
    assert shown.exit_code == 0
    assert "arc" in shown.stdout
    assert "10%" in shown.stdout


def test_plan_prints_json_and_a_command_to_run(tmp_path) -> None:
    path = tmp_path / "hardware.toml"
    path.write_text(HARDWARE)
    asked = ("plan", SAMPLE, "--hardware", path, "--budget", 1)
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["recommended"] in answer["candidates"]
    shown = run(*asked, "--plot", tmp_path / "plan.svg")
    assert "kvstrata serve --policy auto --tiers host:" in shown.stdout
    assert (tmp_path / "plan.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("replay", "absent.jsonl"), "cannot read"),
        (("replay", SAMPLE, "--policy", "best"), "unknown policy 'best'"),
        (("replay", SAMPLE, "--tiers", "host:1KiB"), "does not hold one block"),
        (("replay", SAMPLE, "--tiers", "host:1%", "--capacity", "2%"), "has a size already"),
        (("replay", SAMPLE, "--capacity", "many"), "capacity"),
        (("replay", SAMPLE, "--plot", "out.txt"), "plot"),
        (("replay", SAMPLE, "--hardware", "absent.toml"), "hardware"),
        (("plan", SAMPLE, "--budget", "-1"), "budget"),
        (("plan", SAMPLE, "--budget", "0.0001"), "buys no tiers"),
    ],
)
def test_a_wrong_command_says_what_to_do(arguments, words) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "hint:" in result.stderr
    assert result.stdout == ""


def test_a_trace_too_large_to_keep_is_streamed_and_gives_the_same(monkeypatch) -> None:
    kept = Load(open_trace(SAMPLE))
    monkeypatch.setattr("kvstrata.sim.sweep._KEPT_BYTES_MAX", 100)
    streamed = Load(open_trace(SAMPLE))
    told: list[int] = []
    for policy in ("lru", "auto"):
        report = streamed.replay(policy, 50, below(200), EXAMPLE, told.append)
        assert report == kept.replay(policy, 50, below(200), EXAMPLE)
    with pytest.raises(ConfigError, match="belady needs the whole trace in memory"):
        streamed.replay(BELADY, 50, [], EXAMPLE)


def test_what_is_evicted_and_what_is_used_often_may_be_all_that_enters_a_disk() -> None:
    """On evict both tiers hold different blocks; by frequency few are written."""
    requests = chats(7)
    reports = {}
    for admission in Admission:
        replay = Replay("lru", 200, below(200, admission), EXAMPLE, 64)
        replay.play(requests)
        reports[admission] = replay.report()
    through, evicted, often = (reports[admission] for admission in Admission)
    assert through.hit_blocks["host"] == evicted.hit_blocks["host"] == often.hit_blocks["host"]
    assert evicted.hit > through.hit
    written = [each.moved_bytes["host to disk"] for each in (through, evicted, often)]
    assert written[0] > written[1] > written[2] > 0


def test_a_second_disk_gives_back_what_the_first_lost() -> None:
    requests = chats(7)
    lower = [LowerSlots(DISK, 80), LowerSlots(TierName("disk2"), 400)]
    replay = Replay("lru", 40, lower, EXAMPLE, 64)
    replay.play(requests)
    report = replay.report()
    assert all(report.hit_blocks[tier] > 0 for tier in ("host", "disk", "disk2"))
    assert report.hit > replayed("lru", requests, 40, 80).hit


def test_a_replay_that_weighs_costs_leaves_a_slow_disk_alone() -> None:
    requests = chats(7)
    slow = msgspec.structs.replace(EXAMPLE, disk=TierSpeed(read_bytes_per_s=1e6))
    reports = []
    for weigh in (False, True):
        replay = Replay("lru", 60, below(400), slow, 64, weigh_costs=weigh)
        replay.play(requests)
        reports.append(replay.report())
    loads, weighs = reports
    assert loads.hit_blocks["disk"] > 0
    assert weighs.hit_blocks["disk"] == 0
    assert weighs.ttft_s["mean"] < loads.ttft_s["mean"] / 10
