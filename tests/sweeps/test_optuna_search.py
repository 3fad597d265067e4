"""The search by optuna: no trial lost or doubled, seeds averaged over, weak trials stopped."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake import TRAIN, config, starts
from test_runner import wait_for

from twoviews.console import Console
from twoviews.errors import BadInput
from twoviews.sweep import main as sweep_command
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobSpec
from twoviews.sweeps.job_states import current_states
from twoviews.sweeps.launching import SweepCommand
from twoviews.sweeps.machine import Launcher, Local, Pool
from twoviews.sweeps.optuna_search import Optuna
from twoviews.sweeps.optuna_trials import collapsed, resumed_trial
from twoviews.sweeps.report import report
from twoviews.sweeps.slurm import cancel

# A stand-in for a training: its kNN depends on x and, a little, on the seed.
PLAN = """
x, seed, collapse, behind = {x}, {seed}, {collapse}, {behind}
bad = x < 0.3
epochs = 100 if bad and (collapse or behind) else {epochs}
knn = 80 - 40 * abs(x - 0.7) + seed
lines = []
for epoch in range(1, epochs + 1):
    spread = 0.01 if collapse and bad else 0.9
    lines.append({{"step": epoch, "epoch": epoch, "time": time.time(), "knn/top1": knn, "train/spread": spread}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    stop_when_told(); time.sleep({pause})
if {fail!r} and bad:
    result("failed", reason={fail!r}, **{facts!r}); sys.exit(1)
checkpoint(); result("finished", **{{"knn/top1": knn}})
"""


class StandInCommand(SweepCommand):
    """What the search needs of `SweepCommand`, with stand-ins for trainings."""

    def __init__(self, folder: Path, launcher: Launcher, **plan: object):
        self.folder, self.launcher = folder, launcher
        self.plan = {"epochs": 3, "collapse": False, "behind": False, "fail": "", "facts": {}, "pause": 0.0, **plan}
        self.not_in_digest = ("workers",)
        self.options, self.console = SimpleNamespace(plan=False), Console()
        self.tracking, self.protocols = {"mirror": False}, ["knn", "linear", "few_labels"]
        code = folder / "code" / "fake"
        code.mkdir(parents=True, exist_ok=True)
        (code / "train.py").write_text(TRAIN)
        self.here = {"cwd": str(folder), "code": str(code)}

    def specs(self, combinations) -> list[JobSpec]:
        made = []
        for one in combinations:
            parameters = {key: float(value) for key, value in (override.split("=") for override in one)}
            own = sorted((key, value) for key, value in parameters.items() if key not in self.not_in_digest)
            digest = f"{abs(hash(tuple(own))) % 2**32:08x}"
            plan = PLAN.format(**{"seed": 0, **parameters}, **self.plan)
            made.append(JobSpec(digest, parameters, list(one), config(parameters.get("seed", 0), plan)))
        return made

    def add(self, new):
        sweep = Sweep(self.folder)
        return sweep, sweep.add([replace(one, details=self.here) for one in new], command="python train.py -m")


TYPED = ["x=interval(0.0,1.0)", "seed=0,1"]


@pytest.fixture(autouse=True)
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))


def pool(at_once: int = 3) -> Pool:
    return Pool(at_once=at_once, jobs_per_gpu=1, cores_per_job=1)


def search(**settings: object) -> Optuna:
    return Optuna(**{"trials": 6, "draw": 0, "metric": "knn/top1", "prune": False, "at_once": 2, **settings})  # type: ignore[arg-type]


def trials(folder: Path) -> list:
    import optuna

    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}").trials


def started(folder: Path) -> dict[str, int]:
    return {job.digest: len(starts(job)) for job in Sweep(folder).jobs}


def test_a_value_is_the_mean_over_seeds_and_each_job_runs_once(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "s"
    assert search().run(StandInCommand(folder, pool()), TYPED) == 0
    found = trials(folder)
    assert [one.state.name for one in found] == ["COMPLETE"] * 6
    for one in found:
        assert one.value == pytest.approx(80 - 40 * abs(one.params["x"] - 0.7) + 0.5, abs=0.01)
    jobs = Sweep(folder).jobs
    assert len(jobs) == 12 and set(started(folder).values()) == {1}
    assert {job.parameters["seed"] for job in jobs} == {0, 1} and len({job.parameters["x"] for job in jobs}) == 6
    assert "best: x=" in capsys.readouterr().out


def test_values_that_change_no_job_are_trials_of_the_same_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    typed = ["x=0.4,0.6", "workers=1,2,3,4", "seed=0,1"]
    command = StandInCommand(folder, pool(), pause=0.3)
    assert search(trials=8, at_once=4).run(command, typed) == 0
    found = trials(folder)
    assert [one.state.name for one in found] == ["COMPLETE"] * 8
    for one in found:
        assert one.value == pytest.approx(80 - 40 * abs(float(one.params["x"]) - 0.7) + 0.5, abs=0.01)
    proposed = {one.params["x"] for one in found}
    assert len({tuple(one.params.values()) for one in found}) > len(proposed), "no two trials had the same jobs"
    assert len(started(folder)) == 2 * len(proposed) and set(started(folder).values()) == {1}


def test_the_same_command_adds_only_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    search(trials=2).run(StandInCommand(folder, Local()), TYPED)
    first = [one.params for one in trials(folder)]
    search(trials=2).run(StandInCommand(folder, Local()), TYPED)
    assert [one.params for one in trials(folder)] == first
    search(trials=4).run(StandInCommand(folder, Local()), TYPED)
    found = [one.params["x"] for one in trials(folder)]
    assert found[:2] == [one["x"] for one in first] and len(set(found)) == 4  # not the first proposals again
    assert set(started(folder).values()) == {1}


def test_other_values_are_another_study(tmp_path: Path) -> None:
    search(trials=1).run(StandInCommand(tmp_path / "s", Local()), TYPED)
    with pytest.raises(BadInput, match="sweep.name="):
        search(trials=1).run(StandInCommand(tmp_path / "s", Local()), ["x=interval(0.0,2.0)", "seed=0,1"])
    with pytest.raises(BadInput, match="nothing to search"):
        search(trials=1).run(StandInCommand(tmp_path / "s", Local()), ["seed=0,1"])


@pytest.mark.parametrize(
    ("settings", "typed", "what"),
    [
        ({"metric": "linear/top1"}, TYPED, "metric"),
        ({}, [*TYPED, "epochs=5"], "overrides"),
        ({}, ["data=cifar10", *TYPED], "overrides"),
        ({}, [TYPED[0], "seed=0,1,2"], "seeds"),
        ({}, [TYPED[0]], "seeds"),
    ],
)
def test_what_a_trial_means_cannot_change(
    tmp_path: Path, monkeypatch, settings: dict, typed: list[str], what: str
) -> None:
    monkeypatch.setattr(Local, "serve", lambda *_: None)  # the study is begun, and no training
    search().run(StandInCommand(tmp_path / "s", Local()), TYPED)
    with pytest.raises(BadInput, match=rf"is about other {what}: .*sweep\.name="):
        search(**settings).run(StandInCommand(tmp_path / "s", Local()), typed)
    for same in ([*TYPED, "tracking=files"], ["runtime.device=cpu", *TYPED]):
        search(trials=9).run(StandInCommand(tmp_path / "s", Local()), same)


@pytest.mark.parametrize("metric", ["knn/topp1", "knn", "kn/top1", "train/loss", "tent/top1", "few_labels/"])
def test_a_metric_that_nothing_measures_is_refused_before_training(tmp_path: Path, metric: str) -> None:
    with pytest.raises(BadInput, match="Known: train/spread, knn/top1"):
        search(metric=metric).run(StandInCommand(tmp_path / "s", Local()), TYPED)
    assert not (tmp_path / "s" / "study.db").exists()


def test_no_batch_waits_for_its_slowest(tmp_path: Path) -> None:
    """One job is held back until four others are through: with batches of two that would be for ever."""
    folder = tmp_path / "s"

    class Held(StandInCommand):
        def specs(self, combinations) -> list[JobSpec]:
            first = not list(folder.glob("*/point.json"))
            made = super().specs(combinations)
            if first:
                until = "while len(list(folder.parent.glob('*/result.json'))) < 4: time.sleep(0.05)\n"
                made = [replace(one, config_yaml=f"# {until}{one.config_yaml}") for one in made]
            return made

    assert search(trials=5).run(Held(folder, pool(2)), ["x=interval(0.0,1.0)"]) == 0
    assert [one.state.name for one in trials(folder)] == ["COMPLETE"] * 5


DRIVER = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_optuna_search import StandInCommand, TYPED, pool, search
os.sched_getaffinity = lambda _: set(range(4))
sys.exit(search(trials=20, at_once=4).run(StandInCommand(Path({folder!r}), pool(4), pause=0.15), TYPED))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 17])  # jobs that have begun
def test_killed_and_started_again_no_trial_is_lost_or_doubled(tmp_path: Path, moment: int) -> None:
    folder = tmp_path / "s"
    script = DRIVER.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(folder))
    driver = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    wait_for(lambda: len(list(folder.glob("*/starts"))) >= moment, 90)
    time.sleep(0.3)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = trials(folder)
    assert subprocess.run([sys.executable, "-c", script], timeout=200).returncode == 0
    found = trials(folder)
    assert [one.state.name for one in found] == ["COMPLETE"] * 20
    for one, earlier in zip(found, before, strict=False):
        assert one.params == earlier.params or not earlier.params  # it was killed before the trial had any
    for one in found:
        assert one.value == pytest.approx(80 - 40 * abs(one.params["x"] - 0.7) + 0.5, abs=0.01)
    jobs = Sweep(folder).jobs
    assert len(jobs) == 40 == len({(job.parameters["x"], job.parameters["seed"]) for job in jobs})
    assert all(job.state.state == "FINISHED" for job in jobs)
    # What had finished was not run again; what was under way was started once more.
    assert max(started(folder).values()) <= 2 and sum(started(folder).values()) <= 44


def test_a_trial_whose_proposal_was_interrupted_goes_on(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "s"
    with monkeypatch.context() as begun:
        begun.setattr(Local, "serve", lambda *_: None)  # the study is begun, and no training
        search(trials=1).run(StandInCommand(folder, Local()), TYPED)
    import optuna

    optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}").ask()  # it has no parameters yet
    assert search(trials=1).run(StandInCommand(folder, Local()), TYPED) == 0
    assert [(one.state.name, [*one.params]) for one in trials(folder)] == [("COMPLETE", ["x"])]


def test_a_collapsed_trial_is_stopped_and_the_report_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    command = StandInCommand(folder, pool(), collapse=True, pause=0.1)
    assert search(trials=6, prune=True).run(command, ["x=0.1,0.6", "seed=0,1"]) == 0
    states = {(one.params["x"], one.state.name) for one in trials(folder)}
    assert states == {("0.1", "PRUNED"), ("0.6", "COMPLETE")}
    weak = [job for job in Sweep(folder).jobs if job.parameters["x"] == 0.1]
    assert all(len(job.metrics()) < 100 and job.state.state != "FINISHED" for job in weak)
    found = report(Sweep(folder)).jobs
    assert all(found["state"][job.digest] == "PRUNED" for job in weak)
    assert "collapsed: its spread stays below 0.05" in found["reason"][weak[0].digest]


def test_what_was_given_up_is_done_with_and_says_why(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "s"
    command = StandInCommand(folder, pool(), collapse=True, pause=0.1)
    search(trials=6, prune=True).run(command, ["x=0.1,0.6", "seed=0,1"])
    before, weak = started(folder), [job for job in Sweep(folder).jobs if job.parameters["x"] == 0.1]
    with Sweep(folder).update() as record:
        record["launcher"] = {"_target_": "twoviews.sweeps.machine.Local"}
    for name in ("status", "retry", "logs"):
        assert sweep_command([name, str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "/s: 2 FINISHED, 2 PRUNED" in out and "sweep s: 4 jobs, 2 FINISHED, 2 PRUNED" in out
    look = {digest: state.state for digest, state in current_states(Sweep(folder).jobs).items()}
    assert [look[job.digest] for job in weak] == ["PRUNED"] * 2
    search(trials=6, prune=True).run(command, ["x=0.1,0.6", "seed=0,1"])
    assert started(folder) == before, "nothing runs again, by retry or by the same command"


def test_a_search_that_is_killed_while_it_gives_up_a_trial_gives_it_up_later(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "s"
    command = StandInCommand(folder, pool(), collapse=True, pause=0.1)
    mark = Sweep.mark

    def killed_mark(sweep: Sweep, facts: dict) -> None:
        if any("given_up" in changed for changed in facts.values()):
            raise KeyboardInterrupt
        mark(sweep, facts)

    with monkeypatch.context() as killed:
        killed.setattr(Sweep, "mark", killed_mark)
        with pytest.raises(KeyboardInterrupt):
            search(trials=1, prune=True).run(command, ["x=interval(0.0,0.2)", "seed=0,1"])
    assert [one.state.name for one in trials(folder)] == ["PRUNED"]
    cancel(Sweep(folder).jobs)  # as the end of the process would
    for job in Sweep(folder).jobs:
        wait_for(lambda job=job: current_states([job])[job.digest].state in ("INTERRUPTED", "LOST"))
    search(trials=1, prune=True).run(command, ["x=interval(0.0,0.2)", "seed=0,1"])
    states = current_states(Sweep(folder).jobs).values()
    assert [state.state for state in states] == ["PRUNED"] * 2
    assert all("collapsed" in state.reason for state in states)


def test_a_trial_below_the_median_is_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    command = StandInCommand(folder, pool(), behind=True, pause=0.1, epochs=30)
    # The first four have to finish before there is a median; the fifth is the weak one.
    assert search(trials=4, prune=True).run(command, ["x=interval(0.4,0.9)", "seed=0,1"]) == 0
    import optuna

    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}")
    study.enqueue_trial({"x": 0.4})
    weak = StandInCommand(folder, pool(), pause=0.1, epochs=100)
    weak.specs = lambda combinations: StandInCommand.specs(
        weak, [[one[0].replace("0.4", "0.1"), one[1]] for one in combinations]
    )
    search(trials=5, prune=True).run(weak, ["x=interval(0.4,0.9)", "seed=0,1"])
    last = trials(folder)[4]
    assert last.state.name == "PRUNED" and "below the median" in last.user_attrs["reason"]
    assert all(len(job.metrics()) < 100 for job in Sweep(folder).jobs if job.parameters["x"] == 0.1)


def test_a_diverged_trial_is_a_bad_one_and_another_failure_is_no_value(tmp_path: Path) -> None:
    diverged = tmp_path / "diverged"
    command = StandInCommand(diverged, pool(), fail="the loss is nan at step 3", facts={"diverged": True})
    search(trials=12, at_once=3).run(command, ["x=0.1,0.6"])
    states = {one.params["x"]: one.state.name for one in trials(diverged)}
    assert states == {"0.1": "PRUNED", "0.6": "COMPLETE"}
    now = {job.parameters["x"]: current_states([job])[job.digest] for job in Sweep(diverged).jobs}
    assert now[0.1].state == "PRUNED" and "diverged: the loss is nan at step 3" in now[0.1].reason
    failed = tmp_path / "failed"
    search(trials=12, at_once=3).run(StandInCommand(failed, pool(), fail="the loss is out of luck"), ["x=0.1,0.6"])
    states = {one.params["x"]: one.state.name for one in trials(failed)}
    assert states == {"0.1": "FAIL", "0.6": "COMPLETE"}
    reasons = [one.user_attrs["reason"] for one in trials(failed) if one.state.name == "FAIL"]
    assert "out of luck" in reasons[0]
    now = {job.parameters["x"]: current_states([job])[job.digest].state for job in Sweep(failed).jobs}
    assert now == {0.1: "FAILED", 0.6: "FINISHED"}, "what went wrong keeps its own word"


def test_only_the_last_start_of_a_training_can_have_diverged(tmp_path: Path) -> None:
    """A result.json is removed when a training begins, which may fail before that."""
    job = Job(tmp_path, {})
    assert not job.diverged_since(1.0)
    (tmp_path / "result.json").write_text('{"state": "failed", "reason": "the loss is nan", "diverged": true}')
    os.utime(tmp_path / "result.json", (1000, 1000))
    assert job.diverged_since(999.0) and not job.diverged_since(1001.0)


def test_collapse_is_an_epoch_of_no_spread() -> None:
    def lines(*spreads: float) -> list[dict[str, float]]:
        return [{"epoch": 0.5 * (number + 1), "train/spread": spread} for number, spread in enumerate(spreads)]

    assert not collapsed([]) and not collapsed(lines(0.01, 0.01, 0.01))  # the first epoch may begin anywhere
    assert collapsed(lines(0.5, 0.5, 0.01, 0.01)) and not collapsed(lines(0.01, 0.01, 0.2, 0.01))
    assert not collapsed([{"epoch": 9.0, "train/loss": 1.0}])


def test_a_trial_of_an_earlier_process_can_be_told(tmp_path: Path) -> None:
    """By a private attribute of Optuna, which another release may rename."""
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=storage, study_name="s").ask().suggest_float("x", 0.0, 1.0)
    study = optuna.load_study(study_name="s", storage=storage)
    trial = resumed_trial(study, study.get_trials()[0])
    trial.report(1.0, 1)
    trial.set_user_attr("reason", "none")
    study.tell(trial, 0.5)
    (told,) = study.get_trials()
    assert (told.number, told.value, told.intermediate_values) == (0, 0.5, {1: 1.0})
