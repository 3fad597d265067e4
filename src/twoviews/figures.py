"""Matplotlib figures without pyplot, whose global settings and windows have no part in them."""

from pathlib import Path
from typing import TYPE_CHECKING

from twoviews.files import open_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure with one plot, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
