"""Pictures of replays and plans. matplotlib is an extra: without it, the error says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.core.errors import ConfigError

__all__ = ["check_picture", "draw_curves"]

Points = Sequence[tuple[float, float]]


def check_picture(path: Path) -> None:
    """Raise ConfigError now if `path` could not be drawn later, after minutes of work."""
    _pyplot()
    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise ConfigError(
            f"plot: {path.name!r} is no picture that can be drawn",
            hint="end it in .png, .svg, .pdf",
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"plot: there is no directory {str(path.absolute().parent)!r}", hint="make it first"
        )


def draw_curves(
    path: Path, curves: Mapping[str, Points], title: str, labels: tuple[str, str]
) -> None:
    """Draw one line for each curve over a logarithmic first axis."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    try:
        for name, points in curves.items():
            first, second = zip(*sorted(points), strict=True)
            axes.plot(first, second, marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(title, fontsize=9)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(
            f"plot: cannot write {str(path)!r} ({error.strerror})", hint="name another file"
        ) from error
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "plot: matplotlib is not installed", hint="pip install 'kvstrata[sim]'"
        ) from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
