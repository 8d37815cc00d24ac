"""What the scheduler half tells the worker half, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LoadJob", "PageCopy", "Report", "SaveJob", "StepPlan"]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Which pages of the engine go with which slots: one row for each page."""

    slots: list[int]
    """Arena slot of each page."""
    places: list[int]
    """Position of each page within its block."""
    pages: list[list[int]]
    """For each group of layers the engine's page number of each row."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Pages to fill from the arena; they were promised, so they must be filled."""

    id: int
    """Unique in the scheduler half."""
    request: int
    """The engine's request id."""
    epoch: int
    """Session epoch in which the slots were acquired."""
    copy: PageCopy
    """What goes where."""
    generations: list[int]
    """For each row the generation that its slot must have, before and after the copy."""
    background: bool
    """Whether the engine has put the request aside until it is reported."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Slots to fill from full pages of one request."""

    id: int
    """Unique in the scheduler half."""
    request: int
    """The engine's request id."""
    epoch: int
    """Session epoch in which the slots were reserved."""
    copy: PageCopy
    """What goes where."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work; TensorRT-LLM may pickle it."""

    loads: list[LoadJob] = field(default_factory=list)
    """To be carried out before the step computes."""
    saves: list[SaveJob] = field(default_factory=list)
    """To be carried out after it has computed."""
    step: int = 0
    """Number of the step, 0 if it computes nothing."""


@dataclass(frozen=True, slots=True)
class Report:
    """One job has ended."""

    job: int
    """Its id."""
    done: bool
    """Whether every byte is where it should be."""
    copied_bytes: int = 0
    """Bytes of a load."""
    took_s: float = 0.0
    """How long the load took."""
