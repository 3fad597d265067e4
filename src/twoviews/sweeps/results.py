"""The results of a sweep: a table of its jobs, the ranked configs, and a test of the two best.

They are made from the files in the sweep folder, at any time, also while jobs run. A config is the values of the varying
parameters without the seed; the jobs of a config differ in the seed alone. Only finished jobs count in means and tests.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from twoviews import foreign
from twoviews.figures import BASELINES, training_title
from twoviews.protocols.units import KNN_TOP1, LINEAR_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import SEED, Job, JobState, assigned, text, typed, with_varying_parameters
from twoviews.sweeps.job_states import with_recorded_end

DataFrame = Series = Any  # of pandas, which takes long to import
ACCURACIES = {KNN_TOP1: "kNN", LINEAR_TOP1: "linear"}  # what is compared; configs are ranked by the first measured
CONFIDENCE = 95  # %
FINISHED = "FINISHED"
# Of `Results.jobs`. seconds: of training, over all starts. device: a GPU's name, or CPU. device_count: GPUs, or CPU threads.
COLUMNS = (SEED, "state", "reason", "step", "epoch", "seconds", "device", "device_count", "overrides")
MAX_GAP_SECONDS = 600.0  # between two lines of metrics.jsonl; after a longer one the training was interrupted
_NOT_MEASURED = ("state", "step", "epoch", "seconds", "precision", "mlflow_run_id", "reason")  # of result.json


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95% t-interval, which is NaN for one seed; without seeds the mean is -inf."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "-"
        if self.count > 1 and self.half_width < 1e-6 * (1 + abs(self.mean)):  # ± 0.00 would pass for certainty
            return f"{self.mean:.2f} ({self.count} equal seeds)"
        return f"{self.mean:.2f}" + (f" ± {self.half_width:.2f}" if math.isfinite(self.half_width) else "")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% t-interval of independent values: mean ± t(0.975, n - 1) s / sqrt(n)."""
    from scipy import stats

    count = len(values)
    if not count:
        return Estimate(-math.inf, math.nan, 0)
    half = math.nan if count == 1 else stats.t.ppf(0.5 + CONFIDENCE / 200, count - 1) * stats.sem(values)
    return Estimate(sum(values) / count, float(half), count)


@dataclass(frozen=True)
class ConfigResults:
    """The jobs that differ in their seed alone.

    Args:
        parameters: values of the varying parameters, without the seed.
        jobs: their rows of `Results.jobs`, by seed.
    """

    parameters: Mapping[str, Any]
    jobs: DataFrame

    def values(self, metric: str) -> Series:
        """The final values of a metric by seed, as far as they are finite; of finished jobs."""
        jobs = self.jobs.reindex(columns=[SEED, "state", metric])
        final = jobs[(jobs["state"] == FINISHED) & jobs[metric].abs().lt(math.inf)]
        return final.groupby(SEED, sort=False)[metric].last()

    def estimate(self, metric: str) -> Estimate:
        """The mean over seeds of a metric."""
        return estimate(self.values(metric).tolist())

    @property
    def floor(self) -> float:
        """The highest kNN accuracy of a baseline, over the means of its jobs; NaN if none is known."""
        return self.jobs.reindex(columns=[*BASELINES]).mean().max()

    def label(self, keys: Sequence[str], names: Mapping[str, str]) -> str:
        """The values of these parameters, if it has them, such as "temperature=0.1, lr=0.03"."""
        return assigned({key: self.parameters[key] for key in keys if key in self.parameters}, names, ", ")


@dataclass(frozen=True)
class Comparison:
    """A config against another one, paired by seed.

    Args:
        best: the first config.
        second: the other.
        difference: mean advantage of the first over the seeds that both have.
        p: two-sided p-value of the paired t-test; NaN if there is nothing to test.
    """

    best: ConfigResults
    second: ConfigResults
    difference: Estimate
    p: float


@dataclass(frozen=True)
class Results:
    """The results in a sweep folder.

    Args:
        name: of the sweep.
        title: method, data and epochs, where all jobs share them, else the name.
        jobs: a row for each job by digest, with `COLUMNS`, the parameters as they are typed, and the last value of each
            metric, which is final if the job is finished.
        curves: the lines of metrics.jsonl by digest.
        parameters: the varying parameters of the jobs, which may include the seed.
        metrics: names of the metrics that any job has, sorted.
        varying: the varying parameters of the configs, in the order of the sweep.
        configs: the best first, by mean accuracy; those without a finished job last.
        metric: the accuracy by which they are ranked, such as knn/top1; None if no job has measured one yet.
    """

    name: str
    title: str
    jobs: DataFrame
    curves: Mapping[str, DataFrame]
    parameters: Sequence[str]
    metrics: Sequence[str]
    varying: Sequence[str]
    configs: Sequence[ConfigResults]
    metric: str | None

    @property
    def baselines(self) -> dict[str, list[float]]:
        """The kNN accuracies of raw pixels and of untrained encoders in all jobs, by their names in metrics.jsonl."""
        return {name: self.jobs[name].dropna().tolist() for name in BASELINES if name in self.metrics}

    def measured_once(self, metric: str) -> bool:
        """Whether no job has measured a metric at two epochs or more, so that there is no curve of it."""
        having = [curve.loc[curve[metric].notna(), "epoch"] for curve in self.curves.values() if metric in curve]
        return all(epochs.nunique() < 2 for epochs in having)

    @cached_property
    def ranked(self) -> list[ConfigResults]:
        """The configs with an accuracy. The first has the highest mean among those with as many seeds as any has."""
        return [config for config in self.configs if self.metric and len(config.values(self.metric))]

    @cached_property
    def comparison(self) -> Comparison | None:
        """The best config against the second best, by a paired test; None if fewer than two have an accuracy."""
        best = self.ranked[:2]
        return compare(best[0], best[1], self.metric) if self.metric and len(best) > 1 else None


def gather(sweep: Sweep, states: Mapping[str, JobState] | None = None) -> Results:
    """The results of a sweep, read from the files of its jobs.

    Args:
        sweep: whose jobs may be running.
        states: by digest; without one, that in state.json.
    """
    import pandas as pd

    jobs = with_varying_parameters(sweep.jobs)
    keys = list(dict.fromkeys(key for job in jobs for key in job.parameters))
    lines = {job.digest: job.metrics() for job in jobs}
    curves: dict[str, DataFrame] = {digest: pd.DataFrame(job_lines) for digest, job_lines in lines.items()}
    rows = []
    by_config: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        state = (states or {}).get(job.digest) or with_recorded_end(job, job.state)
        values = {key: text(job.parameters[key]) for key in keys if key in job.parameters}
        rows.append({SEED: typed(job.parameters, SEED), **values, **_row(job, state, lines[job.digest])})
        # By values as they are typed: a 1 of the command line is a 1.0 of a file.
        by_config.setdefault(tuple(typed(job.parameters, key) for key in keys if key != SEED), []).append(job)
    table: DataFrame = pd.DataFrame(rows, index=[job.digest for job in jobs], columns=None if rows else [*COLUMNS])
    metrics = sorted({*table.columns} - {*COLUMNS, *keys})
    finished = table[table["state"] == FINISHED]
    metric = next((name for name in ACCURACIES if name in metrics and finished[name].notna().any()), None)
    configs = [
        ConfigResults(
            {key: value for key, value in group[0].parameters.items() if key != SEED},
            table.loc[[job.digest for job in sorted(group, key=_seed_order)]],
        )
        for group in by_config.values()
    ]
    # Varying are the keys with several values; those of the configs that have most of them come first.
    most_first = sorted(configs, key=lambda config: -len(config.parameters))
    ordered = dict.fromkeys(key for config in most_first for key in config.parameters)
    varying = [key for key in ordered if len({typed(config.parameters, key) for config in configs}) > 1]
    if metric:
        # A config with fewer seeds than others may be lucky: it is ranked when it has as many.
        configs.sort(key=lambda config: (-len(config.values(metric)), -config.estimate(metric).mean))
    return Results(sweep.name, _title(sweep, jobs, keys), table, curves, keys, metrics, varying, configs, metric)


def _row(job: Job, state: JobState, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table, without the varying parameters."""
    result, environment = job.result, foreign.load(job.folder / "environment.json")
    # The last of each name; NaN stays, as the loss of a training that diverged.
    values: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
    step, epoch = int(values.pop("step", 0)), float(values.pop("epoch", 0.0))
    values.pop("time", None)
    values |= {name: float(value) for name, value in result.items() if name not in _NOT_MEASURED}
    processes, gpu = int(environment.get("processes", 1)), environment.get("gpu")
    # The runner may not have come to write that the job is finished, which result.json says first.
    finished = result.get("state") == "finished"
    reason = "" if finished else state.reason or result.get("reason") or ""
    return {
        **values,
        "state": FINISHED if finished else state.state,
        "reason": " ".join(str(reason).split()),
        "step": step,
        "epoch": epoch,
        "seconds": float(result["seconds"]) if "seconds" in result else _training_seconds(lines),
        "device": gpu or "CPU",
        "device_count": processes if gpu else processes * int(environment.get("threads") or 1),
        "overrides": job.description["overrides"],
    }


def _training_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """The time between the lines of a job without a result, without interruptions."""
    gaps = (line["time"] - before["time"] for before, line in itertools.pairwise(lines))
    return float(sum(gap for gap in gaps if 0 < gap < MAX_GAP_SECONDS))


def _seed_order(job: Job) -> tuple[bool, float, str]:
    seed = job.parameters.get(SEED)
    return (False, float(seed), "") if isinstance(seed, (int, float)) else (True, 0.0, str(seed))


def _title(sweep: Sweep, jobs: Sequence[Job], keys: Sequence[str]) -> str:
    config: dict[str, Any] = foreign.load(jobs[0].folder / "config.yaml") if jobs else {}
    if "method" not in config or {"method", "data", "epochs"} & {*keys}:
        return sweep.name
    data = foreign.load(jobs[0].folder / "data.json").get("name", "its images")
    return training_title(config, data, None)


def compare(best: ConfigResults, second: ConfigResults, metric: str) -> Comparison:
    """Two configs by their values of a metric over the seeds that both have."""
    import pandas as pd
    from scipy import stats

    pairs = pd.concat([best.values(metric), second.values(metric)], axis=1, join="inner").to_numpy()
    differences = [first - other for first, other in pairs]
    p = float(stats.ttest_rel(*pairs.T).pvalue) if len(set(differences)) > 1 else math.nan  # type: ignore[attr-defined]
    return Comparison(best, second, estimate(differences), p)
