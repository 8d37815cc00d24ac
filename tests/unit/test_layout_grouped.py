"""Layers in several groups, all in one block: where each lies, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstrata.core.errors import LayoutError
from kvstrata.layout import Dimension, GroupedCache, LayerGroup, LayerRun, PagedCache

PAGE = PagedCache(layers=1, heads=2, page_tokens=4, channels=8, dtype="float16")
"""128 bytes a page."""


def grouped(*groups: tuple[PagedCache, tuple[int, ...], int]) -> GroupedCache:
    return GroupedCache(
        tuple(
            LayerGroup(replace(cache, layers=len(places)), places, window)
            for cache, places, window in groups
        )
    )


def test_layers_of_a_kind_lie_as_if_they_were_one_group() -> None:
    hybrid = grouped((PAGE, (0, 2), 16), (PAGE, (1, 3), 0))
    plain = replace(PAGE, layers=4)
    assert (
        hybrid.block_layout(8)
        == plain.block_layout(8)
        == grouped((PAGE, (0, 1, 2, 3), 0)).block_layout(8)
    )
    assert hybrid.runs(8) == [
        LayerRun(0, 0, 0), LayerRun(1, 0, 256), LayerRun(0, 1, 512), LayerRun(1, 1, 768)
    ]  # fmt: skip
    assert not hybrid.is_whole


def test_one_group_is_whole_unless_it_has_a_window() -> None:
    assert grouped((PAGE, (0,), 0)).is_whole
    assert not grouped((PAGE, (0,), 8)).is_whole


def test_unlike_layers_lie_one_behind_the_other() -> None:
    small, large = PAGE, replace(PAGE, page_tokens=2, heads=3)  # 128 and 96 bytes a page
    cache = grouped((large, (1,), 0), (small, (0, 2), 8))
    layout = cache.block_layout(8)
    assert cache.page_tokens == 4
    assert cache.pages_per_block(8) == [4, 2]
    assert cache.runs(8) == [LayerRun(1, 0, 0), LayerRun(0, 0, 256), LayerRun(1, 1, 640)]
    assert layout.dimensions == (Dimension("byte", 896),)
    assert layout.block_bytes == 896


def test_ranks_have_a_part_each() -> None:
    shared = replace(PAGE, ranks=2)
    unlike = replace(shared, channels=16)
    assert grouped((shared, (0,), 8), (shared, (1,), 0)).block_layout(8) == replace(
        shared, layers=2
    ).block_layout(8)
    mixed = grouped((shared, (0,), 8), (unlike, (1,), 0)).block_layout(8)
    assert mixed.dimensions == (Dimension("rank", 2), Dimension("byte", 256 + 512))


def test_stages_move_no_byte_and_count_as_workers() -> None:
    plain = grouped((replace(PAGE, ranks=2), (0, 1, 2), 0))
    staged = replace(plain, stages=(range(2), range(2, 3)))
    assert (plain.workers, staged.workers) == (2, 4)
    assert (plain.can_bridge, staged.can_bridge) == (True, False)
    assert staged.runs(8) == plain.runs(8)
    assert staged.block_layout(8) == plain.block_layout(8)
    assert plain.held_by(0) == range(3)
    assert [staged.held_by(stage) for stage in (0, 1)] == [range(2), range(2, 3)]
    for cache, stage in ((plain, 1), (staged, 2), (staged, -1)):
        with pytest.raises(LayoutError, match=f"stage {stage} of") as told:
            cache.held_by(stage)
        assert told.value.hint


@pytest.mark.parametrize(
    "stages",
    [
        (range(1),),
        (range(1), range(1, 3)),
        (range(1), range(1)),
        (range(1, 2), range(1)),
        (range(2), range(2, 2)),
    ],
)
def test_stages_that_are_not_each_layer_once_are_refused(stages) -> None:
    with pytest.raises(LayoutError, match="do not split 2 layers of one group"):
        replace(grouped((PAGE, (0, 1), 0)), stages=stages)


def test_stages_of_several_groups_are_refused() -> None:
    for cache in (grouped((PAGE, (0, 1), 8)), grouped((PAGE, (0,), 0), (PAGE, (1,), 0))):
        with pytest.raises(LayoutError, match="of one group"):
            replace(cache, stages=(range(1), range(1, 2)))


def test_whoever_has_other_layers_has_another_layout() -> None:
    wide = replace(PAGE, channels=16)
    tall = replace(PAGE, heads=4)  # as many bytes as `wide`
    packed = replace(wide, packing="amx")
    writers = {
        grouped((PAGE, (0,), 8), (other, (1,), 0)).block_layout(8).writer
        for other in (wide, tall, packed, replace(wide, dtype="bfloat16"))
    }
    turned = grouped((PAGE, (1,), 8), (wide, (0,), 0)).block_layout(8).writer
    assert len(writers | {turned}) == 5
    regrouped = grouped((wide, (1,), 0), (PAGE, (0,), 16)).block_layout(8).writer
    assert regrouped in writers, "which group a layer is in, and its window, move no byte"


def test_a_window_shorter_than_a_block_is_refused() -> None:
    cache = grouped((PAGE, (0,), 0), (PAGE, (1,), 12))
    assert cache.block_layout(12).block_tokens == 12
    with pytest.raises(LayoutError, match="16 are more than the sliding window of 12") as caught:
        cache.block_layout(16)
    assert "multiple" in caught.value.hint


def test_a_fraction_of_a_page_of_any_group_is_refused() -> None:
    cache = grouped((PAGE, (0,), 0), (replace(PAGE, page_tokens=6), (1,), 0))
    assert cache.page_tokens == 12
    with pytest.raises(LayoutError, match="multiple"):
        cache.block_layout(8)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [(PAGE, (), 0)],
        [(PAGE, (0,), 0), (PAGE, (0,), 0)],
        [(PAGE, (0,), 0), (PAGE, (2,), 0)],
        [(PAGE, (0,), 0), (replace(PAGE, ranks=2), (1,), 0)],
    ],
)
def test_a_layer_that_is_missing_or_there_twice_is_refused(groups) -> None:
    with pytest.raises(LayoutError, match="not each layer once"):
        grouped(*groups)


def test_a_group_with_another_number_of_layers_than_it_says_is_refused() -> None:
    with pytest.raises(LayoutError, match="not each layer once"):
        GroupedCache((LayerGroup(replace(PAGE, layers=2), (0,)),))


# -- states ----------------------------------------------------------------------------------------

STATE = PagedCache(layers=1, heads=1, page_tokens=4, channels=32, dtype="uint8", packing="state")
"""As many bytes a page as `PAGE` has, 100 of which are the state."""


def stateful(*places: tuple[int, ...], attention: tuple[int, ...] = (0,)) -> GroupedCache:
    states = [LayerGroup(replace(STATE, layers=len(each)), each, 0, 100) for each in places]
    plain = LayerGroup(replace(PAGE, layers=len(attention)), attention)
    return GroupedCache((*states, plain))


def test_each_group_of_a_model_with_states_has_blocks_of_its_own() -> None:
    cache = stateful((1,), (2,))
    layout = cache.block_layout(4)
    assert layout.dimensions == (Dimension("byte", 128),), "a page of one layer"
    assert (cache.state_groups, cache.windows) == ((0, 1), (0, 1, 1))
    assert not cache.is_whole
    plain = grouped((PAGE, (0,), 0))
    assert (plain.state_groups, plain.windows) == ((), (0,))


def test_layouts_of_states_differ_in_whatever_changes_a_block() -> None:
    cache = stateful((1, 2), (3, 4), attention=(0, 5))
    otherwise = stateful((1, 3), (2, 4), attention=(0, 5))  # other layers lie in one block
    groups = [replace(g, state_bytes=g.state_bytes and 96) for g in cache.groups]
    shorter = GroupedCache(tuple(groups))
    turned = GroupedCache(cache.groups[::-1])  # is the same: keys name layers
    layouts = [each.block_layout(4) for each in (cache, otherwise, shorter)]
    assert len(set(layouts)) == 3
    assert turned.block_layout(4) == layouts[0]


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (stateful((1, 2), (3,)), "as many layers in each group"),
        (
            GroupedCache((*stateful((1,)).groups, LayerGroup(PAGE, (2,)))),
            "one group of full attention",
        ),
        (
            GroupedCache((stateful((1,)).groups[0], LayerGroup(PAGE, (0,), 8))),
            "one group of full attention",
        ),
        (GroupedCache(stateful((0,), attention=(1,)).groups[:1]), "one group"),
    ],
    ids=["unequal", "two", "window", "states"],
)
def test_what_is_not_known_beside_states_is_refused(cache, said) -> None:
    with pytest.raises(LayoutError, match=said) as caught:
        cache.block_layout(4)
    assert caught.value.hint == "run this model without the connector"


def test_blocks_of_several_pages_have_no_states_at_their_ends() -> None:
    with pytest.raises(LayoutError, match="8 is not the engine's page of 4") as caught:
        stateful((1,)).block_layout(8)
    assert caught.value.hint.startswith("set block_tokens to 4:")
