"""Trace loaders: good samples, and for each thing that can be wrong the line and the field."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.ids import SequenceHash
from kvstrata.sim.traces import FORMATS, TraceError, TraceRequest, open_trace
from kvstrata.sim.traces.plain import Recorder
from kvstrata.tokens import lineage_digests

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_head.jsonl"
MOONCAKE = {"timestamp": 5, "input_length": 1000, "output_length": 3, "hash_ids": [1, 2]}
BAILIAN = {
    "chat_id": 7,
    "parent_chat_id": -1,
    "timestamp": 1.5,
    "input_length": 40,
    "output_length": 3,
    "type": "text",
    "turn": 1,
    "hash_ids": [1, 2, 3],
}
TOKENS = {"timestamp": 0.5, "tokens": list(range(130)), "output_tokens": 2, "session": "a"}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_the_shipped_sample_is_what_its_authors_wrote() -> None:
    trace = open_trace(SAMPLE)
    assert (trace.info.format, trace.info.block_tokens) == ("mooncake", 512)
    raw = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    found = list(trace)
    assert len(found) == len(raw) == 60
    for request, line in zip(found, raw, strict=True):
        assert [int.from_bytes(key, "big") for key in request.blocks] == line["hash_ids"]
        assert request.prompt_tokens == line["input_length"]
        assert request.arrival_s * 1000 == pytest.approx(line["timestamp"] - raw[0]["timestamp"])
    assert list(trace) == found, "a trace can be read again"


def test_a_conversation_is_followed_through_its_turns(tmp_path) -> None:
    later = BAILIAN | {"chat_id": 9, "parent_chat_id": 7, "timestamp": 4, "hash_ids": [1, 2, 8]}
    found = list(open_trace(write(tmp_path, BAILIAN, later)))
    assert [each.session for each in found] == ["7", "7"]
    assert [each.arrival_s for each in found] == [0.0, 2.5]
    assert found[0].blocks[:2] == found[1].blocks[:2]
    assert open_trace(tmp_path / "trace.jsonl").info.block_tokens == 16


def test_tokens_are_cut_as_the_cache_cuts_them(tmp_path) -> None:
    named = [TOKENS | {"tenant": name} for name in ("a", "b", "a")]
    of_a, of_b, again = (each.blocks for each in open_trace(write(tmp_path, *named)))
    assert of_a == again
    assert not {*of_a} & {*of_b}, "tenants do not find each other's blocks"
    path = write(tmp_path, TOKENS)
    (found,) = open_trace(path)
    assert found.blocks == [each[:16] for each in lineage_digests(TOKENS["tokens"], 64)]
    assert len(found.blocks) == 2, "what does not fill a block does not count"
    (finer,) = open_trace(path, block_tokens=10)
    assert len(finer.blocks) == 13


KEYS = st.binary(min_size=16, max_size=16).map(SequenceHash)
NUMBERS = st.integers(0, 1 << 40)
REQUESTS = st.builds(
    TraceRequest,
    st.floats(0, 1e9),
    st.lists(KEYS, max_size=5),
    NUMBERS,
    NUMBERS,
    st.text(max_size=5),
    st.text(max_size=5),
)


@given(st.lists(REQUESTS, max_size=6), st.integers(1, 4096))
def test_a_recording_gives_back_what_was_recorded(tmp_path_factory, requests, block_tokens) -> None:
    path = tmp_path_factory.mktemp("recording") / "trace.jsonl"
    with Recorder(path, block_tokens) as recorder:
        for request in requests:
            recorder.add(request)
    trace = open_trace(path)
    assert trace.info.block_tokens == block_tokens
    assert list(trace) == requests
    with pytest.raises(FileExistsError):
        Recorder(path, block_tokens)


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (MOONCAKE | {"timestamp": "soon"}, "timestamp"),
        (MOONCAKE | {"timestamp": -1}, "timestamp"),
        (MOONCAKE | {"timestamp": 4}, "timestamp"),
        (MOONCAKE | {"input_length": True}, "input_length"),
        (MOONCAKE | {"input_length": 5000}, "hash_ids"),
        (MOONCAKE | {"hash_ids": [1, 1]}, "hash_ids"),
        (MOONCAKE | {"hash_ids": [1, -2]}, "hash_ids"),
        (MOONCAKE | {"hash_ids": [1, 2.5]}, "hash_ids"),
        (MOONCAKE | {"hash_ids": [1, 1 << 70]}, "hash_ids"),
        ({key: MOONCAKE[key] for key in MOONCAKE if key != "output_length"}, "output_length"),
        ("[1]", "object"),
        ('{"timestamp": NaN}', "line 2"),
        (json.dumps(MOONCAKE)[:-20], "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, second, field) -> None:
    trace = open_trace(write(tmp_path, MOONCAKE, second))
    with pytest.raises(TraceError, match="line 2") as caught:
        list(trace)
    assert field in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (BAILIAN, "chat_id"),
        (BAILIAN | {"chat_id": 8, "parent_chat_id": 99}, "parent_chat_id"),
        (BAILIAN | {"chat_id": 8, "timestamp": 1}, "timestamp"),
        (BAILIAN | {"chat_id": 8, "hash_ids": [1]}, "hash_ids"),
    ],
)
def test_a_bad_chat_is_named(tmp_path, second, field) -> None:
    with pytest.raises(TraceError, match="line 2") as caught:
        list(open_trace(write(tmp_path, BAILIAN, second)))
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (TOKENS | {"timestamp": 0.1}, "timestamp"),
        (TOKENS | {"tokens": [1, -1]}, "tokens"),
        (TOKENS | {"tokens": [1, 1 << 32]}, "tokens"),
        (TOKENS | {"tockens": []}, "tockens"),
    ],
)
def test_a_bad_token_line_is_named(tmp_path, second, field) -> None:
    with pytest.raises(TraceError, match="line 2") as caught:
        list(open_trace(write(tmp_path, TOKENS, second)))
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"kvstrata_trace": 2, "block_tokens": 64}], "version 2"),
        ([{"kvstrata_trace": 1, "block_tokens": 0}], "block_tokens"),
        ([{"what": 1}], "no known trace"),
        (["[]"], "record"),
        (["7"], "record"),
        (["{"], "line 1"),
        ([""], "empty"),
    ],
)
def test_what_is_no_trace_is_refused_at_once(tmp_path, lines, words) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        open_trace(write(tmp_path, *lines))
    assert caught.value.hint


@pytest.mark.parametrize("blocks", ["0", "zz" * 16, "00" * 17])
def test_a_recording_cut_off_is_named(tmp_path, blocks) -> None:
    head = {"kvstrata_trace": 1, "block_tokens": 64}
    line = {"arrival_s": 0, "blocks": blocks, "prompt_tokens": 64}
    with pytest.raises(TraceError, match=r"line 2: blocks"):
        list(open_trace(write(tmp_path, head, line)))


def test_names_that_are_not_formats_and_sizes_that_do_not_fit(tmp_path) -> None:
    path = write(tmp_path, MOONCAKE)
    with pytest.raises(TraceError, match="unknown format 'csv'") as caught:
        open_trace(path, "csv")
    assert all(name in caught.value.hint for name in FORMATS)
    with pytest.raises(TraceError, match="512 tokens, not 64"):
        open_trace(path, block_tokens=64)
    with pytest.raises(TraceError, match="cannot read"):
        open_trace(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"no \.json file"):
        open_trace(tmp_path / "empty")


def test_bytes_that_are_not_text(tmp_path) -> None:
    path = write(tmp_path, MOONCAKE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"timestamp": "\xff"}\n')
    trace = open_trace(path)
    with pytest.raises(TraceError, match="line 2"):
        list(trace)


def test_a_large_trace_streams_and_says_how_far_it_is(tmp_path) -> None:
    path = tmp_path / "large.jsonl"
    line = MOONCAKE | {"input_length": 512 * 100, "hash_ids": list(range(100))}
    with path.open("w") as file:
        for turn in range(30_000):
            file.write(json.dumps(line | {"timestamp": turn}) + "\n")
    told = []
    trace = open_trace(path)
    tracemalloc.start()
    assert sum(len(request.blocks) for request in trace.read(told.append)) == 3_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10 * peak, "the file is never in memory"
    assert 0.95 < sum(told) / trace.size_bytes <= 1
    assert len(told) > 5


# -- session files -----------------------------------------------------------------------------


def session(name: str, *requests: dict, **fields: object) -> dict:
    return {"id": name, "block_size": 64, "requests": list(requests)} | fields


def asked(at: float, *ids: int, **fields: object) -> dict:
    return {"t": at, "type": "s", "in": 64 * len(ids) + 9, "out": 5, "hash_ids": list(ids)} | fields


def folder_of(folder: Path, *sessions: dict) -> Path:
    for number, each in enumerate(sessions):
        (folder / f"trace_{number:04}.json").write_text(json.dumps(each))
    return folder


def test_sessions_are_merged_by_arrival_and_kept_apart(tmp_path) -> None:
    first = session("a", asked(0, 1, 2), asked(30, 1, 2, 3, think_time=4.0), asked(100, 1, 2, 3, 4))
    second = session("b", asked(5, 1, 2), asked(20, 1, 2, 9))
    trace = open_trace(folder_of(tmp_path, first, second))
    assert (trace.info.format, trace.info.block_tokens) == ("sessions", 64)
    found = list(trace)
    assert [(each.session, each.arrival_s) for each in found] == [
        ("a", 0.0), ("a", 30.0), ("b", 65.0), ("b", 80.0), ("a", 100.0),
    ]  # fmt: skip
    assert found[0].blocks == found[1].blocks[:2] == found[4].blocks[:2]
    assert not set(found[0].blocks) & set(found[2].blocks), "ids are a session's own"
    shared = [session(name, asked(0, 1), hash_id_scope="global") for name in "ab"]
    one, other = open_trace(folder_of(tmp_path, *shared))
    assert one.blocks == other.blocks


def test_agents_within_a_session_share_its_ids(tmp_path) -> None:
    nested = {"t": 10, "type": "subagent", "requests": [asked(12, 1, 7), asked(25, 1, 7, 8)]}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(session("a", asked(0, 1), nested, asked(20, 1, 2))))
    found = list(open_trace(path))
    assert [each.arrival_s for each in found] == [0.0, 12.0, 20.0, 25.0]
    assert {each.blocks[0] for each in found} == {found[0].blocks[0]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (session("b", asked(-1, 1)), "t"),
        (session("b", asked(0, 1, **{"in": 640})), r"requests\[0\]: hash_ids"),
        (session("b", asked(0, 1), block_size=32), "block_size"),
        (session("b", hash_id_scope="mine"), "hash_id_scope"),
        ({"id": "b"}, "block_size"),
        ([], "object"),
    ],
)
def test_a_bad_session_is_named(tmp_path, bad, words) -> None:
    folder = folder_of(tmp_path, session("a", asked(0, 1)), bad)
    with pytest.raises(TraceError, match=words) as caught:
        list(open_trace(folder))
    assert "trace_0001.json" in caught.value.message
    assert caught.value.hint


def test_a_directory_of_sessions_streams(tmp_path) -> None:
    size = 0
    for number in range(60):
        requests = [asked(turn * 1.0, *range(200 + turn)) for turn in range(40)]
        path = tmp_path / f"{number:03}.json"
        path.write_text(json.dumps(session(str(number), *requests)))
        size += path.stat().st_size
    told = []
    tracemalloc.start()
    trace = open_trace(tmp_path)
    assert sum(1 for _ in trace.read(told.append)) == 60 * 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace.size_bytes == sum(told) == size
    assert size > 2 * peak, "only the conversations that are going on are in memory"


# -- recordings of vLLM's events ---------------------------------------------------------------


def stored(parent: int | None, *names: int, **fields: object) -> dict:
    return {
        "type": "BlockStored", "block_hashes": list(names), "parent_block_hash": parent,
        "token_ids": [1] * 16 * len(names), "block_size": 16, "lora_id": None, "medium": "GPU",
        "lora_name": None,
    } | fields  # fmt: skip


def test_stored_runs_become_requests_for_their_whole_chains(tmp_path) -> None:
    gone = {"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"}
    path = write(
        tmp_path,
        [10.0, [stored(None, 1, 2), {"type": "AllBlocksCleared"}]],
        [12.5, [gone, stored(2, 3), stored(1, 9), stored(None, 5, medium="CPU")], 0],
        [13.0, [stored(9, 4, group_idx=1)]],
    )
    trace = open_trace(path)
    assert (trace.info.format, trace.info.block_tokens) == ("vllm-events", 16)
    first, second, third = trace
    assert (first.arrival_s, second.arrival_s) == (0.0, 2.5)
    assert second.blocks[:2] == first.blocks
    assert len(second.blocks) == 3
    assert third.blocks[0] == first.blocks[0]
    assert third.blocks[1] != first.blocks[1]
    assert second.prompt_tokens == 48


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([1.0, [stored(7, 8)]], "parent_block_hash 7"),
        ([-1.0, [stored(1, 8)]], "$[0]"),
        ([0.5, [stored(1, 8)]], "ts"),
        ([2.0, [stored(1, 8, token_ids=[1])]], "token_ids"),
        ([2.0, [stored(1, 8, block_size=32, token_ids=[1] * 32)]], "block_size"),
        ([2.0, [{"type": "BlockLost"}]], "BlockLost"),
    ],
)
def test_a_bad_batch_is_named(tmp_path, second, words) -> None:
    trace = open_trace(write(tmp_path, [1.0, [stored(None, 1)]], second))
    with pytest.raises(TraceError, match="line 2") as caught:
        list(trace)
    assert words in caught.value.message


def test_a_recording_without_stored_blocks_is_refused(tmp_path) -> None:
    with pytest.raises(TraceError, match="no blocks were stored"):
        open_trace(write(tmp_path, [1.0, [{"type": "AllBlocksCleared"}]]))


def test_a_line_nested_beyond_reason_is_refused(tmp_path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"timestamp": 1, "tokens": ' + "[" * 100_000 + "\n")
    with pytest.raises(TraceError, match=r"deep\.jsonl, line 1"):
        list(open_trace(path, "tokens"))
