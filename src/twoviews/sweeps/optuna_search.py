"""A search by Optuna, which proposes configs from the results so far; optuna_trials.py runs its trials.

Everything about a trial but its number follows from its parameters in the study, so the same command goes on with the same
trials, whenever the process before it was killed.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from filelock import FileLock, Timeout

from twoviews.errors import BadInput, nearest
from twoviews.ranges import Count, NonNegativeInt, Trials
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job_states import CANCEL_SECONDS, wait_until_ended
from twoviews.sweeps.launching import FREE_KEYS, SweepCommand, launch_all
from twoviews.sweeps.mlflow_sync import flush
from twoviews.sweeps.optuna_trials import SPREAD, TrialRunner
from twoviews.sweeps.search import Interval, Random, Search, SearchSpace, search_space

PROBES = ("knn", "linear")  # protocols whose values are known in advance
MIN_TRIALS_FOR_MEDIAN = 4  # finished trials before others are compared with their median


@dataclass(frozen=True)
class Optuna(Search):
    """Configs proposed by the tree-structured Parzen estimator of Bergstra et al. (2011), as Optuna implements it.

    A trial is a config with all its seeds, and its value the mean over them, because seeds are not searched for.

    Args:
        trials: number of configs, those of earlier launches included.
        draw: seed of the random numbers.
        metric: key of result.json; larger is better.
        prune: stop trials whose embeddings collapse, and those whose kNN, as a mean over seeds that have all come so far, is
            below the median of the others at the same epoch.
        at_once: most trials that run together.
    """

    trials: Trials
    draw: NonNegativeInt
    metric: str
    prune: bool
    at_once: Count

    def run(self, command: SweepCommand, arguments: Sequence[str]) -> int:
        """Return when all trials have ended; 0, or 1 if none of them has a value.

        Raises:
            BadInput: a config is wrong, nothing measures the metric, or another process runs this search.
            SystemExit: a signal stopped it; the same command goes on.
        """
        space = search_space(arguments)
        if not space.parameters:
            raise BadInput("hydra/sweeper=optuna has nothing to search; give a key several values or an interval.")
        self._check_metric(command.protocols)
        if command.options.plan:
            command.console.say("the configs of this search are not known in advance; the plan is for random ones.")
            return launch_all(command, self.combinations(space))
        sweep = Sweep(command.folder)
        try:
            lock = FileLock(sweep.folder / ".study.lock").acquire(timeout=0)
        except Timeout as error:
            other = f"another process runs the search in {sweep.folder}"
            raise BadInput(f"{other}; wait for its end, or stop it first.") from error
        with lock, open_study(sweep, space, self.metric, self.draw) as study:
            trials = TrialRunner(self, study, command, space, sweep)
            try:
                trials.resume()
                command.launcher.serve(sweep, trials.next_jobs)
                wait_until_ended([job for job in sweep.jobs if job.given_up], CANCEL_SECONDS)
            finally:
                if command.tracking["mirror"]:
                    flush(sweep, command.console.say)
            return trials.print_end()

    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """Configs drawn at random, which a plan shows in place of proposals that are not known yet."""
        return Random(self.trials, self.draw).configs(space)

    def _check_metric(self, protocols: Sequence[str]) -> None:
        # The values of other protocols than these are known to their own code alone.
        known = [SPREAD, *(f"{name}/{top}" for name in PROBES if name in protocols for top in ("top1", "top5"))]
        others = [f"{name}/…" for name in protocols if name not in PROBES]
        name, _, value = self.metric.partition("/")
        if self.metric not in known and not (value and f"{name}/…" in others):
            raise BadInput(
                f"hydra.sweeper.metric={self.metric} is nothing that these trainings measure and that is better when larger."
                f"{nearest(self.metric, [*known, *others])} Known: {', '.join([*known, *others])}."
            )


@contextmanager
def open_study(sweep: Sweep, space: SearchSpace, metric: str, draw: int) -> Iterator[optuna.Study]:
    """The study in a sweep folder, created if there is none; its trials maximise the metric, and `draw` is its seed.

    Raises:
        BadInput: its trials are of other values, seeds or overrides, or of another metric.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path = sweep.folder / "study.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.name,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=MIN_TRIALS_FOR_MEDIAN),
    )
    # With the same seed after a resume, the sampler would repeat its first proposals.
    study.sampler = optuna.samplers.TPESampler(seed=draw + 1000 * len(study.trials), constant_liar=True)
    fixed = dict(override.split("=", 1) for override in space.fixed)
    attributes = {  # by the name that the user reads
        "values": "; ".join(f"{key}={_describe(values)}" for key, values in sorted(space.parameters.items())),
        "seeds": ",".join(sorted(space.seeds)),
        "metric": metric,
        # Trials stay comparable when other keys change.
        "overrides": " ".join(
            f"{key}={fixed[key]}" for key in sorted(fixed) if re.split("[./@]", key.lstrip("+~"))[0] not in FREE_KEYS
        ),
    }
    for name, value in attributes.items():
        key = "space" if name == "values" else name
        before = study.user_attrs.get(key, value)
        if before != value:
            raise BadInput(
                f"the study in {path} is about other {name}: {before or 'none'}, and not {value or 'none'}; give the same, or "
                "another folder with sweep.name=."
            )
        study.set_user_attr(key, value)
    try:
        yield study
    finally:
        storage.remove_session()


def _describe(values: Sequence[str] | Interval) -> str:
    if not isinstance(values, Interval):
        return ",".join(values)
    whole, logarithmic = ", a whole number" * values.whole, ", logarithmic" * values.logarithmic
    return f"{values.low} to {values.high}{whole}{logarithmic}"
