"""Evaluations of several runs as one table and one picture, in which the runs are called by what differs in them."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twoviews.config.digest import NOT_IN_DIGEST, digest, without_unused
from twoviews.config.values import flat
from twoviews.console import Console
from twoviews.errors import printable
from twoviews.evaluation.pictures import Measured, draw_comparison
from twoviews.evaluation.record import Evaluation
from twoviews.figures import BASELINES, files_of
from twoviews.files import write_atomic
from twoviews.protocols.units import KNN_TOP1, LINEAR_TOP1
from twoviews.sweeps.job import short_names, typed
from twoviews.tables import as_csv, as_latex, as_markdown, span
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import open_parent_run, update_run

MAX_PANELS = 4  # of the picture
NAN = float("nan")
ALWAYS = ("method.", "backbone.")  # keys of these groups, and root keys, are shown wherever they differ
# Not of the training, or without influence on what it learns but for rounding.
LEFT_OUT = (*NOT_IN_DIGEST, "protocol", "runtime.device", "runtime.channels_last", "runtime.compile")


Row = dict[str, float | int | str]


def compare(evaluations: Mapping[str, Evaluation], folder: Path, console: Console) -> None:
    """Show the runs side by side, and write comparison.csv, .md, .tex and a picture, in MLflow a run of its own.

    The files go into a folder below `folder`, another one for other runs or settings.
    """
    folder /= f"comparison-{digest({run: dict(evaluation.settings) for run, evaluation in evaluations.items()})}"
    folder.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(evaluations)
    order, rows, title = comparison.order, comparison.short_table(), _title(evaluations)
    columns = {name: column_name(name) for name in comparison.headlines}
    write_atomic(folder / "comparison.csv", as_csv(comparison.table()))
    write_atomic(folder / "comparison.md", comparison.page())
    write_atomic(folder / "comparison.tex", as_latex(rows, [*columns.values()]))
    files = [folder / f"comparison.{kind}" for kind in ("csv", "md", "tex")]
    if columns:
        measured = {column: [_measured(evaluations[run], name) for run in order] for name, column in columns.items()}
        draw_comparison(folder / "comparison.png", measured, [comparison.labels[run] for run in order], title)
        files += files_of(folder / "comparison.png")
    console.rows(f"{title}, the best first", rows)
    if comparison.warning:
        console.say(f"warning: {comparison.warning}")
    console.say(f"written to {folder}: {', '.join(file.name for file in files)}")
    target = next((evaluation.mlflow_target for evaluation in evaluations.values() if evaluation.mlflow_target), None)
    if target:
        key = hashlib.blake2b(repr(sorted(evaluations)).encode(), digest_size=16).hexdigest()
        try:
            run, _ = open_parent_run(*target, f"comparison of {len(order)} runs", key, {"runs": ", ".join(order)})
            update_run(*target, run, files=files, status="FINISHED")
        except Exception as error:  # whatever is wrong with MLflow, the results are in the folder
            console.say(f"MLflow does not have the comparison ({short_error(error)}); the same command sends it.")


class Comparison:
    """Evaluations of several runs, in order, with labels that say what differs in their trainings.

    Args:
        evaluations: by the names of the runs.
    """

    def __init__(self, evaluations: Mapping[str, Evaluation]):
        self.evaluations = evaluations
        names = _names(evaluation.values for evaluation in evaluations.values())
        # The accuracy of each protocol, or other values where there is none.
        self.headlines = [name for name in names if name.endswith("/top1")][:MAX_PANELS] or names[:MAX_PANELS]
        first = self.headlines[0] if self.headlines else ""
        values = {run: evaluation.values.get(first, NAN) for run, evaluation in evaluations.items()}
        # The best first headline first; runs without it come last, and equals stay as they were. NaN has no order.
        self.order = sorted(evaluations, key=lambda run: math.inf if math.isnan(values[run]) else -values[run])
        self.differing, self.following = differences({run: one.config for run, one in evaluations.items()})
        titles = {run: "" if evaluation.config else evaluation.title for run, evaluation in evaluations.items()}
        self.labels = labels(self.differing, {run: title or run for run, title in titles.items()})
        # A sentence if the values are of different data sets, which the order of the runs says nothing about. The digest does
        # not tell: it is another one for each data.train_images, whose runs are evaluated on the same images.
        names = [*dict.fromkeys(str(evaluation.settings.get("data", "")) for evaluation in evaluations.values())]
        different = f"These runs were evaluated on different images ({', '.join(map(printable, names))})"
        self.warning = f"{different}: their values cannot be compared." if len(names) > 1 and all(names) else ""

    def table(self) -> list[Row]:
        """All that is known of each run: its name, what differs in the trainings, values each with its ends (" low",
        " high"), baselines, settings."""
        rows = []
        for run in self.order:
            evaluation = self.evaluations[run]
            row: Row = {"run": run, **{f"run.{key}": value for key, value in self.differing.get(run, {}).items()}}
            for name, value in evaluation.values.items():
                row[name] = value
                if name in evaluation.intervals:
                    row[f"{name} low"], row[f"{name} high"] = evaluation.intervals[name]
            settings = {name: _plain(value) for name, value in evaluation.settings.items()}
            rows.append({**row, **evaluation.baselines, **settings})
        return rows

    def short_table(self) -> list[Row]:
        """A row for each run: what differs in the trainings, the headlines with their intervals, and settings that differ.

        Rows with the kNN accuracy of raw pixels and of the untrained encoders follow, where they are known and all runs were
        evaluated on the same images.
        """
        differing = self.differing
        keys = _names(differing.values())
        # Columns for what differs, if that tells all runs apart.
        distinct = {tuple(values.items()) for values in differing.values()}
        values_identify_runs = keys and len(distinct) == len(self.evaluations)
        settings = [name for name, values in self._settings().items() if len(values) > 1]
        rows: list[Row] = []
        for run in self.order:
            evaluation = self.evaluations[run]
            row: Row = {key: differing[run][key] for key in keys} if values_identify_runs else {"run": self.labels[run]}
            row |= {column_name(name): _cell(evaluation, name) for name in self.headlines}
            rows.append(row | {name: _plain(evaluation.settings.get(name, "")) for name in settings})
        for baseline, (label, _) in BASELINES.items():
            known = [one.baselines[baseline] for one in self.evaluations.values() if baseline in one.baselines]
            if known and KNN_TOP1 in self.headlines and not self.warning:
                row = dict.fromkeys(rows[0], "")
                rows.append({**row, next(iter(row)): label, column_name(KNN_TOP1): span(known)})
        return rows

    def page(self) -> str:
        """Markdown: the short table, what does not differ, and which run is which."""
        parts = [as_markdown(self.short_table(), [column_name(name) for name in self.headlines])]
        parts.append(self.warning)
        parts.append("In brackets: 95 % intervals over test images. comparison.csv has all values.")
        if shared := [f"{name} = {values[0]}" for name, values in self._settings().items() if len(values) == 1]:
            parts.append(f"The same for all: {', '.join(shared)}.")
        if self.following:
            parts.append(f"The trainings also differ in what follows from that: {', '.join(self.following)}.")
        parts.append("\n".join(f"- {self.labels[run]}: `{run}`" for run in self.order if self.labels[run] != run))
        return "\n\n".join(filter(None, parts)) + "\n"

    def _settings(self) -> dict[str, list[str]]:
        """The different values of each setting of the protocols, "" among them where a run has none."""
        settings = [evaluation.settings for evaluation in self.evaluations.values()]
        return {name: [*dict.fromkeys(str(_plain(one.get(name, ""))) for one in settings)] for name in _names(settings)}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The values in which runs differ, as they are typed, by run; and the other keys that differ, which follow from those.

    Runs with different classes in a group, such as different methods, differ in that group and not in each key inside it. A
    key follows if it has one value for each combination of these classes, as the augmentation of a method, or the values of
    a root key. An empty configuration is that of no run, and has no values.
    """
    values = {
        run: {key: value for key, value in without_unused(flat(dict(config))).items() if not key.startswith(LEFT_OUT)}
        for run, config in configs.items()
        if config
    }

    def column(key: str) -> list[str]:
        return [typed(config_values, key) for config_values in values.values()]

    keys = dict.fromkeys(key for config_values in values.values() for key in config_values)
    keys = [key for key in keys if len({*column(key)}) > 1]
    groups = [key.removesuffix("._target_") for key in keys if key.endswith("._target_")]
    for config_values in values.values():
        for group in groups:
            config_values[group] = str(config_values.get(f"{group}._target_", "-")).rpartition(".")[2]
    keys = [key for key in keys if not key.startswith(tuple(f"{group}." for group in groups))]
    shown, following = groups + [key for key in keys if "." not in key], []
    roots, by_group = [column(key) for key in shown], list(zip(*map(column, groups), strict=True))
    for key in keys:
        if key not in shown:
            explained = groups and len({*by_group}) == len({*zip(by_group, column(key), strict=True)})
            follows = column(key) in roots or (explained and not key.startswith(ALWAYS))
            (following if follows else shown).append(key)
    shown.sort(key="seed".__eq__)  # the last, as it says least
    names = short_names(shown)
    differing = {run: {names[key]: typed(own, key) for key in shown} for run, own in values.items()}
    return differing, following


def labels(differing: Mapping[str, Mapping[str, str]], titles: Mapping[str, str]) -> dict[str, str]:
    """A name for each run that says what differs, such as "temperature=0.2, seed=1"; other encoders keep their titles."""
    label_by_run = {
        run: ", ".join(f"{key}={value}" for key, value in differing.get(run, {}).items()) or title
        for run, title in titles.items()
    }
    counts = Counter(label_by_run.values())
    return {run: f"{label} ({run})" if counts[label] > 1 else label for run, label in label_by_run.items()}


def _title(evaluations: Mapping[str, Evaluation]) -> str:
    """What all runs have in common, and their number."""
    first, *others = [evaluation.title.split(", ") for evaluation in evaluations.values()]
    shared = ", ".join(part for part in first if all(part in other for other in others))
    data = {str(evaluation.settings.get("data", "")) for evaluation in evaluations.values()}
    shared = shared or ("images of " + data.pop() if len(data) == 1 and "" not in data else "")
    return ": ".join(filter(None, (printable(shared), f"{len(evaluations)} runs")))


def column_name(name: str) -> str:
    """The name of a value in tables to read."""
    return {KNN_TOP1: "kNN, %", LINEAR_TOP1: "linear, %"}.get(name) or name.replace("/top1", ", %")


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
