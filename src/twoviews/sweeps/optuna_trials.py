"""Trials of an Optuna study as jobs of a sweep: asked for when a slot is free, told when all seeds have ended.

There are no batches: the next config is proposed with everything that is known by then, and weak trials are stopped early.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from optuna import Study, Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from twoviews.errors import BadInput, counted
from twoviews.protocols.units import KNN_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState, assigned
from twoviews.sweeps.job_states import current_states
from twoviews.sweeps.launching import SweepCommand
from twoviews.sweeps.search import Interval, SearchSpace
from twoviews.sweeps.slurm import cancel

if TYPE_CHECKING:
    from twoviews.sweeps.optuna_search import Optuna

POLL_SECONDS = 2.0  # between two looks at the states of running jobs
SPREAD = "train/spread"
PRUNE_BELOW_SPREAD = 0.05  # embeddings with a lower spread are collapsed; 1 is even
COLLAPSE_EPOCHS = 1.0  # a collapse has to last so long, after as many epochs at the start
DIVERGED = ("loss is", "weights are not finite")  # in the reason of a training that is not finite any more


@dataclass(eq=False)
class RunningTrial:
    """A trial without a value.

    Args:
        trial: of the study.
        jobs: one for each seed; trials with the same config share them.
        reported_epochs: epochs whose kNN was reported to the study.
    """

    trial: Trial
    jobs: list[Job]
    reported_epochs: set[int] = field(default_factory=set)


class TrialRunner:
    """Asks a study for trials, passes their jobs to a launcher, and tells the study their values.

    Args:
        search: the parameters of the search.
        study: in the sweep folder.
        command: of the search.
        space: the search space of the command.
        sweep: where jobs are added.
    """

    def __init__(self, search: "Optuna", study: Study, command: SweepCommand, space: SearchSpace, sweep: Sweep):
        self.search, self.study, self.command, self.space, self.sweep = search, study, command, space, sweep
        self._say = command.console.say
        self._running: list[RunningTrial] = []
        self._queue: deque[Job] = deque()
        self._started: set[str] = set()  # digests of the jobs that the launcher has
        self._inherited: set[str] = set()  # and of those among them that an earlier process may have left running
        self._last_poll = -math.inf

    def resume(self) -> None:
        """Go on with the trials that an earlier process left without a value."""
        trials = self.study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state != TrialState.RUNNING:
                self._stop_leftovers(frozen)
                continue
            trial = resumed_trial(self.study, frozen)
            if (
                frozen.params.keys() != self.space.parameters.keys()
            ):  # killed while it was asked for: nothing was started
                trial.set_user_attr("torn", True)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            self._begin(trial)
        if trials:
            self._say(
                f"the study has {counted(len(trials), 'trial')}, {len(self._running)} of them without a value yet; going on."
            )

    def _begin(self, trial: Trial) -> None:
        """Create the jobs of a trial, and queue those that have to run."""
        config = self._config(trial)
        for earlier in self.study.get_trials(deepcopy=False):
            weak = earlier.state in (TrialState.PRUNED, TrialState.FAIL)
            if weak and "torn" not in earlier.user_attrs and self._config(earlier) == config:
                reason = earlier.user_attrs.get("reason", "")
                trial.set_user_attr("reason", f"as trial {earlier.number}: {reason}")
                self.study.tell(trial, state=earlier.state)
                return
        same = next((running for running in self._running if self._config(running.trial) == config), None)
        if same:
            self._running.append(RunningTrial(trial, same.jobs))
            return
        try:
            specs = self.command.specs(self.space.combinations(config))
        except BadInput:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        _, jobs = self.command.add(specs)
        self.command.attach_jobs(self.sweep, jobs)
        self._running.append(RunningTrial(trial, jobs))
        begun = {
            digest
            for digest, state in current_states(jobs).items()
            if state.state in ("FINISHED", "RUNNING") or (state.state == "QUEUED" and state.slurm_id)
        }
        self._inherited |= begun - self._started
        self._started |= begun
        self._queue.extend(job for job in jobs if job.digest not in begun)

    def _config(self, trial: Trial | FrozenTrial) -> dict[str, str]:
        """The values of a trial by key, as they are typed."""
        return {
            key: interval.text(value) if isinstance(interval := self.space.parameters[key], Interval) else str(value)
            for key, value in trial.params.items()
        }

    def _ask(self) -> bool:
        """Begin another trial; False if there are enough, running or in total."""
        trials = self.study.get_trials(deepcopy=False)
        count = sum(trial.state.name != "WAITING" and "torn" not in trial.user_attrs for trial in trials)
        if len(self._running) >= self.search.at_once or count >= self.search.trials:
            return False
        self._begin(self.study.ask(distributions(self.space)))
        return True

    def next_jobs(self, free_slots: int) -> Sequence[Job] | None:
        """At most `free_slots` jobs to start now, perhaps none; None when the search is over."""
        if monotonic() - self._last_poll >= POLL_SECONDS:
            self._poll()
            self._last_poll = monotonic()
        jobs = []
        while len(jobs) < free_slots and (self._queue or self._ask()):
            if self._queue:  # it stays empty for a trial whose jobs are all finished
                jobs.append(self._queue.popleft())
                self._started.add(jobs[-1].digest)
        if jobs or self._queue or self._running or self._ask():
            return jobs
        return None

    def _poll(self) -> None:
        """End the trials whose jobs have ended, and stop weak ones."""
        jobs = {job.digest: job for job in self.sweep.jobs}  # which have their SLURM ids by now
        for running in [*self._running]:
            if running not in self._running:  # stopped with another trial of the same config
                continue
            running.jobs = [jobs[job.digest] for job in running.jobs]
            states = current_states([job for job in running.jobs if job.digest in self._started])
            if not self._end(running, states) and self.search.prune:
                self._prune(running, states)

    def _end(self, running: RunningTrial, states: Mapping[str, JobState]) -> bool:
        """Tell the study how a trial ended; False if it goes on."""
        ended = [job for job in running.jobs if not states.get(job.digest, JobState()).active]
        failed = [job.digest for job in ended if states[job.digest].state != "FINISHED"]
        for job in [job for job in ended if job.digest in failed]:
            state = states[job.digest]
            if job.digest in self._inherited:  # it was being stopped when this process began
                self._inherited.remove(job.digest)
                self._started.remove(job.digest)
                self._queue.append(job)
                return False
            if any(words in state.reason for words in DIVERGED):
                self._stop(running, f"{job.label} diverged: {state.reason}", TrialState.PRUNED)
            else:
                reason = f"{job.label}: {state.state} {state.reason}"
                self._stop(running, reason, TrialState.FAIL, failed)
            return True
        if len(ended) < len(running.jobs):
            return False
        metric = self.search.metric
        mean = sum(float(job.result.get(metric, math.nan)) for job in running.jobs) / len(running.jobs)
        if not math.isfinite(mean):
            reason = f"a result.json has no finite number {metric}; choose another metric"
            self._stop(running, reason, TrialState.FAIL)
            return True
        list(self._report_knn(running))  # which other trials are compared with
        self.study.tell(running.trial, mean)
        self._running.remove(running)
        self._say(f"trial {running.trial.number}: {assigned(self._config(running.trial))}: {metric} {mean:.2f}")
        return True

    def _prune(self, running: RunningTrial, states: Mapping[str, JobState]) -> None:
        """Stop a trial that collapsed or is below the median."""
        for job in running.jobs:
            if job.digest in states and states[job.digest].state == "RUNNING" and collapsed(job.metrics()):
                reason = f"{job.label} collapsed: its spread stays below {PRUNE_BELOW_SPREAD}"
                self._stop(running, reason, TrialState.PRUNED)
                return
        for epoch in self._report_knn(running):
            if running.trial.should_prune():
                reason = f"its kNN at epoch {epoch} is below the median of the others"
                self._stop(running, reason, TrialState.PRUNED)
                return

    def _report_knn(self, running: RunningTrial) -> Iterator[int]:
        """Report the mean kNN of each epoch that all seeds have reached since; yields each epoch after its report."""
        curves = [
            {int(line["epoch"]): line[KNN_TOP1] for line in job.metrics() if KNN_TOP1 in line and line["epoch"] >= 1}
            for job in running.jobs
        ]
        for epoch in sorted(set.intersection(*map(set, curves)) - running.reported_epochs):
            running.reported_epochs.add(epoch)
            running.trial.report(sum(curve[epoch] for curve in curves) / len(curves), epoch)
            yield epoch

    def _stop(self, running: RunningTrial, reason: str, state: TrialState, failed: Sequence[str] = ()) -> None:
        """End a trial for good, with the others of its config; recorded before any job is stopped.

        Args:
            running: the trial.
            reason: why it ends.
            state: what the study is told.
            failed: digests of the jobs that ended by themselves.
        """
        config = self._config(running.trial)
        for twin in [twin for twin in self._running if self._config(twin.trial) == config]:
            twin.trial.set_user_attr("reason", reason)
            twin.trial.set_user_attr("failed", [*failed])
            self.study.tell(twin.trial, state=state)
            self._running.remove(twin)
        digests = {job.digest for job in running.jobs}
        self._queue = deque(job for job in self._queue if job.digest not in digests)
        self._give_up(running.jobs, reason, failed)
        self._say(f"trial {running.trial.number}: {assigned(config)}: {state.name}, {reason}")

    def _stop_leftovers(self, trial: FrozenTrial) -> None:
        """Stop the jobs of a trial that an earlier process ended and had no time to stop."""
        if "failed" in trial.user_attrs:
            specs = self.command.specs(self.space.combinations(self._config(trial)))
            self._give_up(
                self.sweep.named(spec.digest for spec in specs), trial.user_attrs["reason"], trial.user_attrs["failed"]
            )

    def _give_up(self, jobs: Sequence[Job], reason: str, failed: Sequence[str]) -> None:
        """Stop jobs for good; those that failed by themselves keep their own reason."""
        unwanted = [job for job in jobs if job.digest not in failed and job.result.get("state") != "finished"]
        if digests := [job.digest for job in unwanted if not job.given_up]:
            self.sweep.mark(digests, given_up=reason)
        states = current_states(unwanted)
        cancel([job for job in unwanted if job.submitted and states[job.digest].active])

    def print_end(self) -> int:
        """Print the best trial; returns 0, or 1 if no trial has a value."""
        counts = Counter(trial.state.name for trial in self.study.get_trials(deepcopy=False))
        ended = f"{counts['PRUNED']} stopped early, {counts['FAIL']} failed"
        self._say(f"search {self.sweep.name}: {counted(counts['COMPLETE'], 'trial')} with a value, {ended}")
        if not counts["COMPLETE"]:
            return 1
        best = self.study.best_trial
        self._say(f"best: {assigned(self._config(best))}: {self.search.metric} {best.value:.2f}, mean over its seeds")
        self._say(f"`python -m twoviews.sweep report {self.sweep.name}` writes the report.")
        return 0


def collapsed(lines: Sequence[Mapping[str, float]]) -> bool:
    """Whether the embeddings have been collapsed for an epoch, not counting the first; from lines of metrics.jsonl."""
    measured = [line for line in lines if SPREAD in line]
    if not measured or measured[-1]["epoch"] < 2 * COLLAPSE_EPOCHS:
        return False
    recent = [line[SPREAD] for line in measured if line["epoch"] > measured[-1]["epoch"] - COLLAPSE_EPOCHS]
    return max(recent) < PRUNE_BELOW_SPREAD


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Optuna's distribution for each swept key."""
    result: dict[str, BaseDistribution] = {}
    for key, values in space.parameters.items():
        if not isinstance(values, Interval):
            result[key] = CategoricalDistribution(list(values))
        elif values.whole:
            result[key] = IntDistribution(int(values.low), int(values.high), log=values.logarithmic)
        else:
            result[key] = FloatDistribution(values.low, values.high, log=values.logarithmic)
    return result


def resumed_trial(study: Study, frozen: FrozenTrial) -> Trial:
    """A trial of an earlier process, to be reported to and told; Optuna has no public way to go on with one."""
    return Trial(study, frozen._trial_id)
