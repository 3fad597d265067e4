"""Evaluations of several runs as one table and one picture, in which the runs are called by what differs in them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twoviews.config.digest import digest
from twoviews.console import Console
from twoviews.errors import printable
from twoviews.evaluation.differences import differences, labels
from twoviews.evaluation.pictures import Measured, draw_comparison
from twoviews.figures import BASELINES, files_of
from twoviews.files import write_atomic
from twoviews.protocols.units import KNN_TOP1, LINEAR_TOP1
from twoviews.tables import as_csv, as_latex, as_markdown, span
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import open_parent_run, update_run

MAX_PANELS = 4  # of the picture
NAN = float("nan")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a run, and how."""

    values: Mapping[str, float]  # by name, such as knn/top1
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of some of the values
    settings: Mapping[str, object] = field(default_factory=dict)  # of the protocols, such as knn.k
    mirror: tuple[str | None, str] | None = None  # MLflow's store and experiment of the run; None: it is not mirrored
    title: str = ""  # method, data and epochs
    config: Mapping[str, Any] = field(default_factory=dict)  # of the training; empty without a run
    baselines: Mapping[str, float] = field(default_factory=dict)  # kNN, as in metrics.jsonl, where they are comparable


Row = dict[str, float | int | str]


def compare(evaluations: Mapping[str, Evaluation], folder: Path, console: Console) -> None:
    """Show the runs side by side, and write comparison.csv, .md, .tex and a picture, in MLflow a run of its own.

    The files go into a folder below `folder`, another one for other runs or settings.
    """
    settings_by_run = {run: dict(evaluation.settings) for run, evaluation in evaluations.items()}
    folder = folder / f"comparison-{digest(settings_by_run)}"
    folder.mkdir(parents=True, exist_ok=True)
    order, names, shown = ordered(evaluations), run_labels(evaluations), headlines(evaluations)
    rows = short_table(evaluations)
    write_atomic(folder / "comparison.csv", as_csv(table(evaluations)))
    write_atomic(folder / "comparison.md", page(evaluations))
    write_atomic(folder / "comparison.tex", as_latex(rows, [column_name(name) for name in shown]))
    files = [folder / f"comparison.{kind}" for kind in ("csv", "md", "tex")]
    if shown:
        measured = {column_name(name): [_measured(evaluations[run], name) for run in order] for name in shown}
        draw_comparison(folder / "comparison.png", measured, [names[run] for run in order], _title(evaluations))
        files += files_of(folder / "comparison.png")
    console.rows(f"{_title(evaluations)}, the best first", rows)
    console.say(f"written to {folder}: {', '.join(file.name for file in files)}")
    mlflow_target = next((evaluation.mirror for evaluation in evaluations.values() if evaluation.mirror), None)
    if mlflow_target:
        key = hashlib.blake2b(repr(sorted(evaluations)).encode(), digest_size=16).hexdigest()
        try:
            run, _ = open_parent_run(
                *mlflow_target, f"comparison of {len(order)} runs", key, {"runs": ", ".join(order)}
            )
            update_run(*mlflow_target, run, files=files, status="FINISHED")
        except Exception as error:  # whatever is wrong with MLflow, the results are in the folder
            console.say(f"MLflow does not have the comparison ({short_error(error)}); the same command sends it.")


def headlines(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """The accuracy of each protocol, or other values where there is none; at most MAX_PANELS."""
    names = _names(evaluation.values for evaluation in evaluations.values())
    return [name for name in names if name.endswith("/top1")][:MAX_PANELS] or names[:MAX_PANELS]


def ordered(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Names of the runs, the best first headline first; those without it come last, and equals stay as they were."""
    name = next(iter(headlines(evaluations)), None)

    def key(run: str) -> float:
        value = evaluations[run].values.get(name, NAN) if name else NAN
        return -value if value == value else float("inf")  # NaN is no number to be ordered by

    return sorted(evaluations, key=key)


def run_labels(evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    """A short name for each run, of what its training has otherwise than those of the others; by the run's name."""
    titles = {
        run: run if evaluation.config or not evaluation.title else evaluation.title
        for run, evaluation in evaluations.items()
    }
    return labels({run: evaluation.config for run, evaluation in evaluations.items()}, titles)


def table(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """All that is known of each run: its name, what differs in the trainings, values each with its ends (" low", " high"),
    baselines, settings."""
    differing, _ = differences({run: evaluation.config for run, evaluation in evaluations.items()})
    rows = []
    for run in ordered(evaluations):
        evaluation = evaluations[run]
        row: Row = {"run": run, **{f"run.{key}": value for key, value in differing.get(run, {}).items()}}
        for name, value in evaluation.values.items():
            row[name] = value
            if name in evaluation.intervals:
                row[f"{name} low"], row[f"{name} high"] = evaluation.intervals[name]
        rows.append(
            row | dict(evaluation.baselines) | {name: _plain(value) for name, value in evaluation.settings.items()}
        )
    return rows


def short_table(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """A row for each run: what differs in the trainings, the headlines with their intervals, and settings that differ.

    Rows with the kNN accuracy of raw pixels and of the untrained encoders follow, where they are known.
    """
    differing, _ = differences({run: evaluation.config for run, evaluation in evaluations.items()})
    keys, shown, names = _names(differing.values()), headlines(evaluations), run_labels(evaluations)
    # Columns for what differs, if that tells all runs apart.
    values_identify_runs = keys and len({tuple(values.items()) for values in differing.values()}) == len(evaluations)
    settings = [name for name, values in _settings(evaluations).items() if len(values) > 1]
    rows: list[Row] = []
    for run in ordered(evaluations):
        evaluation = evaluations[run]
        row: Row = {key: differing[run][key] for key in keys} if values_identify_runs else {"run": names[run]}
        row |= {column_name(name): _cell(evaluation, name) for name in shown}
        rows.append(row | {name: _plain(evaluation.settings.get(name, "")) for name in settings})
    for baseline, (label, _) in BASELINES.items():
        accuracies = [
            evaluation.baselines[baseline] for evaluation in evaluations.values() if baseline in evaluation.baselines
        ]
        if accuracies and KNN_TOP1 in shown:
            row = dict.fromkeys(rows[0], "")
            rows.append({**row, next(iter(row)): label, column_name(KNN_TOP1): span(accuracies)})
    return rows


def page(evaluations: Mapping[str, Evaluation]) -> str:
    """Markdown: the short table, what does not differ, and which run is which."""
    names, order = run_labels(evaluations), ordered(evaluations)
    parts = [as_markdown(short_table(evaluations), [column_name(name) for name in headlines(evaluations)])]
    parts.append("In brackets: 95 % intervals over test images. comparison.csv has all values.")
    if shared := [f"{name} = {values[0]}" for name, values in _settings(evaluations).items() if len(values) == 1]:
        parts.append(f"The same for all: {', '.join(shared)}.")
    if following := differences({run: evaluation.config for run, evaluation in evaluations.items()})[1]:
        parts.append(f"The trainings also differ in what follows from that: {', '.join(following)}.")
    parts.append("\n".join(f"- {names[run]}: `{run}`" for run in order if names[run] != run))
    return "\n\n".join(filter(None, parts)) + "\n"


def _settings(evaluations: Mapping[str, Evaluation]) -> dict[str, list[str]]:
    """The different values of each setting of the protocols, "" among them where a run has none."""
    names = _names(evaluation.settings for evaluation in evaluations.values())
    values_by_name = {
        name: [str(_plain(evaluation.settings.get(name, ""))) for evaluation in evaluations.values()] for name in names
    }
    return {name: [*dict.fromkeys(values)] for name, values in values_by_name.items()}


def _title(evaluations: Mapping[str, Evaluation]) -> str:
    """What all runs have in common, and their number."""
    parts = [evaluation.title.split(", ") for evaluation in evaluations.values()]
    shared = ", ".join(part for part in parts[0] if all(part in other for other in parts))
    data = {str(evaluation.settings.get("data", "")) for evaluation in evaluations.values()}
    shared = shared or ("images of " + data.pop() if len(data) == 1 and "" not in data else "")
    return ": ".join(filter(None, (printable(shared), f"{len(evaluations)} runs")))


def column_name(name: str) -> str:
    """The name of a value in tables to read."""
    labels = {KNN_TOP1: "kNN, %", LINEAR_TOP1: "linear, %"}
    return labels.get(name) or name.replace("/top1", ", %")


def _measured(evaluation: Evaluation, name: str) -> Measured:
    baselines = evaluation.baselines if name == KNN_TOP1 else {}
    return Measured(evaluation.values.get(name, NAN), evaluation.intervals.get(name), baselines)


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
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
