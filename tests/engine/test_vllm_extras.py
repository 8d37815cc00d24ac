"""What tokens do not say, block by block, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tokens import PromptLineage

pytestmark = pytest.mark.engine

TOKENS = [3] * 320


def digests(media, adapter="", mark=""):
    """The digests of five blocks of equal tokens with these media: (digest, start, length)."""
    from kvstrata.connectors.vllm.extras import Medium, request_extras

    lineage = PromptLineage(
        64, request_extras(mark, adapter, [Medium(*each) for each in media], 64)
    )
    return lineage.extend_to(TOKENS)


def common(one, two):
    return sum(a == b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("one", "two", "shared"),
    [
        ([("a", 70, 10)], [("a", 70, 10)], 5),
        ([("a", 70, 10)], [("b", 70, 10)], 1),  # another image in the same place
        ([("a", 70, 10)], [], 1),
        ([("a", 70, 10)], [("a", 71, 10)], 1),  # a token further on
        ([("a", 70, 10)], [("a", 70, 11)], 1),
        ([("a", 60, 200)], [("b", 60, 200)], 0),  # one that spans blocks
        ([("a", 60, 4)], [("a", 60, 5)], 0),
        ([("a", 60, 4), ("c", 130, 4)], [("a", 60, 4), ("d", 130, 4)], 2),
        ([("a", 70, 4), ("b", 80, 4)], [("b", 70, 4), ("a", 80, 4)], 1),  # swapped in one block
        ([("a", 70, 4), ("b", 140, 4)], [("b", 70, 4), ("a", 140, 4)], 1),  # and over two
        ([("a", 128, 64)], [("b", 128, 64)], 2),  # one that fills a block exactly
    ],
)  # fmt: skip
def test_blocks_are_shared_up_to_the_first_difference(one, two, shared):
    assert common(digests(one), digests(two)) == shared


def test_an_adapter_covers_everything():
    assert common(digests([]), digests([], "d1")) == 0
    assert common(digests([]), digests([], "", "d1")) == 0, "nor is a mark an adapter"
    assert common(digests([], "d1"), digests([], "", "d1")) == 0
    assert common(digests([], "d2"), digests([], "d1")) == 0
    assert common(digests([("a", 70, 4)], "d1"), digests([("a", 70, 4)], "d1")) == 5


MEDIA = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 90), st.integers(1, 90)), max_size=3
)


@given(one=MEDIA, two=MEDIA)
def test_equal_blocks_have_equal_media_up_to_their_end(one, two):
    """Against the rule written down plainly: everything that starts before a block's end."""

    def laid(media):
        placed, at = [], 0
        for name, gap, length in media:
            placed.append((name, at + gap, length))
            at += gap + length
        return placed

    one, two = laid(one), laid(two)
    for block, (first, second) in enumerate(zip(digests(one), digests(two), strict=True)):
        end = 64 * (block + 1)
        until = [[each for each in media if each[1] < end] for media in (one, two)]
        assert (first == second) == (until[0] == until[1])


def feature(tensor, identifier="id", **position):
    position = {"offset": 3, "length": 5, "is_embed": None} | position
    item = type("Item", (dict,), {})
    return SimpleNamespace(
        modality="image",
        identifier=identifier,
        mm_position=SimpleNamespace(**position),
        data=item(pixels=SimpleNamespace(data=tensor)),
    )


def test_a_medium_is_what_the_model_is_given():
    import torch

    from kvstrata.connectors.vllm.extras import MediumDigests

    pixels = torch.arange(12.0)
    changed = pixels.clone()
    changed[5] += 1e-6
    kinds = [
        feature(pixels),
        feature(changed),
        feature(pixels.reshape(3, 4)),
        feature([pixels]),
        feature([pixels, pixels]),
        feature(pixels, "another"),
        feature(pixels, is_embed=torch.ones(5, dtype=torch.bool)),
    ]
    known = MediumDigests()
    digests = [MediumDigests().media([each])[0].digest for each in kinds]
    assert known.media([kinds[0]])[0].digest == digests[0]
    assert known.media([kinds[1]]) is None, "vLLM may compute with what it has of that name"
    assert known.media([kinds[5]])[0].digest == digests[5]
    assert len(set(digests)) == len(kinds)
    assert MediumDigests().media([feature(pixels.clone())])[0].digest == digests[0]
    assert known.media([feature(object())]) is None, "nothing is guessed"
    assert known.media([feature([7, 1])]) is None, "an address is no image"
    gone = feature(pixels)
    gone.data = None
    assert known.media([kinds[0], gone]) is None


def test_an_item_that_comes_again_is_read_once():
    import torch

    from kvstrata.connectors.vllm.extras import MediumDigests

    known, image = MediumDigests(), feature(torch.ones(4))
    first = known.media([image])
    del image.data["pixels"].data  # it cannot be read any more
    assert known.media([image]) == first
    assert len(known._seen) == 1
    del image
    assert known._seen == {}, "an item that is gone is forgotten"
