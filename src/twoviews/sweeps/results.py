"""What the jobs of a sweep found, setting by setting, and how sure it is which one is the best.

All of it comes from the files in the sweep folder, so it can be asked at any time, also while jobs are running. A setting
is one value for each axis but the seed; its jobs differ in the seed alone, which axes.py sees to. Only finished jobs
count in means and tests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.sweeps.axes import SEED, varying_parameters
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.formatting import text, typed
from twoviews.sweeps.job import Job, JobState
from twoviews.sweeps.job_status import with_marks

ACCURACIES = {"knn/top1": "kNN", "linear/top1": "linear"}  # what is compared; the first that was measured decides
CONFIDENCE = 95  # %
FINISHED = "FINISHED"
PAUSE_S = 600.0  # a longer gap between two lines of metrics.jsonl is taken for an interruption
_NOT_MEASURED = ("state", "step", "epoch", "seconds", "precision", "mlflow_run_id", "reason")  # of result.json


@dataclass(frozen=True)
class Row:
    """One job, as its folder says it stands."""

    digest: str
    folder: Path
    axes: Mapping[str, Any]  # as `varying_parameters` has them
    overrides: Sequence[str]  # of the command that trains it
    state: str
    reason: str
    step: int
    epoch: float
    values: Mapping[str, float]  # the last of each number measured; final where the job is finished
    curve: Sequence[Mapping[str, float]]  # the lines of metrics.jsonl
    seconds: float  # spent in training, all starts together
    device: str  # the GPU's name, or "CPU"
    width: int  # GPUs that the job took, or threads

    @property
    def finished(self) -> bool:
        """Whether its numbers are final."""
        return self.state == FINISHED

    @property
    def hours(self) -> float:
        """GPU-hours, or core-hours on a CPU."""
        return self.seconds * self.width / 3600


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95% t-interval; NaN for one seed, which has none."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.half:.2f}" if math.isfinite(self.half) else "")


NONE = Estimate(-math.inf, math.nan, 0)  # of a setting without a finished job: behind every other


@dataclass(frozen=True)
class Setting:
    """The jobs that differ in their seed alone."""

    axes: Mapping[str, Any]  # without the seed
    rows: Sequence[Row]

    def seeds(self, name: str) -> dict[Any, float]:
        """A final number by seed; finite ones of finished jobs."""
        finished = [row for row in self.rows if row.finished and math.isfinite(row.values.get(name, math.nan))]
        return {row.axes.get(SEED): row.values[name] for row in finished}

    def estimate(self, name: str) -> Estimate | None:
        """The mean over seeds of a final number; None while no job has it."""
        return estimate(list(self.seeds(name).values()))


@dataclass(frozen=True)
class Comparison:
    """The best setting against the next best, seed by seed: a paired t-test."""

    best: Setting
    second: Setting
    seeds: Sequence[Any]  # that both have
    difference: Estimate | None  # of the best over the second; None without a common seed
    p: float  # two-sided; NaN with fewer than two common seeds


@dataclass(frozen=True)
class Results:
    """What was found in a sweep folder.

    Attributes:
        name: of the sweep.
        rows: one for each job.
        settings: the best first, by mean accuracy; those without a finished job last.
        metric: the accuracy that decides, such as knn/top1; None where no job has measured one yet.
        comparison: of the two best settings; None where there are not two.
    """

    name: str
    rows: Sequence[Row]
    settings: Sequence[Setting]
    metric: str | None
    comparison: Comparison | None

    @property
    def axes(self) -> list[str]:
        """The axes but the seed that have several values, in the order of the sweep."""
        most_first = sorted(self.settings, key=lambda one: -len(one.axes))  # not all have all of them
        keys = dict.fromkeys(key for setting in most_first for key in setting.axes)
        return [key for key in keys if len({typed(one.axes, key) for one in self.settings}) > 1]

    @property
    def best(self) -> Setting | None:
        """The setting with the highest mean, among those with as many seeds as any has."""
        metric = self.metric
        return self.settings[0] if metric and self.settings[0].seeds(metric) else None


def gather(sweep: Sweep, states: Mapping[str, JobState] | None = None) -> Results:
    """Read what the jobs of a sweep have written so far; `states` by digest may know better than their files."""
    rows = [
        _row(one, (states or {}).get(one.digest) or with_marks(one, one.state))
        for one in varying_parameters(sweep.jobs)
    ]
    metric = next((name for name in ACCURACIES if any(row.finished and name in row.values for row in rows)), None)
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:  # by values as they are typed: a 1 of the command line is a 1.0 of a file
        setting = tuple((key, text(value)) for key, value in row.axes.items() if key != SEED)
        groups.setdefault(setting, []).append(row)
    settings = [
        Setting({key: value for key, value in rows[0].axes.items() if key != SEED}, sorted(rows, key=_seed_order))
        for rows in groups.values()
    ]
    if metric:
        # Of two settings, one with fewer seeds may be lucky: it is ranked when the others are not ahead of it in seeds.
        settings.sort(key=lambda one: (-len(one.seeds(metric)), -(one.estimate(metric) or NONE).mean))
    return Results(sweep.name, rows, settings, metric, _compare(settings, metric) if metric else None)


# ------------------------------------------------------------------------------------------------------ what a job says


def _row(job: Job, state: JobState) -> Row:
    result, lines = job.result, job.metrics()
    latest: dict[str, float] = {}
    for line in lines:
        latest.update({key: value for key, value in line.items() if key not in ("step", "epoch", "time")})
    latest.update({key: float(value) for key, value in result.items() if key not in _NOT_MEASURED})
    machine = foreign.load(job.folder / "environment.json")
    processes = int(machine.get("processes", 1))
    gpu = machine.get("gpu")
    # result.json is the run's own word; the supervisor may not have come to write the same yet.
    finished = result.get("state") == "finished"
    reason = state.reason or result.get("reason")
    return Row(
        digest=job.digest,
        folder=job.folder,
        axes=job.axes,
        overrides=job.description["overrides"],
        state=FINISHED if finished else state.state,
        reason="" if finished else " ".join(str(reason or "").split()),
        step=int(lines[-1]["step"]) if lines else 0,
        epoch=float(lines[-1]["epoch"]) if lines else 0.0,
        values=latest,
        curve=lines,
        seconds=float(result["seconds"]) if "seconds" in result else _seconds(lines),
        device=gpu or "CPU",
        width=processes if gpu else processes * int(machine.get("threads") or 1),
    )


def _seconds(lines: Sequence[Mapping[str, float]]) -> float:
    """Between the lines of a job that has not said itself how long it took."""
    times = [line["time"] for line in lines]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return sum(gap for gap in gaps if 0 < gap < PAUSE_S)


def _seed_order(row: Row) -> tuple[bool, float, str]:
    seed = row.axes.get(SEED)
    return (False, float(seed), "") if isinstance(seed, (int, float)) else (True, 0.0, str(seed))


# ------------------------------------------------------------------------------------------------------------- statistics


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95% t-interval of independent values: mean ± t(0.975, n - 1) s / sqrt(n)."""
    from scipy import stats

    if not values:
        return None
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return Estimate(mean, math.nan, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 200, count - 1))
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)


def _compare(settings: Sequence[Setting], metric: str) -> Comparison | None:
    from scipy import stats

    measured = [setting for setting in settings if setting.seeds(metric)]
    if len(measured) < 2:
        return None
    best, second = measured[:2]
    first, other = best.seeds(metric), second.seeds(metric)
    common = [seed for seed in first if seed in other]
    differences = [first[seed] - other[seed] for seed in common]
    p = math.nan
    if len(set(differences)) > 1:
        p = float(stats.ttest_rel([first[seed] for seed in common], [other[seed] for seed in common]).pvalue)  # type: ignore[attr-defined]
    return Comparison(best, second, common, estimate(differences), p)


# ------------------------------------------------------------------------------------------------------------------ words


def label(setting: Setting, keys: Sequence[str], names: Mapping[str, str]) -> str:
    """The values of these axes, as far as it has them, such as "temperature=0.1, lr=0.03"."""
    return ", ".join(f"{names[key]}={text(setting.axes[key])}" for key in keys if key in setting.axes)
