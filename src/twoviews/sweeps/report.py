"""The report of a sweep: a page, a table and pictures in its folder, made from what is there at the moment."""

import csv
import io
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from twoviews.console import duration
from twoviews.files import write_atomic
from twoviews.sweeps.folder import State, Sweep
from twoviews.sweeps.pictures import draw
from twoviews.sweeps.results import (
    ACCURACIES,
    CONFIDENCE,
    FINISHED,
    NONE,
    SEED,
    Comparison,
    Results,
    Row,
    gather,
    label,
)
from twoviews.sweeps.words import counted, short_names, text, typed
from twoviews.tracking import uris
from twoviews.tracking.client import connect, short_error

PENDING = ("QUEUED", "RUNNING", "INTERRUPTED", "PRUNED")  # of points that are not finished and have not failed either
SHOWN_SETTINGS = 40  # rows of a table on the page; the CSV has all
SHOWN_PICTURES = 12


def report(
    sweep: Sweep, states: Mapping[str, State] | None = None, say: Callable[[str], None] = lambda _: None
) -> Results:
    """Write report.md, report.csv and the pictures into the sweep folder, and to the sweep's MLflow run if it has one.

    Args:
        sweep: whose points may still be running.
        states: by digest, as `Dispatch.look` has them; without, what the supervisors wrote last.
        say: where a sentence for the user goes.

    Raises:
        OSError: the folder cannot be written.
    """
    found = gather(sweep, states)
    pictures = draw(sweep.folder, found)
    page, table = sweep.folder / "report.md", sweep.folder / "report.csv"
    write_atomic(table, _table(found))
    write_atomic(page, _page(sweep, found, pictures))
    if found.best:
        names = short_names(found.axes)
        values = [f"{name} {one}" for metric, name in ACCURACIES.items() if (one := found.best.estimate(metric))]
        say(
            " ".join(
                ["best:", *([label(found.best, found.axes, names) + ":"] if found.axes else []), ", ".join(values)]
            )
        )
    say(f"report: {page}")
    if sweep.record["parent"]:
        _deliver(sweep, found, [page, table, *pictures.values()], say)
    return found


def _deliver(sweep: Sweep, found: Results, files: Sequence[Path], say: Callable[[str], None]) -> None:
    """The files and the means of the best setting, to MLflow; what it does not take now is said."""
    run, finished = sweep.record["parent"], sum(row.finished for row in found.rows)
    try:
        tracking = sweep.record["tracking"]
        client, _ = connect(uris.resolve(tracking["uri"]), tracking["experiment"])
        for file in files:
            client.log_artifact(run, str(file), "report")
        best = {
            f"best/{metric}": one.mean for metric in ACCURACIES if found.best and (one := found.best.estimate(metric))
        }
        for name, value in {**best, "points/finished": float(finished)}.items():
            client.log_metric(run, name, value, step=finished)
        if found.best:
            for key, value in found.best.axes.items():
                client.set_tag(run, f"best.{key}", text(value))
    except Exception as error:  # whatever is wrong with MLflow, the report is in the folder
        say(f"MLflow does not have the report ({short_error(error)}); the same command sends it again.")


# ------------------------------------------------------------------------------------------------------------- the report


def _table(found: Results) -> str:
    """The CSV: a row for each point; a number that a point did not measure is an empty cell."""
    axes = list(dict.fromkeys(key for row in found.rows for key in row.axes))
    metrics = sorted({name for row in found.rows for name in row.values})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["point", *axes, "state", "step", "epoch", *metrics, "seconds", "device", "device_hours", "reason"])
    for row in found.rows:
        writer.writerow(
            [
                row.digest,
                *(text(row.axes[key]) if key in row.axes else "" for key in axes),
                row.state,
                row.step,
                f"{row.epoch:g}",
                *(f"{row.values[name]:.6g}" if name in row.values else "" for name in metrics),
                f"{row.seconds:.1f}",
                row.device,
                f"{row.hours:.5f}",
                row.reason,
            ]
        )
    return out.getvalue()


def _page(sweep: Sweep, found: Results, pictures: Mapping[str, Path]) -> str:
    parts = [_heading(sweep, found), _best(found), _settings(found)]
    parts += [f"## {title}\n\n![{title}]({path.name})" for title, path in list(pictures.items())[:SHOWN_PICTURES]]
    if len(pictures) > SHOWN_PICTURES:
        parts.append(f"Beside this page: {counted(len(pictures) - SHOWN_PICTURES, 'more picture')}.")
    parts += [_cost(found), _failures(sweep, found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(sweep: Sweep, found: Results) -> str:
    states = Counter(row.state for row in found.rows)
    count = len(found.rows)
    others = ", ".join(f"{number} {state}" for state, number in sorted(states.items()) if state != FINISHED)
    missing = count - states[FINISHED]
    words = [
        f"# {found.name}",
        f"{states[FINISHED]:,} of {counted(count, 'point')} finished" + (f"; {others}." if others else "."),
    ]
    if missing:
        words[1] += f" **{missing} missing**: means, tests and curves over an axis are of finished points only."
    newest = max((row.curve[-1]["time"] for row in found.rows if row.curve), default=None)
    if newest:
        words[1] += f" Newest number: {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC."
    words += ["\n".join(f"    {command}" for command in commands)] if (commands := sweep.commands) else []
    words.append(
        f"Accuracies in percent. ± and bands: {CONFIDENCE}% t-intervals of the mean over seeds, mean ± t(0.975, n − 1) s / √n; "
        "one seed has none."
    )
    return "\n\n".join(words)


def _best(found: Results) -> str:
    best, metric = found.best, found.metric
    if not best or not metric:
        return "No accuracy of a finished point is there yet."
    names = short_names(found.axes)
    most = len(best.seeds(metric))
    lines = ["## Best"]
    values = [f"{ACCURACIES[name]} **{best.estimate(name)}**" for name in ACCURACIES if best.estimate(name)]
    chosen = f"**{label(best, found.axes, names)}**: " if found.axes else ""
    lines.append(f"{chosen}{', '.join(values)} over {counted(most, 'seed')}, by {ACCURACIES[metric]} accuracy.")
    fewer = [one for one in found.settings if 0 < len(one.seeds(metric)) < most]
    ahead = [one for one in fewer if (one.estimate(metric) or NONE).mean > (best.estimate(metric) or NONE).mean]
    if ahead:
        lines[-1] += (
            f" {label(ahead[0], found.axes, names)} is at {ahead[0].estimate(metric)} with "
            f"{counted(len(ahead[0].seeds(metric)), 'seed')} and is ranked when it has as many."
        )
    row = next(row for row in best.rows if row.finished)
    lines.append("To run it again:\n\n    " + command(row))
    for name in list(ACCURACIES)[1:]:
        other = max(
            (one for one in found.settings if len(one.seeds(name)) == most),
            key=lambda one: (one.estimate(name) or NONE).mean,
            default=best,
        )
        if other is not best and name != metric:
            lines.append(
                f"By {ACCURACIES[name]} accuracy the best is {label(other, found.axes, names)}: {other.estimate(name)}."
            )
    if found.comparison:
        lines.append(_comparison(found, found.comparison))
    return "\n\n".join(lines)


def _comparison(found: Results, pair: Comparison) -> str:
    metric = ACCURACIES[found.metric or ""]
    second = label(pair.second, found.axes, short_names(found.axes))
    start = f"The next best is {second}: {metric} {pair.second.estimate(found.metric or '')}. "
    if not pair.difference:
        return start + "The two have no seed in common, so they cannot be compared in pairs."
    if len(pair.seeds) < 2:
        return start + (
            f"They differ by {pair.difference.mean:.2f} on the one seed that both have; a paired test needs two, better five."
        )
    if math.isnan(pair.p):
        return start + f"They differ by {pair.difference.mean:.2f} on every common seed, so there is nothing to test."
    measured = sum(1 for one in found.settings if one.seeds(found.metric or ""))
    sentence = f"Paired t-test over {counted(len(pair.seeds), 'seed')}: the best is ahead by {pair.difference}, p = {pair.p:.2g}."
    if measured > 2:
        sentence += f" The best was chosen among {measured} settings on the same numbers, which flatters it."
    if len(pair.seeds) < 5:
        sentence += " With fewer than five seeds only large differences show."
    return start + sentence


def command(row: Row) -> str:
    """What trains this point again by itself."""
    return shlex.join(["python", "train.py", *(one for one in row.overrides if not one.startswith("sweep."))])


def _settings(found: Results) -> str:
    axes, names = found.axes, short_names(found.axes)
    metrics = [name for name in ACCURACIES if any(name in row.values for row in found.rows)]
    lines = [
        [*(names[key] for key in axes), "points", *(f"{ACCURACIES[name]}" for name in metrics), "training a point"]
    ]
    for setting in found.settings[:SHOWN_SETTINGS]:
        done = [row for row in setting.rows if row.finished]
        points = f"{len(done)} of {len(setting.rows)}"
        seeds = [text(row.axes[SEED]) for row in setting.rows if not row.finished and SEED in row.axes]
        points += f" (seed {', '.join(seeds)} missing)" if seeds else ""
        time = duration(sum(row.seconds for row in done) / len(done)) if done else "-"
        lines.append(
            [*(typed(setting.axes, key) for key in axes), points]
            + [str(setting.estimate(name) or "-") for name in metrics]
            + [time]
        )
    more = len(found.settings) - SHOWN_SETTINGS
    note = (
        f"\n\n{counted(more, 'more setting')}: report.csv has every point."
        if more > 0
        else "\n\nreport.csv has every point."
    )
    return "## Settings\n\n" + _grid(lines) + note


def _cost(found: Results) -> str:
    spent: dict[tuple[str, bool], list[Row]] = {}
    for row in found.rows:
        if row.seconds:
            spent.setdefault((row.device, row.finished), []).append(row)
    if not spent:
        return ""
    lines = [["device", "points", "hours", "unit"]]
    for (device, finished), rows in sorted(spent.items(), key=lambda one: (one[0][0], not one[0][1])):
        unit = "core-hours (threads x hours)" if device == "CPU" else "GPU-hours"
        what = "finished" if finished else "not finished, so far"
        lines.append([device, f"{len(rows)} {what}", _hours(sum(row.hours for row in rows)), unit])
    return "## Cost\n\nOf training, without the starts of programs.\n\n" + _grid(lines)


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.3g}"


def _failures(sweep: Sweep, found: Results) -> str:
    failed = [row for row in found.rows if not row.finished and row.state not in PENDING]
    if not failed:
        return ""
    lines = [["point", "axes", "state", "at epoch", "reason", "log"]]
    for row in failed[:SHOWN_SETTINGS]:
        names = short_names(list(row.axes))
        axes = ", ".join(f"{names[key]}={text(value)}" for key, value in row.axes.items())
        log = f"`python -m twoviews.sweep logs {shlex.quote(sweep.folder.name)} {row.digest}`"
        lines.append([row.digest, axes, row.state, f"{row.epoch:g}", row.reason or "unknown", log])
    more = f"\n\n{len(failed) - SHOWN_SETTINGS} more: report.csv." if len(failed) > SHOWN_SETTINGS else ""
    return "## Failures\n\n" + _grid(lines) + more


def _grid(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first line is its head."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    rows = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([rows[0], "|" + "---|" * len(cells[0]), *rows[1:]])
