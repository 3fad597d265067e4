"""Plots of a sweep: accuracy over each parameter, over two parameters as a map, and the learning curves."""

import math
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews.figures import draw_baselines, drawing, merged_legend
from twoviews.protocols.units import KNN_TOP1
from twoviews.sweeps.job import short_names, text
from twoviews.sweeps.results import ACCURACIES, CONFIDENCE, ConfigResults, Results, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LINES = 8  # configs of the other parameters that have a colour of their own: the best
MAX_VALUES = 12  # of a parameter: up to so many stand at equal distances, and cells of a map have numbers
LINE_LENGTH = 32  # characters of a value on one line
LOG_RATIO = 10.0  # many positive values whose largest is so many times the smallest get a logarithmic axis
SHIFT_PT = 6.0  # between configs with the same value
CURVES = {KNN_TOP1: "kNN accuracy, %", "train/spread": "spread of projections"}
WHISKERS = f"whiskers: {CONFIDENCE}% t-interval of the mean, an arrow where it leaves the axis"


def plot_all(folder: Path, results: Results) -> dict[str, Path]:
    """Write every plot that the results allow into a folder; returns the files by title."""
    names, paths = short_names(results.varying), {}
    for key in results.varying:
        if len(_ordered_values(_measured(results, key), key)) > 1:
            paths[f"Accuracy over {names[key]}"] = path = folder / f"axis_{_file_name(names[key])}.png"
            _plot_parameter(path, results, key)
    for first, second in combinations(results.varying, 2):
        configs = _measured(results, first, second)
        cells = {(text(config.parameters[first]), text(config.parameters[second])) for config in configs}
        rows, columns = (len(_ordered_values(configs, key)) for key in (first, second))
        if min(rows, columns) > 1 and len(cells) >= 0.5 * rows * columns:  # a map that is not nearly empty
            path = folder / f"map_{_file_name(names[first])}_{_file_name(names[second])}.png"
            paths[f"Accuracy over {names[first]} and {names[second]}"] = path
            _plot_map(path, results, first, second)
    if metrics := [name for name in CURVES if not results.measured_once(name)]:
        paths["Learning curves"] = path = folder / "learning.png"
        _plot_curves(path, results, metrics)
    return paths


def _plot_parameter(path: Path, results: Results, key: str) -> None:
    """A panel for each accuracy: seeds as dots and their means with intervals, a colour for each config of the others."""
    others, configs = [other for other in results.varying if other != key], _measured(results, key)
    names, lines = short_names(results.varying), {}
    for config in configs:
        lines.setdefault(config.label(others, names), []).append(config)
    # In a random search no two configs agree in the other parameters, and all have one colour.
    grouped, count = len(lines) == 1 or any(len(line) > 1 for line in lines.values()), len(lines)
    lines = dict(list(lines.items())[:MAX_LINES]) if grouped else {"": configs}
    shown = [config for line in lines.values() for config in line]
    order, metrics = _ordered_values(shown, key), _metrics(shown)
    scaled = len(order) > MAX_VALUES and all(_is_number(config.parameters[key]) for config in shown)
    seeds = max(len(config.values(name)) for config in shown for name in metrics)
    note = f"dots: seeds; line: mean; {WHISKERS}" if seeds > 1 else "dots: jobs, one seed each"
    note += (
        f"; the {MAX_LINES} best of {count} configs of the other parameters" if grouped and count > MAX_LINES else ""
    )
    heading: Any = {"title": f"{results.title}: accuracy over {names[key]}", "note": note}
    with drawing(path, 2.2, panels=(1, len(metrics)), **heading) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            limits = _limits([config.values(metric).tolist() for config in shown])
            for number, (label, line) in enumerate(lines.items()):
                color, shift = f"C{number % 10}", SHIFT_PT * (number - (len(lines) - 1) / 2)
                for config in line:
                    place = float(config.parameters[key]) if scaled else order.index(text(config.parameters[key]))
                    _draw_seeds(panel, place, config.values(metric).tolist(), limits, color, shift)
                if label:
                    panel.plot([], [], marker="o", linestyle="", color=color, label=_wrapped(label, 100))
            panel.set(xlabel=_wrapped(key, 48), ylabel=f"{ACCURACIES[metric]} accuracy, %", ylim=limits)
            if scaled:
                values = [float(config.parameters[key]) for config in shown]
                low, high = min(values), max(values)
                logarithmic = 0 < low * LOG_RATIO <= high
                room = (high / low) ** 0.05 if logarithmic else 0.05 * (high - low)
                panel.set_xlim((low / room, high * room) if logarithmic else (low - room, high + room))
                panel.set_xscale("log" if logarithmic else "linear")
            else:
                _set_names(panel, order, "x")
                panel.set_xlim(-0.5, len(order) - 0.5)
            if metric == KNN_TOP1:
                draw_baselines(panel, results.baselines)
        merged_legend(figure, panels)


def _draw_seeds(
    panel: "Axes", place: float, values: Sequence[float], limits: tuple[float, float], color: str, shift: float
) -> None:
    """Draw the values of one config at a place of the parameter's axis, shifted by some points."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = panel.figure
    moved = panel.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    style: Any = {"color": color, "transform": moved, "linestyle": ""}
    panel.plot([place] * len(values), values, "o", markersize=4.5, alpha=0.7, markeredgewidth=0, **style)
    if len(values) > 1:
        mean = estimate(values)
        low, high = mean.mean - mean.half_width, mean.mean + mean.half_width
        ends = max(low, limits[0]), min(high, limits[1])
        panel.plot([place], [mean.mean], "_", markersize=11, markeredgewidth=1.6, **style)
        panel.plot([place, place], ends, **{**style, "linestyle": "-", "linewidth": 0.8})
        for end, marker in zip(ends, ("_" if low == ends[0] else "v", "_" if high == ends[1] else "^"), strict=True):
            panel.plot([place], [end], marker, markersize=5, clip_on=False, **style)


def _limits(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits around all seeds with room for usual intervals; that of two seeds may be wider than all the rest."""
    values = [value for config_values in seeds for value in config_values]
    room = 0.5 if max(map(len, seeds)) > 1 else 0.1
    margin = max(room * (max(values) - min(values)), 0.5)
    return max(0.0, min(values) - margin), min(100.0, max(values) + margin)


def _plot_map(path: Path, results: Results, first: str, second: str) -> None:
    """Means over seeds by two parameters; the best of the configs that share a cell."""
    import pandas as pd

    configs, names = _measured(results, first, second), short_names(results.varying)
    rows, columns = (_ordered_values(configs, key) for key in (first, second))
    note = "mean over seeds; grey: no finished job"
    note += "; the best of the configs that share a cell" if len(results.varying) > 2 else ""
    heading: Any = {"title": f"{results.title}: {names[first]} and {names[second]}", "note": note}
    metrics, lines = _metrics(configs), max(1 + len(row) // LINE_LENGTH for row in rows)
    height = min(8.0, max(1.2, len(rows) * (0.15 + 0.13 * lines)))
    with drawing(path, height, panels=(1, len(metrics)), sharey=True, **heading) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            means = [(text(c.parameters[first]), text(c.parameters[second]), c.values(metric).mean()) for c in configs]
            table = pd.DataFrame(means).pivot_table(index=0, columns=1, values=2, aggfunc="max")
            cells = table.reindex(index=rows, columns=columns).to_numpy(float)
            panel.set_facecolor("#dddddd")
            image = panel.imshow(cells, cmap="viridis", aspect="auto")
            figure.colorbar(image, ax=panel, shrink=0.9)
            panel.set(title=f"{ACCURACIES[metric]} accuracy, %", xlabel=_wrapped(second, 40))
            _set_names(panel, columns, "x")
            _set_names(panel, rows, "y")
            panel.grid(visible=False)
            for row, column in zip(*(cells == cells).nonzero(), strict=True) if cells.size <= MAX_VALUES**2 else ():
                colour = "black" if cells[row, column] > sum(image.get_clim()) / 2 else "white"
                panel.text(column, row, f"{cells[row, column]:.1f}", color=colour, ha="center", va="center")
        panels[0].set_ylabel(_wrapped(first, 40))


def _plot_curves(path: Path, results: Results, metrics: Sequence[str]) -> None:
    """Values over epochs: a colour for each of the best configs, a thin line for each job."""
    import pandas as pd

    started = [config for config in results.configs if any(len(results.curves[job]) for job in config.jobs.index)]
    shown, names = started[:MAX_LINES], short_names(results.varying)
    several = any(len(config.jobs) > 1 for config in shown)
    note = "thick: mean, as far as all started seeds go; thin: each seed" if several else "a line for each job"
    note += f"; the {len(shown)} best of {len(started)} configs" if len(started) > len(shown) else ""
    note += "; a spread of 1 is even, 0 is collapsed" if "train/spread" in metrics else ""
    heading: Any = {"title": f"{results.title}: learning curves", "note": note}
    with drawing(path, 2.4, panels=(1, len(metrics)), **heading) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            for number, config in enumerate(shown):
                curves = [curve for job in config.jobs.index if metric in (curve := results.curves[job])]
                own = [curve[curve[metric].abs() < math.inf].groupby("epoch")[metric].last() for curve in curves]
                for seed in own if len(own) > 1 else ():
                    panel.plot(seed, color=f"C{number}", alpha=0.4, linewidth=0.7)
                # As far as all seeds go: a mean over fewer seeds would jump without anything having happened.
                seeds: Any = pd.concat(own, axis=1) if own else pd.DataFrame()
                means = seeds.mean(axis=1)[(count := seeds.count(axis=1)) == count.max()]
                marker = "o" if metric == KNN_TOP1 and len(means) < 30 else None
                label = _wrapped(config.label(results.varying, names), 100) or None
                panel.plot(means, color=f"C{number}", marker=marker, markersize=3, label=label)
            last = max(curve["epoch"].max() for curve in results.curves.values() if len(curve))
            panel.set(xlabel="epoch", ylabel=CURVES[metric], xlim=(0, 1.03 * last or None))
            if metric == KNN_TOP1:
                limits = [*panel.get_ylim(), *(value for values in results.baselines.values() for value in values)]
                panel.set_ylim(min(limits) - 1, max(limits) + 1)
                draw_baselines(panel, results.baselines)
            else:
                panel.set_ylim(0, max(1.02, panel.get_ylim()[1]))
        merged_legend(figure, panels)


def _measured(results: Results, *keys: str) -> list[ConfigResults]:
    """Configs that have all of these parameters and an accuracy, the best first."""
    return [config for config in results.configs if config.parameters.keys() >= {*keys} and _metrics([config])]


def _metrics(configs: Sequence[ConfigResults]) -> list[str]:
    """The accuracies that any of these configs has."""
    return [name for name in ACCURACIES if any(len(config.values(name)) for config in configs)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ordered_values(configs: Sequence[ConfigResults], key: str) -> list[str]:
    """Each value of a parameter once, as text: numbers by size, then the others by name."""
    values = {text(config.parameters[key]): config.parameters[key] for config in configs}
    return sorted(values, key=lambda label: (0, values[label], "") if _is_number(values[label]) else (1, 0, label))


def _set_names(panel: "Axes", names: Sequence[str], along: str) -> None:
    """Set a tick for each name at 0, 1, …, with long names on several lines, and on a horizontal axis upright."""
    labels = [_wrapped(name, LINE_LENGTH) for name in names]
    upright = along == "x" and max(map(len, labels)) * len(labels) > 40
    (panel.set_xticks if along == "x" else panel.set_yticks)(range(len(names)), labels, rotation=90 if upright else 0)


def _wrapped(name: str, length: int) -> str:
    return "\n".join(textwrap.wrap(name, length))


def _file_name(name: str) -> str:
    """A name with underscores for everything that is unusual in names of files."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
