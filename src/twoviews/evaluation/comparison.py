"""Evaluations of several runs as one table, for a spreadsheet and for a page."""

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twoviews.config.digest import digest
from twoviews.console import Console
from twoviews.evaluation.pictures import draw_comparison
from twoviews.files import write_atomic
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import log_files


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a run, and how."""

    values: Mapping[str, float]  # by name, such as knn/top1
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of some of the values
    settings: Mapping[str, object] = field(default_factory=dict)  # of the protocols, such as knn.k
    mirror: tuple[str | None, str] | None = None  # MLflow's store and experiment of the run; None: it is not mirrored


Row = dict[str, float | int | str]


def compare(evaluations: Mapping[str, Evaluation], folder: Path, console: Console) -> None:
    """Show the runs side by side, and write comparison.csv, comparison.md and comparison.png, in MLflow a run of its own.

    The files go into a folder below `folder`, another one for other runs or settings.
    """
    how = {run: dict(one.settings) for run, one in evaluations.items()}
    folder = folder / f"comparison-{digest(how)}"
    folder.mkdir(parents=True, exist_ok=True)
    name, order = headline(evaluations), ordered(evaluations)
    write_atomic(folder / "comparison.csv", as_csv(table(evaluations)))
    write_atomic(folder / "comparison.md", as_markdown(evaluations))
    having = [run for run in order if name in evaluations[run].values]
    if name is not None:
        values = {run: evaluations[run].values[name] for run in having}
        intervals = {run: evaluations[run].intervals[name] for run in having if name in evaluations[run].intervals}
        draw_comparison(folder / "comparison.png", values, intervals, name, f"{len(values)} runs")
    console.table(f"{len(order)} runs by {name}", {run: _cell(evaluations[run], name) if name else "" for run in order})
    console.say(f"written to {folder}: comparison.csv, comparison.md and comparison.png")
    where = next((one.mirror for one in evaluations.values() if one.mirror), None)
    if where:
        key = hashlib.blake2b(repr(sorted(evaluations)).encode(), digest_size=16).hexdigest()
        files = [
            folder / f"comparison.{kind}" for kind in ("csv", "md", "png") if (folder / f"comparison.{kind}").exists()
        ]
        try:
            log_files(*where, f"comparison of {len(order)} runs", key, {"runs": ", ".join(order)}, files)
        except Exception as error:  # whatever is wrong with MLflow, the results are in the folder
            console.say(f"MLflow does not have the comparison ({short_error(error)}); the same command sends it.")


def headline(evaluations: Mapping[str, Evaluation]) -> str | None:
    """The first value that is an accuracy, else the first one; None where nothing was measured."""
    names = _names(evaluation.values for evaluation in evaluations.values())
    return next((name for name in names if name.endswith("top1")), names[0] if names else None)


def ordered(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Names of the runs, the best headline first; those without it come last, and equals stay as they were."""
    name = headline(evaluations)

    def key(run: str) -> float:
        value = evaluations[run].values.get(name, float("nan")) if name else float("nan")
        return -value if value == value else float("inf")  # NaN is no number to be ordered by

    return sorted(evaluations, key=key)


def table(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """A row for each run, with equal keys: run, values each with its ends (" low", " high"), settings; "" where it has none.

    Columns stand in the order in which the runs first name them.
    """
    values = _names(evaluation.values for evaluation in evaluations.values())
    bounded = set(_names(evaluation.intervals for evaluation in evaluations.values()))
    settings = _names(evaluation.settings for evaluation in evaluations.values())
    rows = []
    for run in ordered(evaluations):
        one = evaluations[run]
        row: Row = {"run": run}
        for name in values:
            row[name] = one.values.get(name, "")
            if name in bounded:
                row[f"{name} low"], row[f"{name} high"] = one.intervals.get(name, ("", ""))
        row.update({name: _plain(one.settings[name]) if name in one.settings else "" for name in settings})
        rows.append(row)
    return rows


def as_csv(rows: list[Row]) -> str:
    """The rows as comma-separated values, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(evaluations: Mapping[str, Evaluation]) -> str:
    """A table to read: values with their intervals in brackets, settings that differ, and below it those that do not."""
    values = _names(evaluation.values for evaluation in evaluations.values())
    settings: dict[str, set[str]] = {name: set() for name in _names(one.settings for one in evaluations.values())}
    for name, found in settings.items():
        found |= {str(_plain(one.settings[name])) if name in one.settings else "" for one in evaluations.values()}
    shared = {name: found.pop() for name, found in settings.items() if len(found) == 1}
    differing = [name for name in settings if name not in shared]
    lines = [["run", *values, *differing], ["---", *["---:"] * len(values), *["---"] * len(differing)]]
    for run in ordered(evaluations):
        one = evaluations[run]
        shown = [str(_plain(one.settings[name])) if name in one.settings else "" for name in differing]
        lines.append([run, *(_cell(one, name) for name in values), *shown])
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
    same = ", ".join(f"{name} = {value}" for name, value in shared.items())
    return text + (f"\nThe same for all: {same}.\n" if same else "")


def _names(mappings) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _cell(evaluation: Evaluation, name: str) -> str:
    if name not in evaluation.values:
        return ""
    value = evaluation.values[name]
    text = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    low, high = evaluation.intervals.get(name, (None, None))
    return text if low is None else f"{text} [{low:.2f}, {high:.2f}]"


def _plain(value: object) -> float | int | str:
    return value if isinstance(value, float | int | str) else str(value)
