"""Pictures of a sweep: accuracy over each axis with its band over seeds, two axes as a map, and how the jobs learn."""

import math
import os.path
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from twoviews.sweeps.formatting import short_names, text, typed
from twoviews.sweeps.results import ACCURACIES, CONFIDENCE, Estimate, Results, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
_OF_NUMBERS = "0123456789.+-"
LINES = 8  # settings of the other axes that have a line of their own: the best
MAPPED = 12  # a map with more rows or columns has no numbers in its cells
NAME_ROOM = 34  # characters of a category beside an axis
LABEL_ROOM = 100  # characters of a legend entry
SPAN = 10.0  # positive values whose largest is so many times the smallest get a logarithmic axis
TICKS_APART = 0.055  # share of an axis between two tick labels that do not touch


def draw(folder: Path, found: Results) -> dict[str, Path]:
    """Every picture that the numbers allow, written into `folder`; the files by title."""
    names = short_names(found.axes)
    pictures: dict[str, Path] = {}
    for key in found.axes:
        settings = _having(found, key)
        if (metrics := _measured(settings)) and len(_ordered(settings, key)) > 1:
            path = folder / f"axis_{_plain(names[key])}.png"
            _draw_axis(path, found, key, metrics)
            pictures[f"Accuracy over {names[key]}"] = path
    for first, second in combinations(found.axes, 2):
        settings = _having(found, first, second)
        if (metrics := _measured(settings)) and _fills_a_map(settings, first, second):
            path = folder / f"map_{_plain(names[first])}_{_plain(names[second])}.png"
            _draw_map(path, found, first, second, metrics)
            pictures[f"Accuracy over {names[first]} and {names[second]}"] = path
    if any(any(name in line for name in PANELS) for row in found.rows for line in row.curve):
        path = folder / "learning.png"
        _draw_learning(path, found)
        pictures["Learning curves"] = path
    return pictures


# ---------------------------------------------------------------------------------------------------------------- an axis


def _draw_axis(path: Path, found: Results, key: str, metrics: Sequence[str]) -> None:
    """A panel for each accuracy: means over seeds with their bands, a line for each setting of the other axes."""
    others = [other for other in found.axes if other != key]
    names = short_names(found.axes)
    measured = [one for one in _having(found, key) if any(one.seeds(name) for name in metrics)]
    lines: dict[str, list[Setting]] = {}
    for setting in measured:
        lines.setdefault(_label(found, setting, others), []).append(setting)
    shown = dict(list(lines.items())[:LINES])
    alone = len(lines) > 1 and all(len(line) == 1 for line in lines.values())
    if alone:  # random search: no two settings agree in the others, so there is nothing to join
        shown = {"": measured}
    left_out = len(lines) - len(shown) if not alone else 0
    values = [setting.axes[key] for line in shown.values() for setting in line]
    numeric = all(_is_number(value) for value in values)
    ordered = _ordered(_having(found, key), key) if not numeric else []
    height = 4.2 if numeric else 1.6 + max(1.2, len(ordered) * (0.32 + 0.16 * len(shown)))
    figure, panels = _figure(5.6 * len(metrics) + (0 if numeric else 1.6), height, len(metrics), sharey=not numeric)
    colours = _colours(len(shown))
    for axis, metric in zip(panels, metrics, strict=True):
        for number, (name, line) in enumerate(shown.items()):
            jobs = [(setting.axes[key], setting) for setting in line if setting.seeds(metric)]
            if numeric:
                _numeric_line(axis, jobs, metric, colours[number], name, joined=not alone)
            else:
                shift = 0.5 * ((number + 0.5) / len(shown) - 0.5)
                _categorical_line(axis, jobs, ordered, metric, colours[number], name, shift, scattered=alone)
        title = f"{ACCURACIES[metric]} accuracy, %"
        if numeric:
            _numeric_ticks(axis, [float(value) for value in values if _is_number(value)])
            axis.set(xlabel=key, ylabel=title)
        else:
            axis.set_yticks(range(len(ordered)), list(_told_apart(ordered).values()))
            axis.set_ylim(len(ordered) - 0.5, -0.5)
            axis.set(xlabel=title)
        _limits(axis, [setting for line in shown.values() for setting in line], metric, along="y" if numeric else "x")
        axis.grid(alpha=0.3)
    if not numeric:
        panels[0].set_ylabel(_shortened(key, NAME_ROOM))
    note = f"mean over seeds, {'band' if numeric and not alone else 'bar'}: {CONFIDENCE}% t-interval; small dots: seeds"
    if left_out:
        note += f"; the {len(shown)} best of {len(lines)} settings of the other axes"
    _heading(figure, f"{found.name}: accuracy over {names[key]}", note)
    _legend(figure, panels[0])
    _save(figure, path)


def _numeric_line(
    axis: "Axes", jobs: list[tuple[Any, Setting]], metric: str, colour: Any, name: str, joined: bool
) -> None:
    jobs = sorted(jobs, key=lambda job: float(job[0]))
    x = [float(value) for value, _ in jobs]
    estimates = [_estimate(setting, metric) for _, setting in jobs]
    means = [one.mean for one in estimates]
    if joined:
        axis.plot(x, means, marker="o", markersize=5, color=colour, label=name or None)
        # A single seed has no interval: the band is open there, and a value between two such has a bar instead.
        low, high = [one.mean - one.half for one in estimates], [one.mean + one.half for one in estimates]
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for place, one in enumerate(estimates):
            beside = estimates[max(0, place - 1) : place] + estimates[place + 1 : place + 2]
            if math.isfinite(one.half) and not any(math.isfinite(other.half) for other in beside):
                axis.errorbar(x[place], one.mean, one.half, color=colour, alpha=0.5, capsize=3)
    else:
        bars = [one.half if math.isfinite(one.half) else 0.0 for one in estimates]
        axis.errorbar(x, means, bars, fmt="o", markersize=5, color=colour, elinewidth=1, capsize=2)
    for at, (_, setting) in zip(x, jobs, strict=True):
        seeds = list(setting.seeds(metric).values())
        if len(seeds) > 1:
            axis.scatter([at] * len(seeds), seeds, s=7, color=colour, alpha=0.6, linewidths=0)


def _categorical_line(
    axis: "Axes",
    jobs: list[tuple[Any, Setting]],
    ordered: list[str],
    metric: str,
    colour: Any,
    name: str,
    shift: float,
    scattered: bool,
) -> None:
    places = {value: place for place, value in enumerate(ordered)}
    first = True
    for value, setting in jobs:
        one, at = _estimate(setting, metric), places[text(value)] + shift
        bar = one.half if math.isfinite(one.half) else 0.0
        axis.errorbar(
            one.mean,
            at,
            xerr=bar,
            fmt="o",
            markersize=5,
            color=colour,
            capsize=3,
            label=name if first and name else None,
        )
        first = False
        seeds = list(setting.seeds(metric).values())
        if len(seeds) > 1 and not scattered:
            axis.scatter(seeds, [at + 0.08] * len(seeds), s=7, color=colour, alpha=0.6, linewidths=0)


def _numeric_ticks(axis: "Axes", values: Sequence[float]) -> None:
    """A tick at each value that has room for its label; logarithmic where the values span it."""
    different = sorted(set(values))
    logarithmic = different[0] > 0 and different[-1] / different[0] >= SPAN
    if logarithmic:
        axis.set_xscale("log")
    if len(different) > 12:
        return
    place = math.log if logarithmic else float
    low, high = place(different[0]), place(different[-1])
    ticks: list[float] = []
    for value in different:
        room = TICKS_APART * max(1.0, len(f"{value:g}") / 4)
        if not ticks or (place(value) - place(ticks[-1])) / (high - low) > room:
            ticks.append(value)
    axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axis.set_xticks([], minor=True)


def _limits(axis: "Axes", settings: Sequence[Setting], metric: str, along: Literal["x", "y"]) -> None:
    """Room for all seeds and for the intervals of three and more: that of two may be wider than all the rest."""
    estimates = [one for setting in settings if (one := setting.estimate(metric))]
    values = [value for setting in settings for value in setting.seeds(metric).values()]
    values += [one.mean + sign * one.half for one in estimates if one.count > 2 for sign in (-1, 1)]
    room = max(0.05 * (max(values) - min(values)), 0.5)
    limits = (max(0.0, min(values) - room), min(100.0, max(values) + room))
    (axis.set_ylim if along == "y" else axis.set_xlim)(*limits)


# ------------------------------------------------------------------------------------------------------------ two axes


def _fills_a_map(settings: Sequence[Setting], first: str, second: str) -> bool:
    """Whether at least half of the cells of a map of these axes belong to some setting."""
    cells = {(text(setting.axes[first]), text(setting.axes[second])) for setting in settings}
    rows, columns = {a for a, _ in cells}, {b for _, b in cells}
    return min(len(rows), len(columns)) > 1 and len(cells) >= 0.5 * len(rows) * len(columns)


def _draw_map(path: Path, found: Results, first: str, second: str, metrics: Sequence[str]) -> None:
    """Means over seeds by two axes; of several settings in a cell the best. An empty cell has no finished job."""
    import numpy as np

    settings = _having(found, first, second)
    rows, columns = _ordered(settings, first), _ordered(settings, second)
    names = short_names(found.axes)
    width = len(metrics) * (2.4 + max(2.4, 0.62 * len(columns)))
    longest = max(map(len, _told_apart(columns).values()))
    turned = longest > 6
    height = 2.0 + max(1.6, 0.45 * len(rows)) + (0.075 * longest if turned else 0)
    figure, panels = _figure(min(width, 22.0), min(height, 18.0), len(metrics), sharey=True)
    for axis, metric in zip(panels, metrics, strict=True):
        cells = np.full((len(rows), len(columns)), np.nan)
        for setting in settings:
            one = setting.estimate(metric)
            if one:
                at = rows.index(text(setting.axes[first])), columns.index(text(setting.axes[second]))
                cells[at] = np.nanmax([cells[at], one.mean])
        axis.set_facecolor("#dddddd")
        picture = axis.imshow(cells, cmap="viridis", aspect="auto")
        figure.colorbar(picture, ax=axis, shrink=0.9)
        axis.set_title(f"{ACCURACIES[metric]} accuracy, %", fontsize=10)
        axis.set_xticks(range(len(columns)), list(_told_apart(columns).values()))
        if turned:
            axis.tick_params(axis="x", labelrotation=90)
        axis.set_yticks(range(len(rows)), list(_told_apart(rows).values()))
        axis.set_xlabel(_shortened(second, NAME_ROOM))
        if max(len(rows), len(columns)) <= MAPPED:
            middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
            for (row, column), value in np.ndenumerate(cells):
                if not math.isnan(value):
                    colour = "black" if value > middle else "white"
                    axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    panels[0].set_ylabel(_shortened(first, NAME_ROOM))
    note = "mean over seeds; grey: no finished job"
    if len(found.axes) > 2:
        note += "; of the settings that share a cell the best"
    _heading(figure, f"{found.name}: {names[first]} and {names[second]}", note)
    _save(figure, path)


# ------------------------------------------------------------------------------------------------------------- learning

PANELS = {"knn/top1": "kNN accuracy, %", "train/spread": "spread (1 even, 0 collapsed)"}


def _draw_learning(path: Path, found: Results) -> None:
    """KNN accuracy and spread over epochs: a colour for each of the best settings, a thin line for each job."""
    panels_of = [name for name in PANELS if any(name in line for row in found.rows for line in row.curve)]
    begun = [setting for setting in found.settings if any(row.curve for row in setting.rows)]
    shown = begun[:LINES]
    figure, panels = _figure(5.6 * len(panels_of), 4.2, len(panels_of))
    colours = _colours(len(shown))
    last = max((line["epoch"] for row in found.rows for line in row.curve), default=0)
    for axis, metric in zip(panels, panels_of, strict=True):
        for setting, colour in zip(shown, colours, strict=True):
            curves = [_curve(row.curve, metric) for row in setting.rows]
            curves = [curve for curve in curves if curve]
            mean = _mean_curve(curves)
            if len(curves) > 1:
                for curve in curves:
                    alone = "." if len(curve) == 1 else None  # or it would not be seen
                    axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.4, linewidth=0.8, marker=alone)
            name = _label(found, setting, found.axes)
            marker = "o" if len(mean) == 1 or metric == "knn/top1" and len(mean) < 30 else None
            axis.plot(
                [x for x, _ in mean],
                [y for _, y in mean],
                color=colour,
                marker=marker,
                markersize=3.5,
                label=name or None,
            )
        axis.set(xlabel="epoch", ylabel=PANELS[metric])
        axis.set_xlim(0, 1.03 * last if last else None)
        axis.grid(alpha=0.3)
        if metric == "knn/top1":
            floors = [line[PIXELS] for row in found.rows for line in row.curve if PIXELS in line]
            if floors and max(floors) - min(floors) < 0.01:
                axis.axhline(floors[0], color="grey", linestyle="--", linewidth=1)
                axis.annotate(
                    "raw pixels", (0.99, floors[0]), xycoords=("axes fraction", "data"), xytext=(0, -3),
                    textcoords="offset points", ha="right", va="top", fontsize=8, color="grey",
                )  # fmt: skip
        else:
            axis.set_ylim(0, max(1.02, axis.get_ylim()[1]))
    several = any(len(setting.rows) > 1 for setting in shown)
    note = (
        "thick: mean, as far as all seeds that have begun have come; thin: each seed" if several else "one job a line"
    )
    if len(begun) > len(shown):
        note += f"; the {len(shown)} best of {len(begun)} settings"
    _heading(figure, f"{found.name}: learning curves", note)
    _legend(figure, panels[0])
    _save(figure, path)


PIXELS = "baseline/pixels_knn_top1"


def _curve(lines: Sequence[Mapping[str, float]], metric: str) -> list[tuple[float, float]]:
    return [(line["epoch"], line[metric]) for line in lines if math.isfinite(line.get(metric, math.nan))]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at each epoch over the curves that have one there, as far as all of them go and the longest goes on."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            at.setdefault(x, []).append(y)
    # A mean over fewer seeds than a moment before would jump without anything having happened.
    most = max((len(values) for values in at.values()), default=0)
    return [(x, sum(values) / len(values)) for x, values in sorted(at.items()) if len(values) == most]


# ---------------------------------------------------------------------------------------------------------------- shared


def _having(found: Results, *keys: str) -> list[Setting]:
    """Settings that have all of these axes, the best first."""
    return [setting for setting in found.settings if setting.axes.keys() >= {*keys}]


def _measured(settings: Sequence[Setting]) -> list[str]:
    """The accuracies that some of these settings have."""
    return [name for name in ACCURACIES if any(setting.seeds(name) for setting in settings)]


def _estimate(setting: Setting, metric: str) -> Estimate:
    found = setting.estimate(metric)
    assert found
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ordered(settings: Sequence[Setting], key: str) -> list[str]:
    """Each value of an axis once, as text: numbers by size, then the rest by name."""
    different = {text(setting.axes[key]): setting.axes[key] for setting in settings}
    numbers = sorted((name for name, value in different.items() if _is_number(value)), key=lambda name: different[name])
    return numbers + sorted(name for name in different if name not in numbers)


def _shortened(name: str, room: int) -> str:
    """`name`, or its two ends: what differs often stands at the end."""
    if len(name) <= room:
        return name
    end = (room - 1) // 2
    return f"{name[: room - 1 - end]}…{name[-end:]}"


def _told_apart(names: Sequence[str], room: int = NAME_ROOM) -> dict[str, str]:
    """Each name in at most `room` characters; where the ends do not tell them apart, without what all begin and end with."""
    short = {name: _shortened(name, room) for name in names}
    if len(set(short.values())) == len(short):
        return short
    start = len(os.path.commonprefix(list(short)))
    end = len(os.path.commonprefix([name[start:][::-1] for name in short]))
    first = next(iter(short))
    while start and first[start - 1] in _OF_NUMBERS:  # 0.05 and 0.03 differ in one digit, and are numbers
        start -= 1
    while end and first[len(first) - end] in _OF_NUMBERS:
        end -= 1
    return {name: _shortened(f"…{name[start : len(name) - end]}…", room) for name in short}


def _label(found: Results, setting: Setting, keys: Sequence[str]) -> str:
    """The values of these axes for a legend, such as "temperature=0.1, lr=0.03"."""
    names, parts = short_names(found.axes), []
    for key in keys:
        values = _told_apart(_ordered(_having(found, key), key))
        value = typed(setting.axes, key)
        parts.append(f"{names[key]}={values.get(value, value)}")
    return ", ".join(parts)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](number % 10) for number in range(count)]


def _figure(width: float, height: float, panels: int, sharey: bool = False) -> "tuple[Figure, list[Axes]]":
    """In inches; by itself, so that pyplot's settings and windows have no part in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 6.5), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])


def _heading(figure: "Figure", title: str, note: str) -> None:
    """The title and, smaller, what the marks mean; broken into lines that fit the width."""
    room = int(figure.get_figwidth() * 11)
    lines = textwrap.wrap(title, room) + textwrap.wrap(note, int(room * 1.15))
    figure.suptitle("\n".join(lines), fontsize=10)


def _legend(figure: "Figure", axis: "Axes") -> None:
    """Below the panels, in as many columns as the longest entry leaves room for."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    labels = [_shortened(name, LABEL_ROOM) for name in labels]
    room = figure.get_figwidth() * 11.5
    columns = max(1, min(len(labels), int(room / (max(map(len, labels)) + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _save(figure: "Figure", path: Path) -> None:
    new = path.with_name(path.name + ".new")
    figure.savefig(new, format="png", dpi=DPI)
    new.replace(path)
