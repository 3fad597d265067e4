"""A search that learns: optuna proposes settings, any launcher runs their jobs, and weak ones are stopped early.

There are no batches: whenever there is room, the next setting is asked for, with all that is known by then. The study is a
file in the sweep folder, and everything about a trial but its number follows from the parameters in it; so whatever moment
this process dies at, the same command goes on with the same trials.
"""

import math
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from twoviews.errors import BadInput, nearest
from twoviews.ranges import Count, Index, Trials
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.formatting import counted
from twoviews.sweeps.job import Job, JobState
from twoviews.sweeps.job_status import CANCEL_SECONDS, status, wait_until_ended
from twoviews.sweeps.launching import FREE, Launch, launch
from twoviews.sweeps.search import Interval, Random, Search, Space, space

if TYPE_CHECKING:
    import optuna

LOOK_S = 2.0  # between two looks at the jobs that are under way
KNN = "knn/top1"
SPREAD = "train/spread"
PROBES = ("knn", "linear")  # protocols whose values are known beforehand
COLLAPSED = 0.05  # spread below which embeddings are taken for one point; 1 is even
COLLAPSED_EPOCHS = 1.0  # so long, after as many to begin with
COMPARED_AFTER = 4  # finished trials before the median means something
DIVERGED = ("loss is", "weights are not finite")  # how a training says that it left the numbers


@dataclass(eq=False)
class Running:
    """A trial that was asked for and has not been judged.

    Args:
        trial: of the study.
        jobs: one for each seed.
        given: digests of those that the launcher has.
        adopted: digests of those that an earlier process may have left behind running.
        compared: epochs at which its kNN was reported.
    """

    trial: "optuna.Trial"
    jobs: list[Job]
    given: set[str] = field(default_factory=set)
    adopted: set[str] = field(default_factory=set)
    compared: set[int] = field(default_factory=set)


class Optuna(Search):
    """Settings proposed by the tree-structured Parzen estimator of Bergstra et al. (2011), as optuna has it.

    A trial is a setting with all its seeds, and its value the mean over them: the seed is nothing to be searched for.

    Args:
        trials: settings in all, those of earlier launches included.
        draw: another number draws other settings.
        metric: of result.json; larger is better.
        prune: stop trials whose embeddings collapse, and those whose kNN, as a mean over seeds that have all come so far, is
            below the median of the others at the same epoch.
        at_once: trials under way together at most.
    """

    def __init__(self, trials: Trials, draw: Index, metric: str, prune: bool, at_once: Count):
        self.trials, self.draw, self.metric, self.prune, self.at_once = trials, draw, metric, prune, at_once

    def run(self, order: Launch, arguments: Sequence[str]) -> int:
        """Stay until all trials are judged; 0, or 1 when none of them has a value.

        Raises:
            BadInput: a setting is not right, nothing measures the metric, or another process drives this study.
            SystemExit: a signal stopped it; the same command goes on.
        """
        wanted = space(arguments)
        if not wanted.axes:
            raise BadInput("hydra/sweeper=optuna has nothing to search; give a key several values or an interval.")
        self._check_metric(order.protocols)
        if order.options.plan:
            order.console.say(
                "which settings will be tried is not known beforehand; these are drawn at random instead."
            )
            return launch(order, Random(self.trials, self.draw).combinations(wanted))
        sweep = Sweep(order.folder)
        lock = FileLock(sweep.folder / ".study.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BadInput(
                f"another process drives the search in {sweep.folder}; wait for it, or stop it first."
            ) from error
        try:
            with _study(sweep, wanted, self) as study:
                driver = Driver(self, study, order, wanted, sweep)
                try:
                    driver.adopt()
                    order.launcher.serve(sweep, driver.feed)
                    wait_until_ended([job for job in sweep.jobs if job.given_up], CANCEL_SECONDS)
                finally:
                    order.deliver(sweep)
                return driver.end()
        finally:
            lock.release()

    def _check_metric(self, protocols: Sequence[str]) -> None:
        name, slash, value = self.metric.partition("/")
        certain = [SPREAD, *(f"{one}/{top}" for one in PROBES if one in protocols for top in ("top1", "top5"))]
        # What the others measure, their own code says.
        if self.metric in certain or (slash and value and name in {*protocols} - {*PROBES}):
            return
        known = [*certain, *(f"{one}/…" for one in protocols if one not in PROBES)]
        raise BadInput(
            f"hydra.sweeper.metric={self.metric} is nothing that these trainings measure and that is better when larger."
            f"{nearest(self.metric, known)} Known: {', '.join(known)}."
        )


class Driver:
    """Between a study and a launcher: asks, gives jobs, looks at them, tells.

    Args:
        search: with its settings.
        study: in the sweep folder.
        order: what was typed.
        space: likewise, taken apart.
        sweep: where jobs are added.
    """

    def __init__(self, search: Optuna, study: "optuna.Study", order: Launch, space: Space, sweep: Sweep):
        self.search, self.study, self.order, self.space, self.sweep = search, study, order, space, sweep
        self.running: list[Running] = []
        self.queue: deque[tuple[Running, Job]] = deque()
        self._looked = -math.inf

    # ------------------------------------------------------------------------------------------------------------ trials

    def adopt(self) -> None:
        """Go on with the trials that an earlier process left without a value."""
        import optuna

        known = self.study.get_trials(deepcopy=False)
        for one in known:
            if one.state != optuna.trial.TrialState.RUNNING:
                self._stop_rest(one)
                continue
            trial = optuna.trial.Trial(self.study, one._trial_id)
            if one.params.keys() != self.space.axes.keys():  # killed while it was being asked for: nothing was started
                trial.set_user_attr("torn", True)
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            self._begin(trial)
        if known:
            self._say(
                f"the study has {counted(len(known), 'trial')}, {len(self.running)} of them without a value yet; going on."
            )

    def _begin(self, trial: "optuna.Trial") -> None:
        """Make the jobs of a trial, and queue those that have to run."""
        import optuna

        setting = self._setting(trial)
        for before in self.study.get_trials(deepcopy=False):
            weak = before.state in (optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL)
            if weak and "torn" not in before.user_attrs and self._setting(before) == setting:
                trial.set_user_attr("reason", f"as trial {before.number}: {before.user_attrs.get('reason', '')}")
                self.study.tell(trial, state=before.state)
                return
        same = next((one for one in self.running if self._setting(one.trial) == setting), None)
        if same:  # under way already: its jobs are those of this trial too
            self.running.append(Running(trial, same.jobs, same.given, same.adopted))
            return
        try:
            new = self.order.jobs(self.space.jobs(setting))
        except BadInput:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        _, jobs = self.order.add(new)
        self.order.prepare(self.sweep, jobs)
        states = status(jobs)
        one = Running(trial, jobs)
        self.running.append(one)
        for job in jobs:
            if states[job.digest].state in ("FINISHED", "RUNNING"):
                one.given.add(job.digest)
                one.adopted.add(job.digest)
            else:
                self.queue.append((one, job))

    def _setting(self, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> dict[str, str]:
        return {key: self._typed(key, value) for key, value in trial.params.items()}

    def _typed(self, key: str, value: Any) -> str:
        values = self.space.axes[key]
        return values.text(value) if isinstance(values, Interval) else str(value)

    def _ask(self) -> bool:
        """Begin another trial; False when there are enough, under way or in all."""
        known = self.study.get_trials(deepcopy=False)
        counted = [one for one in known if one.state.name != "WAITING" and "torn" not in one.user_attrs]
        if len(self.running) >= self.search.at_once or len(counted) >= self.search.trials:
            return False
        self._begin(self.study.ask(_distributions(self.space)))
        return True

    # ---------------------------------------------------------------------------------------------------------- the loop

    def feed(self, room: int) -> Sequence[Job] | None:
        """For `Launcher.serve`."""
        if monotonic() - self._looked >= LOOK_S:
            self._look()
            self._looked = monotonic()
        given = []
        while len(given) < room and (self.queue or self._ask()):
            if self.queue:  # a trial whose jobs are all finished already leaves it empty
                one, job = self.queue.popleft()
                one.given.add(job.digest)
                given.append(job)
        if given or self.queue or self.running or self._ask():
            return given
        return None

    def _look(self) -> None:
        fresh = {job.digest: job for job in self.sweep.jobs}  # which know their jobs
        for one in [*self.running]:
            if one not in self.running:  # given up with another trial of the same setting
                continue
            one.jobs = [fresh[job.digest] for job in one.jobs]
            states = status([job for job in one.jobs if job.digest in one.given])
            if not self._judge(one, states) and self.search.prune:
                self._prune(one, states)

    def _judge(self, one: Running, states: Mapping[str, JobState]) -> bool:
        """Tell the study how a trial ended, if it has."""
        import optuna

        for job in one.jobs:
            state = states.get(job.digest, JobState())
            if state.active or state.state == "FINISHED":
                continue
            if job.digest in one.adopted:  # it was still being stopped when this process began
                one.adopted.remove(job.digest)
                one.given.remove(job.digest)
                self.queue.append((one, job))
                return False
            if any(words in state.reason for words in DIVERGED):
                self._stop(one, f"{job.label} diverged: {state.reason}", optuna.trial.TrialState.PRUNED)
            else:
                reason = f"{job.label}: {state.state} {state.reason}"
                known = {twin.digest: states.get(twin.digest, JobState()) for twin in one.jobs}
                failed = [digest for digest, found in known.items() if not (found.active or found.state == "FINISHED")]
                self._stop(one, reason, optuna.trial.TrialState.FAIL, failed)
            return True
        if not all(states.get(job.digest, JobState()).state == "FINISHED" for job in one.jobs):
            return False
        values = [float(job.result.get(self.search.metric, math.nan)) for job in one.jobs]
        if not all(map(math.isfinite, values)):
            reason = f"{self.search.metric} is not a number in result.json of some job; choose another: hydra.sweeper.metric="
            self._stop(one, reason, optuna.trial.TrialState.FAIL)
            return True
        mean = sum(values) / len(values)
        list(self._report(one))  # what others are compared with
        self.study.tell(one.trial, mean)
        self.running.remove(one)
        self._say(f"trial {one.trial.number}: {self._values(one)}: {self.search.metric} {mean:.2f}")
        return True

    def _prune(self, one: Running, states: Mapping[str, JobState]) -> None:
        """Stop a trial that leads nowhere."""
        import optuna

        for job in one.jobs:
            if states.get(job.digest, JobState()).state == "RUNNING" and collapsed(job.metrics()):
                reason = f"{job.label} collapsed: its spread stays below {COLLAPSED}"
                self._stop(one, reason, optuna.trial.TrialState.PRUNED)
                return
        for epoch in self._report(one):
            if one.trial.should_prune():
                reason = f"its kNN at epoch {epoch} is below the median of the others"
                self._stop(one, reason, optuna.trial.TrialState.PRUNED)
                return

    def _report(self, one: Running) -> Iterator[int]:
        """Tell the study the kNN of each epoch that all seeds have come to since; the epochs, each after it was told."""
        curves = []
        for job in one.jobs:
            lines = [line for line in job.metrics() if KNN in line and line["epoch"] >= 1]
            curves.append({int(line["epoch"]): line[KNN] for line in lines})
        for epoch in sorted(set.intersection(*map(set, curves)) - one.compared):
            one.compared.add(epoch)
            one.trial.report(sum(curve[epoch] for curve in curves) / len(curves), epoch)
            yield epoch

    def _stop(self, one: Running, reason: str, state: "optuna.trial.TrialState", failed: Sequence[str] = ()) -> None:
        """Give a trial up, and record why before anything is stopped; `failed` ended by themselves (digests)."""
        for twin in [twin for twin in self.running if twin.given is one.given]:  # of the same setting, itself included
            twin.trial.set_user_attr("reason", reason)
            twin.trial.set_user_attr("failed", [*failed])
            self.study.tell(twin.trial, state=state)
            self.running.remove(twin)
        self.queue = deque(entry for entry in self.queue if entry[0].given is not one.given)
        self._give_up(one.jobs, reason, failed)
        self._say(f"trial {one.trial.number}: {self._values(one)}: {state.name}, {reason}")

    def _stop_rest(self, trial: "optuna.trial.FrozenTrial") -> None:
        """Stop what an earlier process had no time to stop, after it had told the study of it."""
        if "failed" in trial.user_attrs:
            digests = {new.digest for new in self.order.jobs(self.space.jobs(self._setting(trial)))}
            jobs = [job for job in self.sweep.jobs if job.digest in digests]
            self._give_up(jobs, trial.user_attrs["reason"], trial.user_attrs["failed"])

    def _give_up(self, jobs: Sequence[Job], reason: str, failed: Sequence[str]) -> None:
        """Want no result of these jobs any more; those that failed keep their own word."""
        unwanted = [one for one in jobs if one.digest not in failed and one.result.get("state") != "finished"]
        if new := [one.digest for one in unwanted if not one.given_up]:
            self.sweep.mark(new, given_up=reason)
        states = status(unwanted)
        self.order.launcher.cancel([one for one in unwanted if one.submitted and states[one.digest].active])

    # ------------------------------------------------------------------------------------------------------------- words

    def _values(self, one: Running) -> str:
        return _joined(self._setting(one.trial))

    def _say(self, sentence: str) -> None:
        self.order.console.say(sentence)

    def end(self) -> int:
        """Say what was found; 0, or 1 when no trial has a value."""
        trials = self.study.get_trials(deepcopy=False)
        counts = {name: sum(one.state.name == name for one in trials) for name in ("COMPLETE", "PRUNED", "FAIL")}
        valued = counted(counts["COMPLETE"], "trial")
        said = f"{valued} with a value, {counts['PRUNED']} stopped early, {counts['FAIL']} failed"
        self._say(f"search {self.sweep.name}: {said}")
        if not counts["COMPLETE"]:
            return 1
        best = self.study.best_trial
        self._say(f"best: {_joined(self._setting(best))}: {self.search.metric} {best.value:.2f}, mean over its seeds")
        self._say(f"`python -m twoviews.sweep report {self.sweep.name}` writes the report.")
        return 0


def _joined(setting: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in setting.items())


def collapsed(lines: Sequence[Mapping[str, float]]) -> bool:
    """Whether the embeddings have been one point for an epoch, not counting the first."""
    known = [line for line in lines if SPREAD in line]
    if not known or known[-1]["epoch"] < 2 * COLLAPSED_EPOCHS:
        return False
    recent = [line[SPREAD] for line in known if line["epoch"] > known[-1]["epoch"] - COLLAPSED_EPOCHS]
    return max(recent) < COLLAPSED


def _described(values: Sequence[str] | Interval) -> str:
    if not isinstance(values, Interval):
        return ",".join(values)
    words = ["a whole number" if values.whole else "", "logarithmic" if values.logarithmic else ""]
    return f"{values.low} to {values.high}" + "".join(f", {word}" for word in words if word)


def _distributions(space: Space) -> dict[str, Any]:
    from optuna import distributions

    found: dict[str, Any] = {}
    for key, values in space.axes.items():
        if not isinstance(values, Interval):
            found[key] = distributions.CategoricalDistribution(list(values))
        elif values.whole:
            found[key] = distributions.IntDistribution(int(values.low), int(values.high), log=values.logarithmic)
        else:
            found[key] = distributions.FloatDistribution(values.low, values.high, log=values.logarithmic)
    return found


@contextmanager
def _study(sweep: Sweep, space: Space, search: Optuna) -> "Iterator[optuna.Study]":
    """The study in a sweep folder, made where there is none.

    Raises:
        BadInput: a trial meant something else there: other values, seeds or overrides, or another metric.
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
        pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPARED_AFTER),
    )
    # Begun with the same number again after a resume, a sampler would propose what it proposed first.
    study.sampler = optuna.samplers.TPESampler(seed=search.draw + 1000 * len(study.trials), constant_liar=True)
    fixed = {one.partition("=")[0]: one.partition("=")[2] for one in space.fixed}  # the last of each key
    about = {
        "space": "; ".join(f"{key}={_described(values)}" for key, values in sorted(space.axes.items())),
        "seeds": ",".join(sorted(space.seeds)),
        "metric": search.metric,
        "overrides": " ".join(f"{key}={value}" for key, value in sorted(fixed.items()) if not _free(key)),
    }
    for name, now in about.items():
        before = study.user_attrs.get(name, now)
        if before != now:
            what = "values" if name == "space" else name
            raise BadInput(
                f"the study in {path} is about other {what}: {before or 'none'}, and not {now or 'none'}; give the same, or "
                "another folder with sweep.name=."
            )
        study.set_user_attr(name, now)
    try:
        yield study
    finally:
        storage.remove_session()


def _free(key: str) -> bool:
    """Whether a trial means the same with another value."""
    return re.split("[./@]", key.lstrip("+~"))[0] in FREE
