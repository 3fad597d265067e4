"""Plots of a sweep: accuracy over each parameter, over two parameters as a map, and the learning curves."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from twoviews.figures import save_figure
from twoviews.sweeps.figures import (
    add_heading,
    add_legend,
    colours,
    file_name,
    new_panels,
    set_numeric_ticks,
    shortened,
    shortened_apart,
)
from twoviews.sweeps.formatting import short_names, text, typed
from twoviews.sweeps.results import ACCURACIES, CONFIDENCE, ConfigResults, Estimate, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LINES = 8  # configs of the other parameters that have a line of their own: the best
MAX_NUMBERED_CELLS = 12  # maps with more rows or columns have no numbers in their cells
CURVES = {"knn/top1": "kNN accuracy, %", "train/spread": "spread (1 even, 0 collapsed)"}
PIXELS_KNN = "baseline/pixels_knn_top1"


def plot_all(folder: Path, results: Results) -> dict[str, Path]:
    """Write every plot that the results allow into a folder; returns the files by title."""
    names, paths = short_names(results.axes), {}
    for key in results.axes:
        configs = _with_keys(results, key)
        if (metrics := _measured(configs)) and len(_ordered_values(configs, key)) > 1:
            path = folder / f"axis_{file_name(names[key])}.png"
            _plot_parameter(path, results, key, metrics)
            paths[f"Accuracy over {names[key]}"] = path
    for first, second in combinations(results.axes, 2):
        configs = _with_keys(results, first, second)
        if (metrics := _measured(configs)) and _fills_map(configs, first, second):
            path = folder / f"map_{file_name(names[first])}_{file_name(names[second])}.png"
            _plot_map(path, results, first, second, metrics)
            paths[f"Accuracy over {names[first]} and {names[second]}"] = path
    if any(name in curve for curve in results.curves.values() for name in CURVES):
        path = folder / "learning.png"
        _plot_curves(path, results)
        paths["Learning curves"] = path
    return paths


def _plot_parameter(path: Path, results: Results, key: str, metrics: Sequence[str]) -> None:
    """A panel for each accuracy: means over seeds with their bands, a line for each config of the other parameters."""
    others, names = [other for other in results.axes if other != key], short_names(results.axes)
    measured = [config for config in _with_keys(results, key) if _measured([config])]
    lines: dict[str, list[ConfigResults]] = {}
    for config in measured:
        lines.setdefault(_label(results, config, others), []).append(config)
    count = len(lines)
    # In a random search no two configs agree in the other parameters, so there is nothing to join.
    joined = count == 1 or any(len(line) > 1 for line in lines.values())
    lines = dict(list(lines.items())[:MAX_LINES]) if joined else {"": measured}
    shown = [config for line in lines.values() for config in line]
    numeric = all(_is_number(config.axes[key]) for config in shown)
    order = [] if numeric else _ordered_values(_with_keys(results, key), key)
    height = 4.2 if numeric else 1.6 + max(1.2, len(order) * (0.32 + 0.16 * len(lines)))
    figure, panels = new_panels(5.6 * len(metrics) + (0 if numeric else 1.6), height, len(metrics), sharey=not numeric)
    for panel, metric in zip(panels, metrics, strict=True):
        for number, ((label, line), colour) in enumerate(zip(lines.items(), colours(len(lines)), strict=True)):
            points = [(config.axes[key], config) for config in line if len(config.values(metric))]
            if numeric:
                _draw_numeric(panel, points, metric, colour, label, joined)
            else:
                shift = 0.5 * ((number + 0.5) / len(lines) - 0.5)
                places = [(order.index(text(value)) + shift, config) for value, config in points]
                _draw_categorical(panel, places, metric, colour, label, with_seeds=joined)
        title = f"{ACCURACIES[metric]} accuracy, %"
        if numeric:
            set_numeric_ticks(panel, sorted({float(config.axes[key]) for config in shown}))
            panel.set(xlabel=key, ylabel=title)
        else:
            panel.set_yticks(range(len(order)), list(shortened_apart(order).values()))
            panel.set_ylim(len(order) - 0.5, -0.5)
            panel.set(xlabel=title)
        _set_limits(panel, shown, metric, "y" if numeric else "x")
        panel.grid(alpha=0.3)
    if not numeric:
        panels[0].set_ylabel(shortened(key))
    note = f"mean over seeds, {'band' if numeric and joined else 'bar'}: {CONFIDENCE}% t-interval; small dots: seeds"
    if joined and count > MAX_LINES:
        note += f"; the {MAX_LINES} best of {count} configs of the other parameters"
    add_heading(figure, f"{results.name}: accuracy over {names[key]}", note)
    add_legend(figure, panels[0])
    save_figure(figure, path)


def _draw_numeric(
    panel: "Axes", points: list[tuple[Any, ConfigResults]], metric: str, colour: Any, label: str, joined: bool
) -> None:
    """A line with a band, or markers with bars if they are not joined."""
    points = sorted(points, key=lambda point: float(point[0]))
    x, estimates = [float(value) for value, _ in points], [_estimate(config, metric) for _, config in points]
    means, halves = [value.mean for value in estimates], [value.half for value in estimates]
    if joined:
        panel.plot(x, means, marker="o", markersize=5, color=colour, label=label or None)
        low, high = ([mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        # One seed has no interval: the band is open there, and a value between two such ones gets a bar instead.
        finite = [False, *map(math.isfinite, halves), False]
        for place, half in enumerate(halves):
            if finite[place + 1] and not (finite[place] or finite[place + 2]):
                panel.errorbar(x[place], means[place], half, color=colour, alpha=0.5, capsize=3)
    else:
        bars = [half if math.isfinite(half) else 0.0 for half in halves]
        panel.errorbar(x, means, bars, fmt="o", markersize=5, color=colour, elinewidth=1, capsize=2)
    for place, (_, config) in zip(x, points, strict=True):
        seeds = config.values(metric)
        if len(seeds) > 1:
            panel.scatter([place] * len(seeds), seeds, s=7, color=colour, alpha=0.6, linewidths=0)


def _draw_categorical(
    panel: "Axes",
    places: list[tuple[float, ConfigResults]],
    metric: str,
    colour: Any,
    label: str,
    with_seeds: bool,
) -> None:
    """Horizontal bars around markers, one at each place of the vertical axis."""
    for number, (place, config) in enumerate(places):
        value, seeds = _estimate(config, metric), config.values(metric)
        bar = value.half if math.isfinite(value.half) else 0.0
        style = {"fmt": "o", "markersize": 5, "color": colour, "capsize": 3}
        panel.errorbar(value.mean, place, xerr=bar, label=(label or None) if number == 0 else None, **style)
        if len(seeds) > 1 and with_seeds:
            panel.scatter(seeds, [place + 0.08] * len(seeds), s=7, color=colour, alpha=0.6, linewidths=0)


def _set_limits(panel: "Axes", configs: Sequence[ConfigResults], metric: str, along: Literal["x", "y"]) -> None:
    """Limits around all seeds and the intervals of at least three; that of two may be wider than all the rest."""
    estimates = [value for config in configs if (value := config.estimate(metric))]
    values = [value for config in configs for value in config.values(metric)]
    values += [value.mean + sign * value.half for value in estimates if value.count > 2 for sign in (-1, 1)]
    margin = max(0.05 * (max(values) - min(values)), 0.5)
    limits = (max(0.0, min(values) - margin), min(100.0, max(values) + margin))
    (panel.set_ylim if along == "y" else panel.set_xlim)(*limits)


def _fills_map(configs: Sequence[ConfigResults], first: str, second: str) -> bool:
    """Whether at least half of the cells of a map of these parameters belong to a config."""
    cells = {(text(config.axes[first]), text(config.axes[second])) for config in configs}
    rows, columns = {row for row, _ in cells}, {column for _, column in cells}
    return min(len(rows), len(columns)) > 1 and len(cells) >= 0.5 * len(rows) * len(columns)


def _plot_map(path: Path, results: Results, first: str, second: str, metrics: Sequence[str]) -> None:
    """Means over seeds by two parameters; the best of the configs that share a cell."""
    import numpy as np

    configs, names = _with_keys(results, first, second), short_names(results.axes)
    rows, columns = _ordered_values(configs, first), _ordered_values(configs, second)
    longest = max(map(len, shortened_apart(columns).values()))
    width = len(metrics) * (2.4 + max(2.4, 0.62 * len(columns)))
    height = 2.0 + max(1.6, 0.45 * len(rows)) + (0.075 * longest if longest > 6 else 0)
    figure, panels = new_panels(min(width, 22.0), min(height, 18.0), len(metrics), sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        cells = np.full((len(rows), len(columns)), np.nan)
        for config in configs:
            if value := config.estimate(metric):
                cell = rows.index(text(config.axes[first])), columns.index(text(config.axes[second]))
                cells[cell] = np.nanmax([cells[cell], value.mean])
        panel.set_facecolor("#dddddd")
        figure.colorbar(panel.imshow(cells, cmap="viridis", aspect="auto"), ax=panel, shrink=0.9)
        panel.set_title(f"{ACCURACIES[metric]} accuracy, %", fontsize=10)
        panel.set_xticks(range(len(columns)), list(shortened_apart(columns).values()))
        if longest > 6:
            panel.tick_params(axis="x", labelrotation=90)
        panel.set_yticks(range(len(rows)), list(shortened_apart(rows).values()))
        panel.set_xlabel(shortened(second))
        if max(len(rows), len(columns)) <= MAX_NUMBERED_CELLS:
            middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
            for (row, column), mean in np.ndenumerate(cells):
                if not math.isnan(mean):
                    style: Any = {"ha": "center", "va": "center", "fontsize": 8}
                    panel.text(column, row, f"{mean:.1f}", color="black" if mean > middle else "white", **style)
    panels[0].set_ylabel(shortened(first))
    note = "mean over seeds; grey: no finished job"
    if len(results.axes) > 2:
        note += "; the best of the configs that share a cell"
    add_heading(figure, f"{results.name}: {names[first]} and {names[second]}", note)
    save_figure(figure, path)


def _plot_curves(path: Path, results: Results) -> None:
    """KNN accuracy and spread over epochs: a colour for each of the best configs, a thin line for each job."""
    import pandas as pd

    curves = {digest: curve for digest, curve in results.curves.items() if len(curve)}
    metrics = [name for name in CURVES if any(name in curve for curve in curves.values())]
    started = [config for config in results.configs if any(digest in curves for digest in config.jobs.index)]
    shown = started[:MAX_LINES]
    figure, panels = new_panels(5.6 * len(metrics), 4.2, len(metrics))
    for panel, metric in zip(panels, metrics, strict=True):
        for config, colour in zip(shown, colours(len(shown)), strict=True):
            own = [curves[digest] for digest in config.jobs.index if digest in curves and metric in curves[digest]]
            own = [curve[curve[metric].abs() < math.inf].groupby("epoch")[metric].last() for curve in own]
            for line in own if len(own) > 1 else ():
                marker = "." if len(line) == 1 else None  # or it would be invisible
                panel.plot(line.index, line, color=colour, alpha=0.4, linewidth=0.8, marker=marker)
            # As far as all seeds go: a mean over fewer seeds would jump without anything having happened.
            seeds: Any = pd.concat(own, axis=1) if own else pd.DataFrame()
            means = seeds.mean(axis=1)[(count := seeds.count(axis=1)) == count.max()]
            marker = "o" if len(means) == 1 or metric == "knn/top1" and len(means) < 30 else None
            label = _label(results, config, results.axes) or None
            panel.plot(means.index, means, color=colour, marker=marker, markersize=3.5, label=label)
        panel.set(xlabel="epoch", ylabel=CURVES[metric])
        last = max(curve["epoch"].max() for curve in curves.values())
        panel.set_xlim(0, 1.03 * last if last else None)
        panel.grid(alpha=0.3)
        if metric == "knn/top1":
            _draw_pixels_line(panel, [curve[PIXELS_KNN] for curve in curves.values() if PIXELS_KNN in curve])
        else:
            panel.set_ylim(0, max(1.02, panel.get_ylim()[1]))
    several = any(len(config.jobs) > 1 for config in shown)
    note = "thick: mean, as far as all started seeds go; thin: each seed" if several else "a line for each job"
    if len(started) > len(shown):
        note += f"; the {len(shown)} best of {len(started)} configs"
    add_heading(figure, f"{results.name}: learning curves", note)
    add_legend(figure, panels[0])
    save_figure(figure, path)


def _draw_pixels_line(panel: "Axes", columns: Sequence[Any]) -> None:
    """The kNN accuracy on raw pixels as a dashed line, if all jobs have the same."""
    values = [value for column in columns for value in column.dropna()]
    if not values or max(values) - min(values) >= 0.01:
        return
    panel.axhline(values[0], color="grey", linestyle="--", linewidth=1)
    style: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "top"}
    panel.annotate("raw pixels", (0.99, values[0]), xytext=(0, -3), fontsize=8, color="grey", **style)


def _with_keys(results: Results, *keys: str) -> list[ConfigResults]:
    """Configs that have all of these parameters, the best first."""
    return [config for config in results.configs if config.axes.keys() >= {*keys}]


def _measured(configs: Sequence[ConfigResults]) -> list[str]:
    """The accuracies that any of these configs has."""
    return [name for name in ACCURACIES if any(len(config.values(name)) for config in configs)]


def _estimate(config: ConfigResults, metric: str) -> Estimate:
    value = config.estimate(metric)
    assert value
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ordered_values(configs: Sequence[ConfigResults], key: str) -> list[str]:
    """Each value of a parameter once, as text: numbers by size, then the others by name."""
    values = {text(config.axes[key]): config.axes[key] for config in configs}
    numbers = sorted((name for name, value in values.items() if _is_number(value)), key=lambda name: values[name])
    return numbers + sorted(name for name in values if name not in numbers)


def _label(results: Results, config: ConfigResults, keys: Sequence[str]) -> str:
    """The values of these parameters for a legend, such as "temperature=0.1, lr=0.03"."""
    names, parts = short_names(results.axes), []
    for key in keys:
        value = typed(config.axes, key)
        parts.append(
            f"{names[key]}={shortened_apart(_ordered_values(_with_keys(results, key), key)).get(value, value)}"
        )
    return ", ".join(parts)
