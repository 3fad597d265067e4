"""The runner of a job: starts the training as a child process and writes the state of the job.

Signals of schedulers end here: they are passed on to the training, which stops with a checkpoint, and its exit code becomes
the state of the job. torch is not imported, so that this takes no time and little memory.
"""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

from filelock import Timeout

from twoviews import foreign, processes
from twoviews.code import python_path
from twoviews.errors import BadInput
from twoviews.sweeps.job import LOG, Job, JobState, StateName
from twoviews.tracking import uris

MODULE = "twoviews.sweeps.runner"
OLD_MODULE = "twoviews.sweeps.supervise"  # its name in the code of sweeps that version 0.1.0 launched
RUNNER_LOCK_SECONDS = 60.0  # longest wait for the end of an earlier runner of the same job
POLL_SECONDS = 0.5  # between two looks at a training
MAX_STALLED_STARTS = 3  # starts in a row without a checkpoint after which a job has failed
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)  # train.py writes a checkpoint and leaves
LOG_TAIL_BYTES = 20_000  # of a log in which the reason of a failure is looked for
_TORCHRUN_VARIABLES = (*processes.PLACE, "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def is_old(code: Path) -> bool:
    """Whether a frozen copy of the code is from version 0.1.0, where this module had another name."""
    return (code / "src" / Path(*OLD_MODULE.split("."))).with_suffix(".py").exists()


def start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    """The runner of a job as a process, with the code that was frozen for it.

    Args:
        job: submitted to this machine.
        environment: variables beside those of this process.
    """
    code = Path(job.description["code"])
    return subprocess.Popen(
        [sys.executable, "-m", OLD_MODULE if is_old(code) else MODULE, str(job.folder), repr(job.submitted)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment, "PYTHONPATH": python_path(code / "src")},
        start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which passes it on once
    )


def run(
    job: Job,
    submitted: float,
    environment: Mapping[str, str] | None = None,
    slurm_id: str | None = None,
    failure: Callable[[], str] = lambda: "",
) -> JobState:
    """Run a job until its training ends; returns the state that was written.

    A stop signal to this process is passed on; the state is then INTERRUPTED, and the caller decides whether the job is
    restarted. A job that is finished, or that another runner runs, is left alone.

    Args:
        job: its folder has config.yaml and point.json.
        submitted: time of the submission, unix seconds, as in sweep.json; stalled starts are counted per submission.
        environment: variables for the training beside those of this process.
        slurm_id: of the SLURM job that this process belongs to, if any.
        failure: polled while the training runs; returns why it has to be killed, or an empty string.
    """
    try:
        held = job.lock.acquire(timeout=RUNNER_LOCK_SECONDS)
    except Timeout:
        return job.state
    with held:
        before = job.state
        if before.state == "FINISHED":
            return before
        state = _started(job, before, submitted, slurm_id)
        job.write(state)
        if state.state == "FAILED":
            return state
        # This machine may have another cache folder than that where the job was launched.
        with contextlib.suppress(BadInput):  # the training reports it
            uris.trust(foreign.load(job.folder / "config.yaml").get("tracking", {}).get("uri"))
        name, reason = _run_training(job, environment or {}, failure)
        metrics = job.metrics()
        step = int(metrics[-1]["step"]) if metrics else 0
        state = replace(state, state=name, reason=reason, ended=time.time(), step=step)
        job.write(state)
        return state


def _started(job: Job, before: JobState, submitted: float, slurm_id: str | None) -> JobState:
    """The state at a start: RUNNING, or FAILED if too many starts before it wrote no checkpoint."""
    checkpoint, restarted = job.checkpoint(), before.submitted == submitted and before.starts > 0
    stalled = before.stalled + 1 if restarted and checkpoint == before.checkpoint else 0
    state = JobState(
        state="RUNNING",
        slurm_id=slurm_id,
        node=node(),
        submitted=submitted,
        started=time.time(),
        starts=before.starts + 1,
        stalled=stalled,
        checkpoint=checkpoint,
        step=before.step,
    )
    if stalled < MAX_STALLED_STARTS:
        return state
    reason = (
        f"{MAX_STALLED_STARTS} starts in a row ended before they wrote a checkpoint; give it more time (the launcher's "
        "timeout_min) or write checkpoints more often (runtime.checkpoint_seconds at ends of epochs, runtime.checkpoint_minutes "
        "within them)"
    )
    return replace(state, state="FAILED", ended=time.time(), starts=before.starts, reason=reason)


def _run_training(job: Job, environment: Mapping[str, str], failure: Callable[[], str]) -> tuple[StateName, str]:
    """Run the training of a job, or process 0 of it; returns state and reason of the job, as result.json has them."""
    begun = time.time()
    name, reason = train(job, LOG, environment, failure)
    result = job.result
    if result.get("state") == "finished":
        return "FINISHED", ""
    if failed := failure():
        return "FAILED", failed
    if name == "FINISHED":
        return "FAILED", "train.py ended without a result"
    if name == "FAILED" and result.get("reason") and (job.folder / "result.json").stat().st_mtime >= begun:
        return name, str(result["reason"])
    return name, reason


def train(
    job: Job, log: str, environment: Mapping[str, str], failure: Callable[[], str] = lambda: ""
) -> tuple[StateName, str]:
    """Run train.py for a job, with the configuration and the code that were frozen for it; stop signals are passed on to it.

    Args:
        job: which is trained.
        log: name of the file in its folder that gets the output.
        environment: variables beside those of this process.
        failure: polled; returns why the training has to be killed, or an empty string.

    Returns:
        State and reason by the exit code of this training alone; a job of several processes has a training in each.
    """
    description, child, early, passed_on = job.description, None, 0, False
    code = Path(description["code"])
    inherited = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_VARIABLES}

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal early, passed_on
        if passed_on:  # the first only: a second SIGINT would end the training without a checkpoint
            return
        passed_on = True
        if child:
            child.send_signal(number)
        else:
            early = number

    with (job.folder / log).open("a") as file:
        file.write(f"--- {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        begin, oom_kills = file.tell(), _oom_kills()
        # Before the child exists, so that no signal is lost.
        handlers = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
        child = subprocess.Popen(
            [sys.executable, str(code / "train.py"), *train_arguments(job.folder)],
            cwd=description["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**inherited, "PYTHONPATH": python_path(code / "src"), **environment},
            preexec_fn=_stop_with_parent,
        )
    try:
        if early:
            child.send_signal(early)
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)
            if failure():
                child.kill()
    finally:
        child.kill()
        child.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return _end(child.returncode, _oom_kills() > oom_kills, job.folder / log, begin)


def _end(exit_code: int, out_of_memory: bool, log: Path, begin: int) -> tuple[StateName, str]:
    """State and reason of a training with this exit code, whose output begins at this byte of its log."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if exit_code == 0:
        return "FINISHED", ""
    if number in STOP_SIGNALS:
        return "INTERRUPTED", f"stopped by {signal.Signals(number).name}"
    if number > 0 and out_of_memory:
        return "OUT_OF_MEMORY", "killed because the memory of the SLURM job was used up"
    if number > 0:
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        hint = "; the kernel does that when memory is used up" if number == signal.SIGKILL else ""
        return "FAILED", f"killed by {name}{hint}"
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - LOG_TAIL_BYTES))
        output = file.read().decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "FAILED", [f"exit code {exit_code}", *lines, *errors][-1]


def train_arguments(folder: Path) -> list[str]:
    """Arguments of train.py for the configuration in a run folder."""
    return [
        f"--config-path={folder}",
        "--config-name=config",
        "hydra.run.dir=" + "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
    ]


def node() -> str:
    """The name of this machine, for SLURM's jobs as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME", platform.node())


def _stop_with_parent() -> None:
    """In a child process: ask for SIGTERM when the parent is killed, to end with a checkpoint instead of going on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _oom_kills() -> int:
    """Number of processes of this control group that were killed for lack of memory; 0 if that is not counted."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))


def main() -> int:
    """`python -m twoviews.sweeps.runner <folder> <submitted>`, as launchers of this machine start it."""
    _stop_with_parent()
    state = run(Job(Path(sys.argv[1]), {}), float(sys.argv[2]))
    return 0 if state.state == "FINISHED" else 1


if __name__ == "__main__":
    sys.exit(main())
