"""Whether the model still has the weights that it was loaded with.

Reinforcement learning loads new weights into a running engine. What was kept before belongs to
the old ones; vLLM tells its connector nothing of it, and the user may forget `reset_connector`.
So the worker half looks, in each step that loads or saves.

A change is *noticed* in the middle of things: then vLLM's own blocks are stale too, and nothing is
loaded or saved until a reset. Or it is found at the first look after a reset: then all is clean,
and only the names of blocks have to become others (*renewed*), because the namespace names the
weights that are in the files.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch

from kvstrata.connectors.vllm.metadata import StepPlan, WeightsReport

__all__ = ["WeightsEye", "WeightsWatch"]

log = logging.getLogger("kvstrata.vllm")

_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 1024


class _Slot(NamedTuple):
    """A place of a model that holds a parameter or a module, and what it held.

    Held weakly: weights that were replaced are not to stay in the GPU's memory because of us.
    """

    table: dict[str, Any]
    name: str
    known: weakref.ref[Any]

    def kept(self) -> bool:
        """Return whether it holds what it held."""
        return self.table.get(self.name) is self.known()


class WeightsEye:
    """What can be seen of a model's weights from the process that has them.

    It notices calls of the model's `load_weights`, parameters and modules that were replaced,
    parameters that were put elsewhere or written through autograd, and, where they are in the
    host's memory, other bytes in a sample of them.
    """

    def __init__(self, model: Any) -> None:
        """Listen and look at `model`, a `torch.nn.Module`, from now on."""
        self._model = model
        self._loads = self._replaced = 0
        self._listen(model)
        self._slots = list(_slots(model))

    def _listen(self, model: Any) -> None:
        """Count calls of `load_weights`: most ways to new weights end there."""
        load_weights = model.load_weights

        def counted(*arguments: Any, **options: Any) -> Any:
            self._loads += 1
            return load_weights(*arguments, **options)

        model.load_weights = counted

    @property
    def sees(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self._parameters())

    def look(self) -> tuple[Any, ...]:
        """Return what is seen now; it compares unequal once the weights have changed."""
        if not all(slot.kept() for slot in self._slots):
            self._replaced += 1  # another parameter may lie where the one before lay
            self._slots = list(_slots(self._model))
        parameters = self._parameters()
        every = max(1, len(parameters) // _SAMPLES)
        places = [(each.data_ptr(), each._version) for each in parameters]  # noqa: SLF001
        samples = [_middle(each) for each in parameters[::every] if each.device.type == "cpu"]
        return self._loads, self._replaced, places, samples

    def _parameters(self) -> list[torch.Tensor]:
        held = [slot.known() for slot in self._slots]
        return [each for each in held if isinstance(each, torch.Tensor) and each.numel()]


class WeightsWatch:
    """The worker half's eye on the weights. Without a model it sees nothing and objects to nothing.

    What it notices is what a `WeightsEye` sees.
    """

    def __init__(self, model: Any | None) -> None:
        """Remember what the weights are now."""
        self._eye: WeightsEye | None = None
        self._resets = self._renewals = 0
        self._stale = False
        if model is None:
            log.warning("kvstrata cannot see the weights: reset it whenever you change them")
            return
        self._eye = WeightsEye(model)
        self._known = self._eye.look()

    def check(self, plan: StepPlan) -> WeightsReport:
        """Return what is new; to be called before the step's first job."""
        self._renewals = max(self._renewals, plan.renewals)  # another worker may have seen it
        first_look = plan.resets != self._resets
        self._resets = plan.resets
        if not (self._eye and self._eye.sees) or not (first_look or plan.loads or plan.saves):
            return WeightsReport.SAME
        found = self._eye.look()
        changed = found != self._known
        if first_look:
            self._known = found
            renewed, self._stale = changed, False
            self._renewals += renewed
            return WeightsReport.RENEWED if renewed else WeightsReport.SAME
        if changed and not self._stale:
            self._stale = True
            return WeightsReport.CHANGED
        return WeightsReport.SAME

    def allows(self, plan: StepPlan) -> bool:
        """Return whether the jobs of a plan were made for the weights that the model has."""
        return not self._stale and plan.renewals == self._renewals


def _slots(model: Any) -> Iterator[_Slot]:
    """Yield each place of a parameter and of a module; what is shared has several."""
    for module in model.modules():
        for table in (module._parameters, module._modules):  # noqa: SLF001  # no copy is as quick
            for name, held in table.items():
                if held is not None:
                    yield _Slot(table, name, weakref.ref(held))


def _middle(parameter: torch.Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    count = min(len(flat), _SAMPLE_BYTES // flat.element_size())
    start = (len(flat) - count) // 2
    return bytes(flat[start : start + count].view(torch.uint8).numpy())
