"""Figures of matplotlib whose texts do not overlap, however long the names are."""

import math
import os.path
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_LENGTH = 34  # most characters of a category beside an axis
LEGEND_LENGTH = 100  # most characters of a legend entry
LOG_RATIO = 10.0  # positive values whose largest is so many times the smallest get a logarithmic axis
TICK_DISTANCE = 0.055  # share of an axis between two tick labels that do not touch
MAX_VALUE_TICKS = 12  # more values get the ticks of matplotlib
NUMBER_CHARACTERS = "0123456789.+-"


def new_panels(width: float, height: float, panels: int, sharey: bool = False) -> "tuple[Figure, list[Axes]]":
    """A figure (inches) with panels side by side, which does not depend on the settings and windows of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 6.5), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])


def add_heading(figure: "Figure", title: str, note: str) -> None:
    """Write the title and a note above the panels, in lines that fit the width."""
    length = int(figure.get_figwidth() * 11)
    lines = textwrap.wrap(title, length) + textwrap.wrap(note, int(length * 1.15))
    figure.suptitle("\n".join(lines), fontsize=10)


def add_legend(figure: "Figure", panel: "Axes") -> None:
    """Write the legend of a panel below all panels, in as many columns as the longest entry allows."""
    handles, labels = panel.get_legend_handles_labels()
    if not handles:
        return
    labels = [shortened(label, LEGEND_LENGTH) for label in labels]
    length = figure.get_figwidth() * 11.5
    columns = max(1, min(len(labels), int(length / (max(map(len, labels)) + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def set_numeric_ticks(panel: "Axes", values: Sequence[float]) -> None:
    """Set a tick at each value (sorted) that has room for its label, on a logarithmic axis if the values span it."""
    logarithmic = values[0] > 0 and values[-1] / values[0] >= LOG_RATIO
    if logarithmic:
        panel.set_xscale("log")
    if len(values) > MAX_VALUE_TICKS:
        return
    position = math.log if logarithmic else float
    low, high = position(values[0]), position(values[-1])
    ticks: list[float] = []
    for value in values:
        distance = TICK_DISTANCE * max(1.0, len(f"{value:g}") / 4)
        if not ticks or (position(value) - position(ticks[-1])) / (high - low) > distance:
            ticks.append(value)
    panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
    panel.set_xticks([], minor=True)


def colours(count: int) -> list[Any]:
    """Colours of lines, which repeat after ten."""
    from matplotlib import colormaps

    return [colormaps["tab10"](number % 10) for number in range(count)]


def file_name(name: str) -> str:
    """A name with underscores for everything that is unusual in names of files."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def shortened(name: str, length: int = NAME_LENGTH) -> str:
    """The name, or its two ends: names often differ at the end."""
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[-end:]}"


def shortened_apart(names: Sequence[str]) -> dict[str, str]:
    """Each name shortened; if two become equal by that, without the beginning and the end that all share."""
    short = {name: shortened(name) for name in names}
    if len(set(short.values())) == len(short):
        return short
    start = len(os.path.commonprefix(list(short)))
    end = len(os.path.commonprefix([name[start:][::-1] for name in short]))
    first = next(iter(short))
    while start and first[start - 1] in NUMBER_CHARACTERS:  # numbers are kept whole: 0.05 and 0.03 differ in one digit
        start -= 1
    while end and first[len(first) - end] in NUMBER_CHARACTERS:
        end -= 1
    return {name: shortened(f"…{name[start : len(name) - end]}…") for name in short}
