"""What inspections share: order, bounds, and stores that change between listing and look."""

from __future__ import annotations

import itertools
import os
import threading

import pytest

from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.envelope import Envelope, encode_envelope
from kvstrata.storage.inspection.keyed import InspectedKeyed
from kvstrata.storage.inspection.records import Verdict, side_by_side
from kvstrata.storage.keyed import KeyedEntry, name_of_key
from kvstrata.storage.seal import seal
from kvstrata.testing.keyed import MemoryKeyedStore

LAYOUT = BlockLayout((Dimension("byte", 20_000),), "int8", 8, "test")
KEY = bytes(range(16))


def test_answers_come_in_order_and_work_is_never_far_ahead() -> None:
    begun = itertools.count()
    last = [0]

    def work(item):
        last[0] = next(begun)
        return item * 2

    answers = side_by_side(work, itertools.count(), 4)
    assert list(itertools.islice(answers, 20)) == [2 * item for item in range(20)]
    assert last[0] < 20 + 2 * 4
    answers.close()
    assert not [each for each in threading.enumerate() if "kvstrata-inspect" in each.name]


def test_the_first_error_ends_it() -> None:
    def work(item):
        if item == 3:
            raise OSError("gone")
        return item

    answers = side_by_side(work, range(100), 2)
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(answers)


class OldListing(MemoryKeyedStore):
    """A store that says of a block what it was before somebody stored it anew."""

    def entries(self):
        return iter([KeyedEntry(KEY, 300, 0.0)])


@pytest.mark.parametrize(("there", "verdict"), [(True, Verdict.GOOD), (False, Verdict.GONE)])
def test_a_block_that_was_stored_anew_since_it_was_listed_is_not_bad(there, verdict) -> None:
    store = OldListing()
    payload = os.urandom(LAYOUT.block_bytes)
    envelope = Envelope(
        key=KEY,
        parent=None,
        fingerprint=LAYOUT.fingerprint,
        raw_bytes=len(payload),
        stored_bytes=len(payload),
        seal=seal(KEY + LAYOUT.fingerprint, payload),
    )
    if there:
        store.put(KEY, encode_envelope(envelope), memoryview(payload))
    layout = (LAYOUT.fingerprint, LAYOUT.describe())
    found = InspectedKeyed(store, "object", "memory", layout, name_of_key, [], 2)
    (checked,) = found.verify()
    assert (checked.verdict, checked.reason) == (verdict, checked.reason if not there else "")
