"""Plots of a sweep: accuracy over each parameter, over two parameters as a map, and the learning curves."""

import math
import os.path
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews.figures import draw_baselines, drawing, merged_legend
from twoviews.sweeps.formatting import short_names, text, typed
from twoviews.sweeps.results import ACCURACIES, CONFIDENCE, ConfigResults, Results, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LINES = 8  # configs of the other parameters that have a colour of their own: the best
MAX_NUMBERED_CELLS = 12  # maps with more rows or columns have no numbers in their cells
MAX_VALUE_TICKS = 12  # more numbers get the ticks of matplotlib
NAME_LENGTH = 30  # most characters of a value beside an axis
NUMBER_CHARACTERS = "0123456789.+-"
LOG_RATIO = 10.0  # positive values whose largest is so many times the smallest get a logarithmic axis
TICK_DISTANCE = 0.07  # share of an axis between two tick labels that do not touch
SHIFT_PT = 6.0  # between configs with the same value
CURVES = {"knn/top1": "kNN accuracy, %", "train/spread": "spread of projections (0: collapsed)"}
WHISKERS = f"whiskers: {CONFIDENCE}% t-interval of the mean, an arrow where it leaves the axis"


def plot_all(folder: Path, results: Results) -> dict[str, Path]:
    """Write every plot that the results allow into a folder; returns the files by title."""
    names, paths = short_names(results.axes), {}
    for key in results.axes:
        if len(_ordered_values(_measured(results, key), key)) > 1:
            paths[f"Accuracy over {names[key]}"] = path = folder / f"axis_{_file_name(names[key])}.png"
            _plot_parameter(path, results, key)
    for first, second in combinations(results.axes, 2):
        if _fills_map(_measured(results, first, second), first, second):
            path = folder / f"map_{_file_name(names[first])}_{_file_name(names[second])}.png"
            paths[f"Accuracy over {names[first]} and {names[second]}"] = path
            _plot_map(path, results, first, second)
    if metrics := [name for name in CURVES if not results.measured_once(name)]:
        paths["Learning curves"] = path = folder / "learning.png"
        _plot_curves(path, results, metrics)
    return paths


def _plot_parameter(path: Path, results: Results, key: str) -> None:
    """A panel for each accuracy: seeds as dots and their means with intervals, a colour for each config of the others."""
    others, configs = [other for other in results.axes if other != key], _measured(results, key)
    lines: dict[str, list[ConfigResults]] = {}
    for config in configs:
        lines.setdefault(_label(results, config, others), []).append(config)
    count = len(lines)
    # In a random search no two configs agree in the other parameters, so there is nothing to join.
    joined = count == 1 or any(len(line) > 1 for line in lines.values())
    lines = dict(list(lines.items())[:MAX_LINES]) if joined else {"": configs}
    shown = [config for line in lines.values() for config in line]
    numeric, order = all(_is_number(config.axes[key]) for config in shown), _ordered_values(shown, key)
    metrics = [name for name in ACCURACIES if any(len(config.values(name)) for config in shown)]
    seeds = max(len(config.values(name)) for config in shown for name in metrics)
    note = f"dots: seeds; line: mean; {WHISKERS}" if seeds > 1 else "dots: jobs, one seed each"
    if joined and count > MAX_LINES:
        note += f"; the {MAX_LINES} best of {count} configs of the other parameters"
    height = 3.2 if numeric else 1.4 + len(order) * (0.2 + SHIFT_PT / 72 * len(lines))
    heading = {"title": f"{results.title}: accuracy over {short_names(results.axes)[key]}", "note": note}
    options = {"panels": (1, len(metrics)), "sharey": not numeric, **heading}
    with drawing(path, min(height, 9.5), **options) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            limits = _limits([config.values(metric).tolist() for config in shown])
            for number, (label, line) in enumerate(lines.items()):
                style = {"color": f"C{number % 10}", "shift": SHIFT_PT * (number - (len(lines) - 1) / 2)}
                places = [float(c.axes[key]) if numeric else order.index(text(c.axes[key])) for c in line]
                for place, config in sorted(zip(places, line, strict=True), key=lambda one: one[0]):
                    _draw_seeds(panel, place, config.values(metric).tolist(), limits, upright=numeric, **style)
                if label:
                    panel.plot([], [], marker="o", linestyle="", color=style["color"], label=label)
            if numeric:
                _set_numeric_ticks(panel, sorted({float(config.axes[key]) for config in shown}))
                panel.set(xlabel=key, ylabel=f"{ACCURACIES[metric]} accuracy, %", ylim=limits)
            else:
                panel.set_yticks(range(len(order)), [*_shortened_apart(order).values()])
                panel.set(xlabel=f"{ACCURACIES[metric]} accuracy, %", xlim=limits, ylim=(len(order) - 0.5, -0.5))
            if metric == "knn/top1":
                draw_baselines(panel, results.baselines, upright=numeric)
        if not numeric:
            panels[0].set_ylabel(_shortened(key))
        merged_legend(figure, panels)


def _draw_seeds(
    panel: "Axes",
    place: float,
    values: Sequence[float],
    limits: tuple[float, float],
    *,
    color: str,
    shift: float,
    upright: bool,
) -> None:
    """Draw the values of one config at a place of the parameter's axis, shifted by some points."""
    from matplotlib.transforms import ScaledTranslation

    x, y = (shift / 72, 0) if upright else (0, shift / 72)
    figure: Any = panel.figure
    moved = panel.transData + ScaledTranslation(x, -y, figure.dpi_scale_trans)

    def put(along: Sequence[float], marker: str = "", **style: Any) -> None:
        both = [place] * len(along), along
        xy = both if upright else both[::-1]
        panel.plot(*xy, **{"color": color, "marker": marker, "transform": moved, "linestyle": "", **style})

    bar, low_arrow, high_arrow = ("_", "v", "^") if upright else ("|", "<", ">")
    put(values, "o", markersize=4.5, alpha=0.7, markeredgewidth=0)
    if len(values) < 2:
        return
    found = estimate(values)
    assert found
    ends = found.mean - found.half, found.mean + found.half
    put([found.mean], bar, markersize=11, markeredgewidth=1.6)
    put([max(ends[0], limits[0]), min(ends[1], limits[1])], linestyle="-", linewidth=0.8)
    put([max(ends[0], limits[0])], bar if ends[0] >= limits[0] else low_arrow, markersize=5, clip_on=False)
    put([min(ends[1], limits[1])], bar if ends[1] <= limits[1] else high_arrow, markersize=5, clip_on=False)


def _limits(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits around all seeds with room for usual intervals; that of two seeds may be wider than all the rest."""
    values = [value for each in seeds for value in each]
    room = 0.5 if max(map(len, seeds)) > 1 else 0.1
    margin = max(room * (max(values) - min(values)), 0.5)
    return max(0.0, min(values) - margin), min(100.0, max(values) + margin)


def _fills_map(configs: Sequence[ConfigResults], first: str, second: str) -> bool:
    """Whether at least half of the cells of a map of these parameters belong to a config."""
    cells = {(text(config.axes[first]), text(config.axes[second])) for config in configs}
    rows, columns = {row for row, _ in cells}, {column for _, column in cells}
    return min(len(rows), len(columns)) > 1 and len(cells) >= 0.5 * len(rows) * len(columns)


def _plot_map(path: Path, results: Results, first: str, second: str) -> None:
    """Means over seeds by two parameters; the best of the configs that share a cell."""
    import pandas as pd

    configs, names = _measured(results, first, second), short_names(results.axes)
    rows, columns = (_ordered_values(configs, key) for key in (first, second))
    metrics = [name for name in ACCURACIES if any(len(config.values(name)) for config in configs)]
    note = "mean over seeds; grey: no finished job"
    note += "; the best of the configs that share a cell" if len(results.axes) > 2 else ""
    longest = max(map(len, _shortened_apart(columns).values()))
    height = 1.4 + max(1.2, 0.3 * len(rows)) + (0.07 * longest if longest > 6 else 0)
    heading = {"title": f"{results.title}: {names[first]} and {names[second]}", "note": note}
    options = {"panels": (1, len(metrics)), "sharey": True, **heading}
    with drawing(path, min(height, 9.5), **options) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            means = [
                (text(c.axes[first]), text(c.axes[second]), c.values(metric).mean()) for c in configs
            ]  # NaN where it was not measured
            table = (
                pd.DataFrame(means)
                .pivot_table(index=0, columns=1, values=2, aggfunc="max")
                .reindex(rows, columns=columns)
            )
            cells = table.to_numpy(float)
            panel.set_facecolor("#dddddd")
            figure.colorbar(panel.imshow(cells, cmap="viridis", aspect="auto"), ax=panel, shrink=0.9)
            panel.set(title=f"{ACCURACIES[metric]} accuracy, %", xlabel=_shortened(second))
            panel.set_xticks(
                range(len(columns)), [*_shortened_apart(columns).values()], rotation=90 if longest > 6 else 0
            )
            panel.set_yticks(range(len(rows)), [*_shortened_apart(rows).values()])
            panel.grid(visible=False)
            if max(len(rows), len(columns)) <= MAX_NUMBERED_CELLS:
                middle = (table.min(axis=None) + table.max(axis=None)) / 2
                for row, column in zip(*(~table.isna()).to_numpy().nonzero(), strict=True):
                    colour = "black" if cells[row, column] > middle else "white"
                    panel.text(column, row, f"{cells[row, column]:.1f}", color=colour, ha="center", va="center")
        panels[0].set_ylabel(_shortened(first))


def _plot_curves(path: Path, results: Results, metrics: Sequence[str]) -> None:
    """Values over epochs: a colour for each of the best configs, a thin line for each job."""
    import pandas as pd

    started = [config for config in results.configs if any(len(results.curves[job]) for job in config.jobs.index)]
    shown = started[:MAX_LINES]
    several = any(len(config.jobs) > 1 for config in shown)
    note = "thick: mean, as far as all started seeds go; thin: each seed" if several else "a line for each job"
    note += f"; the {len(shown)} best of {len(started)} configs" if len(started) > len(shown) else ""
    heading = {"title": f"{results.title}: learning curves", "note": note}
    with drawing(path, 3.2, panels=(1, len(metrics)), **heading) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            for number, config in enumerate(shown):
                curves = [curve for job in config.jobs.index if metric in (curve := results.curves[job])]
                own = [curve[curve[metric].abs() < math.inf].groupby("epoch")[metric].last() for curve in curves]
                seeds: Any = pd.concat(own, axis=1) if own else pd.DataFrame()
                for name in range(seeds.shape[1] if seeds.shape[1] > 1 else 0):
                    panel.plot(seeds.iloc[:, name].dropna(), color=f"C{number}", alpha=0.4, linewidth=0.7)
                # As far as all seeds go: a mean over fewer seeds would jump without anything having happened.
                means = seeds.mean(axis=1)[(count := seeds.count(axis=1)) == count.max()]
                marker = "o" if metric == "knn/top1" and len(means) < 30 else None
                label = _label(results, config, results.axes) or None
                panel.plot(means, color=f"C{number}", marker=marker, markersize=3, label=label)
            last = max(curve["epoch"].max() for curve in results.curves.values() if len(curve))
            panel.set(xlabel="epoch", ylabel=CURVES[metric], xlim=(0, 1.03 * last or None))
            if metric == "knn/top1":
                low, high = panel.get_ylim()
                known = [value for values in results.baselines.values() for value in values]
                panel.set_ylim(
                    min([low, *(value - 1 for value in known)]), max([high, *(value + 1 for value in known)])
                )
                draw_baselines(panel, results.baselines, upright=True)
            else:
                panel.set_ylim(0, max(1.02, panel.get_ylim()[1]))
        merged_legend(figure, panels)


def _measured(results: Results, *keys: str) -> list[ConfigResults]:
    """Configs that have all of these parameters and an accuracy, the best first."""
    having = [config for config in results.configs if config.axes.keys() >= {*keys}]
    return [config for config in having if any(len(config.values(name)) for name in ACCURACIES)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ordered_values(configs: Sequence[ConfigResults], key: str) -> list[str]:
    """Each value of a parameter once, as text: numbers by size, then the others by name."""
    values = {text(config.axes[key]): config.axes[key] for config in configs}
    return sorted(values, key=lambda one: (0, values[one], "") if _is_number(values[one]) else (1, 0, one))


def _label(results: Results, config: ConfigResults, keys: Sequence[str]) -> str:
    """The values of these parameters for a legend, such as "temperature=0.1, lr=0.03"."""
    names, parts = short_names(results.axes), []
    for key in keys:
        having = [other for other in results.configs if key in other.axes]
        value = typed(config.axes, key)
        parts.append(f"{names[key]}={_shortened_apart(_ordered_values(having, key)).get(value, value)}")
    return ", ".join(parts)


def _set_numeric_ticks(panel: "Axes", values: Sequence[float]) -> None:
    """Set a tick at each value (sorted) that has room for its label, on a logarithmic axis if the values span it."""
    logarithmic = values[0] > 0 and values[-1] / values[0] >= LOG_RATIO
    position, value_at = (math.log, math.exp) if logarithmic else (float, float)
    low, high = position(values[0]), position(values[-1])
    panel.set_xscale("log" if logarithmic else "linear")
    panel.set_xlim(value_at(low - 0.12 * (high - low)), value_at(high + 0.12 * (high - low)))
    if len(values) > MAX_VALUE_TICKS:
        return
    ticks: list[float] = []
    for value in values:
        distance = TICK_DISTANCE * max(1.0, len(f"{value:g}") / 4)
        if not ticks or (position(value) - position(ticks[-1])) / (high - low) > distance:
            ticks.append(value)
    panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
    panel.set_xticks([], minor=True)


def _file_name(name: str) -> str:
    """A name with underscores for everything that is unusual in names of files."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _shortened(name: str) -> str:
    """The name, or its two ends: names often differ at the end."""
    end = (NAME_LENGTH - 1) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:end]}…{name[-end:]}"


def _shortened_apart(names: Sequence[str]) -> dict[str, str]:
    """Each name shortened; if two become equal by that, without the beginning and the end that all share."""
    short = {name: _shortened(name) for name in names}
    if len(set(short.values())) == len(short):
        return short
    start = len(os.path.commonprefix(list(short)))
    end = len(os.path.commonprefix([name[start:][::-1] for name in short]))
    first = next(iter(short))
    while start and first[start - 1] in NUMBER_CHARACTERS:  # numbers are kept whole: 0.05 and 0.03 differ in one digit
        start -= 1
    while end and first[len(first) - end] in NUMBER_CHARACTERS:
        end -= 1
    return {name: _shortened(f"…{name[start : len(name) - end]}…") for name in short}
