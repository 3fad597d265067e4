"""Plots of a sweep: accuracy over each parameter, over two parameters as a map, and the learning curves."""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from twoviews.figures import draw_baselines, drawing, merged_legend
from twoviews.protocols.units import ACCURACIES, KNN_TOP1
from twoviews.sweeps.job import text
from twoviews.sweeps.results import CONFIDENCE, ConfigResults, Results, as_numbers, estimate

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
    plots = {}
    for keys in [*combinations(results.varying, 1), *combinations(results.varying, 2)]:
        configs, names = _with_accuracy(results, *keys), [results.varying[key] for key in keys]
        cells = {tuple(text(config.parameters[key]) for key in keys) for config in configs}
        counts = [len(_ordered_values(configs, key)) for key in keys]
        if min(counts) > 1 and len(cells) >= 0.5 * math.prod(counts):  # a map that is not nearly empty
            kind, plot = ("axis", _plot_parameter) if len(keys) == 1 else ("map", _plot_map)
            path = folder / re.sub(r"[^\w.-]", "_", "_".join([kind, *names]) + ".png")
            plots[f"Accuracy over {' and '.join(names)}"] = path
            plot(path, results, *keys)
    if metrics := [name for name in CURVES if not results.measured_once(name)]:
        plots["Learning curves"] = path = folder / "learning.png"
        _plot_curves(path, results, metrics)
    return plots


def _with_accuracy(results: Results, *keys: str) -> list[ConfigResults]:
    """Configs that have all of these parameters and an accuracy, the best first."""
    return [config for config in results.configs if config.parameters.keys() >= {*keys} and config.accuracies]


def _metrics(configs: Sequence[ConfigResults]) -> list[str]:
    """The accuracies that any of these configs has."""
    return [name for name in ACCURACIES if any(name in config.accuracies for config in configs)]


def _ordered_values(configs: Sequence[ConfigResults], key: str) -> list[str]:
    """Each value of a parameter once, as text: numbers by size, then the others by name."""
    import pandas as pd

    names = pd.Series(sorted({text(config.parameters[key]) for config in configs}), dtype=object)
    return names.sort_values(key=as_numbers, kind="stable").tolist()


def _plot_parameter(path: Path, results: Results, key: str) -> None:
    """A panel for each accuracy: seeds as dots and their means with intervals, a colour for each config of the others."""
    lines: dict[str, list[ConfigResults]] = {}
    for config in (configs := _with_accuracy(results, key)):
        lines.setdefault(results.label(config, without=key), []).append(config)
    note = ""
    if 1 < len(lines) == len(configs):  # in a random search no two agree in the others, and all have one colour
        lines = {"": configs}
    elif len(lines) > MAX_LINES:
        note = f"; the {MAX_LINES} best of {len(lines)} configs of the other parameters"
        lines = dict([*lines.items()][:MAX_LINES])
    shown = [config for line in lines.values() for config in line]
    metrics, order = _metrics(shown), _ordered_values(shown, key)
    scaled = len(order) > MAX_VALUES and (numbers := as_numbers(order)).notna().all()
    several = any(accuracy.count > 1 for config in shown for accuracy in config.accuracies.values())
    note = (f"dots: seeds; line: mean; {WHISKERS}" if several else "dots: jobs, one seed each") + note
    title = f"{results.title}: accuracy over {results.varying[key]}"
    with drawing(path, 2.2, panels=(1, len(metrics)), title=title, note=note) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            values = [value for config in shown for value in config.values(metric)]
            # Room for usual intervals; that of two seeds may be wider than all the rest.
            margin = max((0.5 if several else 0.1) * (max(values) - min(values)), 0.5)
            limits = max(0.0, min(values) - margin), min(100.0, max(values) + margin)
            panel.set(xlabel=fill(key, 48), ylabel=f"{ACCURACIES[metric]} accuracy, %", ylim=limits)
            for number, (label, line) in enumerate(lines.items()):
                color, shift = f"C{number}", SHIFT_PT * (number - (len(lines) - 1) / 2)
                for config in line:
                    name = text(config.parameters[key])
                    x = float(name) if scaled else order.index(name)
                    _draw_seeds(panel, x, config.values(metric).tolist(), color, shift)
                if label:
                    panel.plot([], [], "o", color=color, label=fill(label, 100))
            if scaled:
                panel.set_xscale("log" if 0 < numbers.min() * LOG_RATIO <= numbers.max() else "linear")
                panel.dataLim.update_from_data_x(numbers)
                panel.autoscale_view(scaley=False)
            else:
                _set_names(panel, order, "x")
                panel.set_xlim(-0.5, len(order) - 0.5)
            if metric == KNN_TOP1:
                draw_baselines(panel, results.baselines)
        merged_legend(figure, panels)


def _draw_seeds(panel: "Axes", x: float, values: Sequence[float], color: str, shift: float) -> None:
    """Draw the values of one config at `x` on the parameter's axis, shifted to the right by `shift` points."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = panel.figure
    moved = panel.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    style: Any = {"color": color, "transform": moved, "linestyle": ""}
    panel.plot([x] * len(values), values, "o", markersize=4.5, alpha=0.7, markeredgewidth=0, **style)
    if len(values) > 1:
        mean, (bottom, top) = estimate(values), panel.get_ylim()
        low, high = mean.mean - mean.half_width, mean.mean + mean.half_width
        panel.plot([x], [mean.mean], "_", markersize=11, markeredgewidth=1.6, **style)
        panel.plot([x] * 2, [max(low, bottom), min(high, top)], "-", linewidth=0.8, color=color, transform=moved)
        panel.plot([x], max(low, bottom), "_" if low >= bottom else "v", markersize=5, clip_on=False, **style)
        panel.plot([x], min(high, top), "_" if high <= top else "^", markersize=5, clip_on=False, **style)


def _plot_map(path: Path, results: Results, first: str, second: str) -> None:
    """Means over seeds by two parameters; the best of the configs that share a cell."""
    import pandas as pd

    configs = _with_accuracy(results, first, second)
    means = [
        {key: text(config.parameters[key]) for key in (first, second)}
        | {name: accuracy.mean for name, accuracy in config.accuracies.items()}
        for config in configs
    ]
    rows, columns = (_ordered_values(configs, key) for key in (first, second))
    note = "mean over seeds; grey: no finished job"
    note += "; the best of the configs that share a cell" if len(results.varying) > 2 else ""
    title = f"{results.title}: {results.varying[first]} and {results.varying[second]}"
    metrics, lines = _metrics(configs), max(1 + len(row) // LINE_LENGTH for row in rows)
    height = min(8.0, max(1.2, len(rows) * (0.15 + 0.13 * lines)))
    with drawing(path, height, panels=(1, len(metrics)), sharey=True, title=title, note=note) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            table = pd.DataFrame(means).pivot_table(index=first, columns=second, values=metric, aggfunc="max")
            cells = table.reindex(index=rows, columns=columns).to_numpy(float)
            panel.set_facecolor("#dddddd")
            image = panel.imshow(cells, cmap="viridis", aspect="auto")
            figure.colorbar(image, ax=panel, shrink=0.9)
            panel.set(title=f"{ACCURACIES[metric]} accuracy, %", xlabel=fill(second, 40))
            _set_names(panel, columns, "x")
            _set_names(panel, rows, "y")
            panel.grid(visible=False)
            for row, column in zip(*(cells == cells).nonzero(), strict=True) if cells.size <= MAX_VALUES**2 else ():
                colour = "black" if cells[row, column] > sum(image.get_clim()) / 2 else "white"
                panel.text(column, row, f"{cells[row, column]:.1f}", color=colour, ha="center", va="center")
        panels[0].set_ylabel(fill(first, 40))


def _plot_curves(path: Path, results: Results, metrics: Sequence[str]) -> None:
    """Values over epochs: a colour for each of the best configs, a thin line for each job."""
    import pandas as pd

    started = [config for config in results.configs if any(len(results.curves[job]) for job in config.jobs.index)]
    shown = started[:MAX_LINES]
    several = any(len(config.jobs) > 1 for config in shown)
    note = "thick: mean, as far as all started seeds go; thin: each seed" if several else "a line for each job"
    note += f"; the {len(shown)} best of {len(started)} configs" if len(started) > len(shown) else ""
    note += "; a spread of 1 is even, 0 is collapsed" if "train/spread" in metrics else ""
    last = max(curve["epoch"].max() for curve in results.curves.values() if len(curve))
    title = f"{results.title}: learning curves"
    with drawing(path, 2.4, panels=(1, len(metrics)), title=title, note=note) as (figure, panels):
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
                panel.plot(
                    means, color=f"C{number}", marker=marker, markersize=3, label=fill(results.label(config), 100)
                )
            panel.set(xlabel="epoch", ylabel=CURVES[metric], xlim=(0, 1.03 * last or None))
            if metric == KNN_TOP1:
                limits = [*panel.get_ylim(), *(value for values in results.baselines.values() for value in values)]
                panel.set_ylim(min(limits) - 1, max(limits) + 1)
                draw_baselines(panel, results.baselines)
            elif metric == "train/spread":
                panel.set_ylim(0, max(1.02, panel.get_ylim()[1]))
        merged_legend(figure, panels)


def _set_names(panel: "Axes", names: Sequence[str], along: str) -> None:
    """Set a tick for each name at 0, 1, …, with long names on several lines, and on a horizontal axis upright."""
    labels = [fill(name, LINE_LENGTH) for name in names]
    upright = along == "x" and max(map(len, labels)) * len(labels) > 40
    (panel.set_xticks if along == "x" else panel.set_yticks)(range(len(names)), labels, rotation=90 if upright else 0)
