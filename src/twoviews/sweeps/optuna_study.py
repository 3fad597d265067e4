"""The Optuna study of a search: study.db in the sweep folder, which the same command goes on with."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twoviews.errors import BadInput
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.launching import FREE_KEYS
from twoviews.sweeps.search import Interval, SearchSpace

if TYPE_CHECKING:
    import optuna

MIN_TRIALS_FOR_MEDIAN = 4  # finished trials before others are compared with their median


@contextmanager
def open_study(sweep: Sweep, space: SearchSpace, metric: str, draw: int) -> "Iterator[optuna.Study]":
    """The study in a sweep folder, created if there is none.

    Args:
        sweep: whose folder it is in.
        space: of its trials.
        metric: which they maximise.
        draw: seed of the random numbers.

    Raises:
        BadInput: its trials are of other values, seeds or overrides, or of another metric.
    """
    import optuna

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
    attributes = {
        "space": "; ".join(f"{key}={_describe(values)}" for key, values in sorted(space.axes.items())),
        "seeds": ",".join(sorted(space.seeds)),
        "metric": metric,
        "overrides": " ".join(f"{key}={value}" for key, value in sorted(fixed.items()) if not _is_free(key)),
    }
    for name, value in attributes.items():
        before = study.user_attrs.get(name, value)
        if before != value:
            what = "values" if name == "space" else name
            raise BadInput(
                f"the study in {path} is about other {what}: {before or 'none'}, and not {value or 'none'}; give the same, or "
                "another folder with sweep.name=."
            )
        study.set_user_attr(name, value)
    try:
        yield study
    finally:
        storage.remove_session()


def distributions(space: SearchSpace) -> dict[str, Any]:
    """Optuna's distribution for each swept key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    result: dict[str, Any] = {}
    for key, values in space.axes.items():
        if not isinstance(values, Interval):
            result[key] = CategoricalDistribution(list(values))
        elif values.whole:
            result[key] = IntDistribution(int(values.low), int(values.high), log=values.logarithmic)
        else:
            result[key] = FloatDistribution(values.low, values.high, log=values.logarithmic)
    return result


def resumed_trial(study: "optuna.Study", frozen: "optuna.trial.FrozenTrial") -> "optuna.Trial":
    """A trial of an earlier process, to be reported to and told; Optuna has no public way to go on with one."""
    import optuna

    return optuna.trial.Trial(study, frozen._trial_id)


def _describe(values: Sequence[str] | Interval) -> str:
    if not isinstance(values, Interval):
        return ",".join(values)
    kinds = ["a whole number" if values.whole else "", "logarithmic" if values.logarithmic else ""]
    return f"{values.low} to {values.high}" + "".join(f", {kind}" for kind in kinds if kind)


def _is_free(key: str) -> bool:
    """Whether trials stay comparable when this key changes."""
    return re.split("[./@]", key.lstrip("+~"))[0] in FREE_KEYS
