"""What identity promises: growth equals batch, bad ids are refused, any difference is a miss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tokens import (
    TOKEN_ID_MAX,
    Namespace,
    PromptLineage,
    lineage_digests,
    sequence_hashes,
)
from kvstrata.tokens.namespace import salted_key

SECRET = bytes(range(32))
SPACE = Namespace("m", "w", "n", "float16", "g", 4)
TOKENS = list(range(100, 140))
DIGESTS = lineage_digests(TOKENS, 4)
MODEL_KEY = SPACE.model_key(SECRET)
OTHER_FIELDS = {"model": "m2", "weights": "", "numerics": "rope", "kv_dtype": "float32"} | {
    "geometry": "g;h",
    "block_tokens": 8,
}


def test_the_table_of_other_fields_is_complete() -> None:
    assert set(OTHER_FIELDS) == {field.name for field in dataclasses.fields(Namespace)}


@given(
    tokens=st.lists(st.integers(0, TOKEN_ID_MAX), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    block_tokens=st.integers(1, 9),
)
def test_growing_equals_batch(tokens, cuts, block_tokens) -> None:
    lineage = PromptLineage(block_tokens)
    parts = [lineage.extend_to(tokens[:cut]) for cut in [*sorted(cuts), len(tokens)]]
    assert (
        [each for part in parts for each in part]
        == lineage.digests
        == lineage_digests(tokens, block_tokens)
    )


@given(
    cuts=st.lists(st.integers(0, 40), max_size=8),
    extras=st.dictionaries(st.integers(0, 10), st.binary(max_size=4), max_size=4),
)
def test_growing_equals_batch_with_extras(cuts, extras) -> None:
    lineage = PromptLineage(4, extras)
    for cut in [*sorted(cuts), len(TOKENS)]:
        lineage.extend_to(TOKENS[:cut])
    assert lineage.digests == lineage_digests(TOKENS, 4, extras=extras)
    for index, digest in enumerate(lineage.digests):
        covered = any(block <= index for block in extras)
        assert (digest == DIGESTS[index]) == (not covered), "from the block that it covers on"


@given(tokens=st.lists(st.integers(0, TOKEN_ID_MAX), min_size=1, max_size=40), data=st.data())
def test_parent_continues_the_chain(tokens, data) -> None:
    whole = lineage_digests(tokens, 3)
    cut = data.draw(st.integers(0, len(whole)))
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + lineage_digests(tokens[cut * 3 :], 3, parent=parent) == whole


def test_form_of_the_row_does_not_matter() -> None:
    for row in (tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, dtype=np.uint8), range(100, 140)):
        assert lineage_digests(row, 4) == DIGESTS
    assert lineage_digests(np.array(TOKENS * 2)[::2], 4) == lineage_digests((TOKENS * 2)[::2], 4)


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 0, 0, -1],
        [0, 0, 0, TOKEN_ID_MAX + 1],
        [0, 0, 0, 2**32],
        [0, 0, 0, 2**70],
        [0.0, 1.0, 2.0, 3.0],
        [0, 1, 2, None],
        ["a", "b", "c", "d"],
        "abcd",
        [[1, 2], [3, 4], [5, 6], [7, 8]],
        np.array([-1, 0, 0, 0]),
        np.array([0, 0, 0, 2**31], dtype=np.int64),
        np.array([2**64 - 1] * 4, dtype=np.uint64),
        np.array([2**32 - 1] * 4, dtype=np.uint32),
        np.zeros(4, dtype=np.float32),
        np.zeros(4, dtype=bool),
        np.zeros((4, 1), dtype=np.int64),
    ],
    ids=repr,
)
def test_bad_ids_are_refused(tokens) -> None:
    with pytest.raises(ValueError, match="token"):
        lineage_digests(tokens, 4)


def test_the_largest_id_is_accepted() -> None:
    found = lineage_digests([TOKEN_ID_MAX] * 4, 4)
    assert found == lineage_digests(np.array([TOKEN_ID_MAX] * 4), 4)
    assert len(found) == 1


@pytest.mark.parametrize("block_tokens", [0, -1])
def test_bad_block_sizes_are_refused(block_tokens) -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        lineage_digests(TOKENS, block_tokens)


def test_a_bad_id_leaves_a_lineage_as_it_was() -> None:
    lineage = PromptLineage(4)
    lineage.extend_to(TOKENS[:8])
    with pytest.raises(ValueError, match="token"):
        lineage.extend_to([*TOKENS[:8], -1, 0, 0, 0])
    assert lineage.digests == DIGESTS[:2]


@pytest.mark.parametrize("position", range(len(TOKENS)))
def test_one_other_token_changes_its_block_and_every_later_one(position) -> None:
    other = list(TOKENS)
    other[position] += 1
    found = lineage_digests(other, 4)
    block = position // 4
    assert found[:block] == DIGESTS[:block]
    assert not set(found[block:]) & set(DIGESTS)


@pytest.mark.parametrize("block", range(len(DIGESTS)))
def test_an_extra_changes_its_block_and_every_later_one(block) -> None:
    found = lineage_digests(TOKENS, 4, extras={block: b""})
    assert found[:block] == DIGESTS[:block]
    assert not set(found[block:]) & set(DIGESTS)


def test_extras_differ_by_bytes_and_place() -> None:
    forms = [{}, {0: b"a"}, {0: b"b"}, {1: b"a"}, {0: b"a", 1: b"a"}, {0: b""}, {0: b"\0"}]
    last = [lineage_digests(TOKENS, 4, extras=extras)[-1] for extras in forms]
    assert len(set(last)) == len(forms)


def test_an_extra_is_not_imitated_by_tokens() -> None:
    plain = lineage_digests(TOKENS[:4], 4)[0]
    target = lineage_digests(TOKENS[:4], 4, extras={0: b"abcd"})[0]
    imitation = np.frombuffer(b"\xff" * 16 + plain + b"abcd", dtype="<u4")
    with pytest.raises(ValueError, match="token ids"):
        lineage_digests(imitation, len(imitation))
    assert sha_of(imitation) == target, "the imitation would have been one"


def sha_of(row: np.ndarray) -> bytes:
    from hashlib import sha256

    return sha256(row.tobytes()).digest()


@pytest.mark.parametrize("block_tokens", [1, 2, 5, 8, 40])
def test_another_block_size_shares_no_digest(block_tokens) -> None:
    assert not set(lineage_digests(TOKENS, block_tokens)) & set(DIGESTS)


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_another_field_changes_every_hash(field) -> None:
    key = dataclasses.replace(SPACE, **{field: OTHER_FIELDS[field]}).model_key(SECRET)
    assert_disjoint(salted_key(key, ""))


@pytest.mark.parametrize("salt", [" ", "a", "A", "\0"])
def test_another_salt_changes_every_hash(salt) -> None:
    assert_disjoint(salted_key(MODEL_KEY, salt))


def test_another_secret_changes_every_hash() -> None:
    assert_disjoint(salted_key(SPACE.model_key(bytes(32)), ""))


def test_fields_do_not_run_into_each_other() -> None:
    one = Namespace("ab", "c", "", "", "", 4).model_key(SECRET)
    two = Namespace("a", "bc", "", "", "", 4).model_key(SECRET)
    assert one != two


def assert_disjoint(key: bytes) -> None:
    ours = sequence_hashes(salted_key(MODEL_KEY, ""), DIGESTS)
    theirs = sequence_hashes(key, DIGESTS)
    assert len(set(ours) | set(theirs)) == 2 * len(DIGESTS)
    assert {len(each) for each in ours} == {16}
