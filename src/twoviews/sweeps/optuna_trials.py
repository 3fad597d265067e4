"""Trials of an Optuna study as jobs of a sweep: asked for when a slot is free, told when all seeds have ended.

There are no batches: the next config is proposed with everything that is known by then, and weak trials are stopped early.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from optuna import Study, Trial
from optuna.trial import FrozenTrial, TrialState

from twoviews.errors import BadInput, counted
from twoviews.protocols.units import KNN_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState, assigned
from twoviews.sweeps.job_states import current_states
from twoviews.sweeps.launching import SweepCommand
from twoviews.sweeps.mlflow_sync import attach_jobs
from twoviews.sweeps.search import Interval, SearchSpace
from twoviews.sweeps.slurm import cancel

if TYPE_CHECKING:
    from twoviews.sweeps.optuna_search import Optuna

POLL_SECONDS = 2.0  # between two looks at the states of running jobs
SPREAD = "train/spread"
PRUNE_BELOW_SPREAD = 0.05  # embeddings with a lower spread are collapsed; 1 is even
COLLAPSE_EPOCHS = 1.0  # a collapse has to last so long, after as many epochs at the start


@dataclass(eq=False)
class RunningConfig:
    """A config that has no value yet."""

    config: Mapping[str, str]  # the values by key, as they are typed
    trials: list[Trial]  # of the study that proposed it; several may
    jobs: list[Job]  # one for each seed


class TrialRunner:
    """Asks the study in a sweep folder for trials, passes their jobs to a launcher, and tells the study their values."""

    def __init__(self, search: "Optuna", study: Study, command: SweepCommand, space: SearchSpace, sweep: Sweep):
        self.search, self.study, self.command, self.space, self.sweep = search, study, command, space, sweep
        self._say = command.console.say
        self._running: list[RunningConfig] = []
        self._queue: deque[Job] = deque()
        self._started: set[str] = set()  # digests of the jobs that this process passed to the launcher
        self._last_poll = -math.inf

    def resume(self) -> None:
        """Go on with the trials that an earlier process left without a value."""
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                self._begin(resumed_trial(self.study, trial))
            elif "failed" in trial.user_attrs:  # stopped by a process that may have had no time to stop its jobs
                digests = [spec.digest for spec in self.command.specs(self.space.combinations(self._config(trial)))]
                self._give_up(self.sweep.named(digests), trial.user_attrs["reason"], trial.user_attrs["failed"])
        if trials:
            left = sum(len(running.trials) for running in self._running)
            self._say(f"the study has {counted(len(trials), 'trial')}, {left} of them without a value yet; going on.")

    def next_jobs(self, free_slots: int) -> Sequence[Job] | None:
        """At most `free_slots` jobs to start now, perhaps none; None when the search is over."""
        if monotonic() - self._last_poll >= POLL_SECONDS:
            self._poll()
            self._last_poll = monotonic()
        while len(self._queue) < free_slots and self._ask():
            pass
        jobs = [self._queue.popleft() for _ in range(min(free_slots, len(self._queue)))]
        self._started.update(job.digest for job in jobs)
        return jobs if jobs or self._queue or self._running or self._ask() else None

    def _config(self, trial: Trial | FrozenTrial) -> dict[str, str]:
        """The values of a trial by key, as they are typed."""
        return {
            key: interval.text(value) if isinstance(interval := self.space.parameters[key], Interval) else str(value)
            for key, value in trial.params.items()
        }

    def _ask(self) -> bool:
        """Begin another trial; False if there are enough, running or in total."""
        running = sum(len(running.trials) for running in self._running)
        total = sum(trial.state != TrialState.WAITING for trial in self.study.get_trials(deepcopy=False))
        if running >= self.search.at_once or total >= self.search.trials:
            return False
        self._begin(self.study.ask())
        return True

    def _begin(self, trial: Trial) -> None:
        """Create the jobs of a trial and queue those that have to run, unless another trial has the same jobs."""
        suggest(trial, self.space)
        config = self._config(trial)
        for earlier in self.study.get_trials(deepcopy=False, states=(TrialState.PRUNED, TrialState.FAIL)):
            if self._config(earlier) == config:
                trial.set_user_attr("reason", f"as trial {earlier.number}: {earlier.user_attrs.get('reason', '')}")
                self.study.tell(trial, state=earlier.state)
                return
        try:
            specs = self.command.specs(self.space.combinations(config))
        except BadInput:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        digests = {spec.digest for spec in specs}
        for running in self._running:
            # Different values may give the same jobs: typed in another way (1 and 1.0), or of keys that are not used.
            if digests == {job.digest for job in running.jobs}:
                running.trials.append(trial)
                return
        _, jobs = self.command.add(specs)
        if self.command.tracking["mirror"]:
            attach_jobs(self.sweep, jobs, self.command.tracking)
        self._running.append(RunningConfig(config, [trial], jobs))
        states = current_states(jobs)
        self._queue.extend(job for job in jobs if states[job.digest].needs_start)

    def _poll(self) -> None:
        """Tell the study about configs whose jobs have ended, and stop weak ones."""
        jobs = {job.digest: job for job in self.sweep.jobs}  # which have their SLURM ids by now
        for running in self._running:
            running.jobs = [jobs[job.digest] for job in running.jobs]
        states = dict.fromkeys([job.digest for job in self._queue], JobState())
        begun = [job for running in self._running for job in running.jobs if job.digest not in states]
        states |= current_states(begun)
        for job in begun:
            # One that this process has not started was being stopped by an earlier one.
            if states[job.digest].ended_without_result and job.digest not in self._started:
                self._queue.append(job)
                states[job.digest] = JobState()
        for running in [*self._running]:
            if all(states[job.digest].state == "FINISHED" for job in running.jobs):
                self._finish(running)
            elif reason := self._reason_to_stop(running, states):
                self._stop(running, *reason)

    def _finish(self, running: RunningConfig) -> None:
        """Tell the study the value of a config, the mean over its seeds."""
        metric = self.search.metric
        mean = statistics.fmean(float(job.result.get(metric, math.nan)) for job in running.jobs)
        if not math.isfinite(mean):
            self._stop(running, TrialState.FAIL, f"a result.json has no finite number {metric}; choose another metric")
            return
        list(self._report_knn(running))  # which other trials are compared with
        self._running.remove(running)
        for trial in running.trials:
            self.study.tell(trial, mean)
            self._say(f"trial {trial.number}: {assigned(running.config)}: {metric} {mean:.2f}")

    def _reason_to_stop(
        self, running: RunningConfig, states: Mapping[str, JobState]
    ) -> tuple[TrialState, str, list[str]] | None:
        """The arguments of `_stop` for a config that failed or is weak."""
        for job in running.jobs:
            if states[job.digest].state == "PRUNED":  # as the jobs of an earlier trial, which were these
                return TrialState.PRUNED, job.given_up, []
        failed = [job for job in running.jobs if states[job.digest].ended_without_result]
        for job in failed:
            state = states[job.digest]
            if state.state == "FAILED" and job.diverged_since(state.started):
                return TrialState.PRUNED, f"{job.label} diverged: {state.reason}", []
            return TrialState.FAIL, f"{job.label}: {state.state} {state.reason}", [job.digest for job in failed]
        for job in running.jobs if self.search.prune else ():
            if states[job.digest].state == "RUNNING" and collapsed(job.metrics()):
                return TrialState.PRUNED, f"{job.label} collapsed: its spread stays below {PRUNE_BELOW_SPREAD}", []
        for epoch in self._report_knn(running) if self.search.prune else ():
            return TrialState.PRUNED, f"its kNN at epoch {epoch} is below the median of the others", []
        return None

    def _report_knn(self, running: RunningConfig) -> Iterator[int]:
        """Report the mean kNN of each epoch that all seeds have reached; yields the epochs at which it is below the median."""
        curves = [
            {int(line["epoch"]): line[KNN_TOP1] for line in job.metrics() if KNN_TOP1 in line and line["epoch"] >= 1}
            for job in running.jobs
        ]
        for trial in running.trials:
            reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            for epoch in sorted(set.intersection(*map(set, curves)) - {*reported}):
                trial.report(sum(curve[epoch] for curve in curves) / len(curves), epoch)
                if trial.should_prune():
                    yield epoch

    def _stop(self, running: RunningConfig, state: TrialState, reason: str, failed: Sequence[str] = ()) -> None:
        """End the trials of a config for good; recorded before any job is stopped.

        Args:
            running: the config.
            state: what the study is told.
            reason: why it ends.
            failed: digests of the jobs that failed by themselves, and keep their own reason.
        """
        self._running.remove(running)
        digests = {job.digest for job in running.jobs}
        self._queue = deque(job for job in self._queue if job.digest not in digests)
        for trial in running.trials:
            trial.set_user_attr("reason", reason)
            trial.set_user_attr("failed", [*failed])
            self.study.tell(trial, state=state)
            self._say(f"trial {trial.number}: {assigned(running.config)}: {state.name}, {reason}")
        self._give_up(running.jobs, reason, failed)

    def _give_up(self, jobs: Sequence[Job], reason: str, failed: Sequence[str]) -> None:
        """Stop jobs for good, but for those that failed by themselves."""
        unwanted = [job for job in jobs if job.digest not in failed and job.result.get("state") != "finished"]
        if facts := {job.digest: {"given_up": reason} for job in unwanted if not job.given_up}:
            self.sweep.mark(facts)
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


def suggest(trial: Trial, space: SearchSpace) -> None:
    """Let the study propose the parameters that a trial does not have yet; one that was killed meanwhile may have some."""
    for key, values in space.parameters.items():
        if not isinstance(values, Interval):
            trial.suggest_categorical(key, list(values))
        elif values.whole:
            trial.suggest_int(key, int(values.low), int(values.high), log=values.logarithmic)
        else:
            trial.suggest_float(key, values.low, values.high, log=values.logarithmic)


def resumed_trial(study: Study, trial: FrozenTrial) -> Trial:
    """A trial of an earlier process, to be reported to and told; Optuna has no public way to go on with one."""
    return Trial(study, trial._trial_id)
