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
from twoviews.protocols.units import ACCURACIES
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import SEED, Job, JobState, assigned, short_names, text, typed, with_varying_parameters
from twoviews.sweeps.job_states import pruned_or_refused

DataFrame = Series = Any  # of pandas, which takes long to import, and whose annotations are too wide for pyright
CONFIDENCE = 95  # %
FINISHED = "FINISHED"
# Of `Results.jobs`. seconds: of training, over all starts. device: a GPU's name, or CPU. device_count: GPUs, or CPU threads.
COLUMNS = (
    *(SEED, "state", "reason", "step", "epoch"),
    *("seconds", "device", "device_count", "device_hours", "overrides"),
)
MAX_GAP_SECONDS = 600.0  # between two lines of metrics.jsonl; after a longer one the training was interrupted
# Keys of result.json that are no metrics.
_NO_METRICS = ("state", "step", "epoch", "seconds", "precision", "mlflow_run_id", "reason", "diverged")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95% t-interval, which is NaN for fewer than two of them."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        if self.count > 1 and self.half_width < 1e-6 * (1 + abs(self.mean)):  # ± 0.00 would pass for certainty
            return f"{self.mean:.2f} ({self.count} equal seeds)"
        return f"{self.mean:.2f}" + (f" ± {self.half_width:.2f}" if math.isfinite(self.half_width) else "")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% t-interval of independent values: mean ± t(0.975, n - 1) s / sqrt(n)."""
    from scipy import stats

    count = len(values)
    if count < 2:
        return Estimate(sum(values), math.nan, count)
    half_width = stats.t.ppf(0.5 + CONFIDENCE / 200, count - 1) * stats.sem(values)
    return Estimate(sum(values) / count, float(half_width), count)


@dataclass(frozen=True)
class ConfigResults:
    """The jobs that differ in their seed alone."""

    parameters: Mapping[str, Any]  # values of the varying parameters, without the seed
    jobs: DataFrame  # their rows of `Results.jobs`, by seed

    def values(self, metric: str) -> Series:
        """The final values of a metric by seed, as far as they are finite; of finished jobs."""
        jobs = self.jobs.reindex(columns=[SEED, "state", metric])
        final = jobs[(jobs["state"] == FINISHED) & jobs[metric].abs().lt(math.inf)]
        return final.groupby(SEED, sort=False)[metric].last()

    @cached_property
    def accuracies(self) -> dict[str, Estimate]:
        """The mean over seeds of each of `ACCURACIES` that was measured."""
        return {name: estimate(values.tolist()) for name in ACCURACIES if len(values := self.values(name))}


def compare(first: ConfigResults, second: ConfigResults, metric: str) -> tuple[Estimate, float]:
    """How far the first config is ahead of the second by a metric, as a mean over the seeds that both have, and the two-sided
    p-value of the paired t-test; NaN if there is nothing to test.
    """
    from scipy import stats

    differences = (first.values(metric) - second.values(metric)).dropna()
    p = float(stats.ttest_1samp(differences, 0).pvalue) if differences.nunique() > 1 else math.nan  # type: ignore[attr-defined]
    return estimate(differences.tolist()), p


@dataclass(frozen=True)
class Results:
    """The results in a sweep folder."""

    title: str  # method, data and epochs, where all jobs share them, else the name of the sweep
    # A row for each job by digest: `COLUMNS`, parameters as they are typed, and the last value of each metric, which is
    # final if the job is finished.
    jobs: DataFrame
    curves: Mapping[str, DataFrame]  # the lines of metrics.jsonl by digest
    parameters: Sequence[str]  # the varying parameters of the jobs, which may include the seed
    metrics: Sequence[str]  # names of the metrics that any job has, sorted
    varying: Mapping[str, str]  # short names of the parameters in which the configs differ
    configs: Sequence[ConfigResults]  # the best first, by mean accuracy; those without a finished job last
    metric: str | None  # the accuracy by which they are ranked, such as knn/top1; None if no job has measured one yet

    @property
    def baselines(self) -> dict[str, list[float]]:
        """The kNN accuracies of raw pixels and of untrained encoders in all jobs, by their names in metrics.jsonl."""
        return {name: self.jobs[name].dropna().tolist() for name in BASELINES if name in self.metrics}

    def measured_once(self, metric: str) -> bool:
        """Whether no job has measured a metric at two epochs or more, so that there is no curve of it."""
        curves = [curve for curve in self.curves.values() if metric in curve]
        return not any(curve.dropna(subset=metric)["epoch"].nunique() > 1 for curve in curves)

    def label(self, config: ConfigResults, without: str = "") -> str:
        """The values in which a config differs from others, such as "temperature=0.1, lr=0.03"; not that of the key `without`."""
        values = {key: config.parameters[key] for key in self.varying if key in config.parameters and key != without}
        return assigned(values, self.varying, ", ")

    @cached_property
    def ranked(self) -> list[ConfigResults]:
        """The configs with an accuracy. The first has the highest mean among those with as many seeds as any has."""
        return [config for config in self.configs if self.metric in config.accuracies]


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
    rows = {job.digest: _row(job, (states or {}).get(job.digest), lines[job.digest]) for job in jobs}
    table: DataFrame = pd.DataFrame([*rows.values()], index=[*rows], columns=None if rows else [*COLUMNS])
    metrics = sorted({*table.columns} - {*COLUMNS, *keys})
    parameters = {job.digest: {key: value for key, value in job.parameters.items() if key != SEED} for job in jobs}
    # By values as they are typed: a 1 of the command line is a 1.0 of a file.
    groups = table.groupby(table.index.map(lambda digest: assigned(parameters[digest])), sort=False)
    configs = [
        ConfigResults(parameters[group.index[0]], group.sort_values(SEED, key=as_numbers, kind="stable"))
        for _, group in groups
    ]
    metric = next((name for name in ACCURACIES if any(name in config.accuracies for config in configs)), None)
    varying = [key for key in keys if len({typed(config.parameters, key) for config in configs}) > 1]
    # A config with fewer seeds than others may be lucky: it is ranked when it has as many.
    configs.sort(key=lambda config: (-a.count, -a.mean) if (a := config.accuracies.get(str(metric))) else (0, 0))
    return Results(_title(sweep, jobs, keys), table, curves, keys, metrics, short_names(varying), configs, metric)


def as_numbers(texts: Sequence[str] | Series) -> Series:
    """The numbers that are typed so; NaN for what is none."""
    import pandas as pd

    return pd.to_numeric(pd.Series(texts), errors="coerce")


def _row(job: Job, state: JobState | None, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table; without a state, with that in state.json."""
    state = state or pruned_or_refused(job, job.state)
    result, environment = job.result, foreign.load(job.folder / "environment.json")
    # The last of each name; NaN stays, as the loss of a training that diverged.
    values: dict[str, Any] = {name: value for line in lines for name, value in line.items() if name != "time"}
    step, epoch = int(values.pop("step", 0)), float(values.pop("epoch", 0.0))
    values |= {name: float(value) for name, value in result.items() if name not in _NO_METRICS}
    gaps = [line["time"] - before["time"] for before, line in itertools.pairwise(lines)]
    seconds = float(result.get("seconds", sum(gap for gap in gaps if 0 < gap < MAX_GAP_SECONDS)))
    gpu = environment.get("gpu")
    count = int(environment.get("processes", 1)) * (1 if gpu else int(environment.get("threads") or 1))
    # The runner may not have come to write that the job is finished, which result.json says first.
    finished = result.get("state") == "finished"
    reason = "" if finished else state.reason or result.get("reason") or ""
    return {
        SEED: "-",
        **{key: text(value) for key, value in job.parameters.items()},
        **values,
        "state": FINISHED if finished else state.state,
        "reason": " ".join(str(reason).split()),
        "step": step,
        "epoch": epoch,
        "seconds": seconds,
        "device": gpu or "CPU",
        "device_count": count,
        "device_hours": seconds * count / 3600,
        "overrides": job.description["overrides"],
    }


def _title(sweep: Sweep, jobs: Sequence[Job], keys: Sequence[str]) -> str:
    config: dict[str, Any] = foreign.load(jobs[0].folder / "config.yaml") if jobs else {}
    if "method" not in config or {"method", "data", "epochs"} & {*keys}:
        return sweep.name
    data = foreign.load(jobs[0].folder / "data.json").get("name", "its images")
    return training_title(config, data, None)
