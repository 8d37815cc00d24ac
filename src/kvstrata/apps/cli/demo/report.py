"""What the demo found: the phases as data, as a table, and as the JSON of `--json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from kvstrata.apps.cli.demo.engines import EngineKind
from kvstrata.core.config import BLOCK_TOKENS_DEFAULT

__all__ = ["Phase", "Turn", "print_report", "write_json"]

_TIERS: Final = ("device", "host", "disk", "object")
_TITLES: Final = {
    "cold": "cold",
    "warm": "warm",
    "after_restart": "after kill -9",
    "from_object": "slab deleted",
}
_NEXT: Final = """\
What to try next (README.md explains each):
  a daemon that engines share   kvstrata serve --tiers host:8GiB,disk:/var/lib/kvstrata:100GiB
  a model of your own           {own_model}
  an engine of your own         from kvstrata import Client"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt, answered in one phase."""

    prompt_tokens: int
    """Length of the prompt."""
    tokens_from: dict[str, int]
    """Prompt tokens that were not computed, by the tier their KV came from."""
    ttft_s: float
    """Time to the first token of the answer."""
    identical: bool
    """Whether the answer is, token by token, that of the engine without kvstrata."""

    @property
    def full_block_tokens(self) -> int:
        """The part of the prompt that fills whole blocks, which is all that can be kept."""
        return self.prompt_tokens // BLOCK_TOKENS_DEFAULT * BLOCK_TOKENS_DEFAULT


@dataclass(frozen=True, slots=True)
class Phase:
    """The conversation, played once from its first turn to its last."""

    name: str
    """`cold`, `warm`, `after_restart` or `from_object`."""
    turns: tuple[Turn, ...]
    """The turns in their order."""


def write_json(phases: list[Phase], path: Path) -> None:
    """Write `phases` for programs."""
    content = {"phases": [{"name": p.name, "turns": [_turn(t) for t in p.turns]} for p in phases]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_report(phases: list[Phase], console: Console, kind: EngineKind) -> None:
    """Print the table, its sum in words, and where to go from here."""
    console.print(_table(phases))
    console.print(_summary(phases), soft_wrap=True, highlight=False)
    console.print()
    next_steps = _NEXT.replace("{own_model}", kind.own_model)
    console.print(next_steps, soft_wrap=True, highlight=False, markup=False)


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "full_block_tokens": turn.full_block_tokens,
        "tokens_from": {tier: turn.tokens_from.get(tier, 0) for tier in _TIERS},
        "ttft_s": round(turn.ttft_s, 6),
        "identical": turn.identical,
    }


def _table(phases: list[Phase]) -> Table:
    table = Table(
        box=box.SIMPLE,
        title=f"One conversation, {len(phases)} times: prompt tokens by where their KV came from",
        title_justify="left",
    )
    table.add_column("phase", no_wrap=True)
    shown = _TIERS if phases[-1].name == "from_object" else _TIERS[:-1]
    for heading in ("prompt", *shown, "first token", "sooner", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    cold = phases[0]
    for phase in phases:
        title = _TITLES[phase.name]
        for turn, base in zip(phase.turns, cold.turns, strict=True):
            counts = [str(turn.tokens_from.get(tier, 0) or "-") for tier in shown]
            ratio = "" if phase is cold else f"{base.ttft_s / turn.ttft_s:.1f}x"
            same = "yes" if turn.identical else "[bold red]NO[/]"
            tokens = str(turn.prompt_tokens)
            table.add_row(title, tokens, *counts, f"{turn.ttft_s * 1000:,.0f} ms", ratio, same)
            title = ""
        table.add_section()
    return table


def _summary(phases: list[Phase]) -> str:
    last = {phase.name: f"{phase.turns[-1].ttft_s * 1000:,.0f} ms" for phase in phases}
    stored = f", {last['from_object']} from the object store" if "from_object" in last else ""
    turns = [turn for phase in phases for turn in phase.turns]
    same = sum(turn.identical for turn in turns)
    return (
        f"The longest prompt took {last['cold']} to compute, {last['warm']} from host memory, "
        f"{last['after_restart']} from disk{stored}.\n"
        f"{same} of {len(turns)} answers are the same, token by token, as without kvstrata."
    )
