"""The supervisor of a point: starts the training as a process of its own and writes down what became of it.

Signals of schedulers end here: they are passed on to the training, which stops with a checkpoint, and the exit code
of the training becomes the state of the point. No torch is imported, so that this takes no time and little memory.
"""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

from filelock import Timeout

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.sweeps.folder import Name, Point, State
from twoviews.tracking import uris

PREDECESSOR_S = 60.0  # a supervisor before this one may still be dying
STALLED = 3  # starts in a row without a checkpoint after which a point is given up
STOPS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)  # what train.py takes as "save and leave"
LOG = "log.txt"
_PR_SET_PDEATHSIG = 1  # prctl(2)


def supervise(
    point: Point,
    submitted: float,
    environment: Mapping[str, str] | None = None,
    job: str | None = None,
    failing: Callable[[], str] = lambda: "",
) -> State:
    """Run a point until its training ends, and return the state that was written.

    A stop signal to this process is passed on; the state is then INTERRUPTED, and whoever called decides whether the
    point goes on. A point that is finished, or that another supervisor runs, is left alone.

    Args:
        point: its folder has config.yaml and point.json.
        submitted: when this point was submitted, unix seconds, as in sweep.json; a new number counts stalls anew.
        environment: variables of the training beside those of this process.
        job: SLURM's.
        failing: asked all the time: why the training has to be ended, or an empty string.
    """
    lock = point.lock
    try:
        lock.acquire(timeout=PREDECESSOR_S)
    except Timeout:
        return point.state
    try:
        before = point.state
        if before.state == "FINISHED":
            return before
        state = _begun(point, before, submitted, job)
        point.write(state)
        if state.state == "FAILED":
            return state
        # What is supervised was launched by somebody, perhaps on a machine with another cache folder.
        with contextlib.suppress(BadInput):  # which the training says
            uris.trust(foreign.load(point.folder / "config.yaml").get("tracking", {}).get("uri"))
        with Training(point, LOG, environment or {}) as training:
            training.wait(failing)
        verdict, reason = training.verdict(failing())
        metrics = point.metrics()
        step = int(metrics[-1]["step"]) if metrics else 0
        state = replace(state, state=verdict, reason=reason, ended=time.time(), step=step)
        point.write(state)
    finally:
        lock.release()
    return state


def _begun(point: Point, before: State, submitted: float, job: str | None) -> State:
    """The state at a start: running, or failed if the starts before this one led nowhere."""
    checkpoint, again = point.checkpoint(), before.submitted == submitted and before.starts > 0
    stalled = before.stalled + 1 if again and checkpoint == before.checkpoint else 0
    state = State(
        state="RUNNING",
        job=job,
        node=os.environ.get("SLURMD_NODENAME", platform.node()),
        submitted=submitted,
        started=time.time(),
        starts=before.starts + 1,
        stalled=stalled,
        checkpoint=checkpoint,
        step=before.step,
    )
    if stalled < STALLED:
        return state
    reason = (
        f"{STALLED} starts in a row ended before they wrote a checkpoint; give it more time (the launcher's timeout_min) "
        "or write checkpoints more often (runtime.checkpoint_seconds at ends of epochs, runtime.checkpoint_minutes within them)"
    )
    return replace(state, state="FAILED", ended=time.time(), starts=before.starts, reason=reason)


class Training:
    """The training of a point as a child process; a context in which stop signals are passed on to it.

    Args:
        point: what is trained, from the configuration and the code that were frozen for it.
        log: the file in its folder that gets what the training prints.
        environment: variables beside those of this process.
    """

    def __init__(self, point: Point, log: str, environment: Mapping[str, str]):
        self._point, self._environment, self._log = point, environment, point.folder / log
        self._started = time.time()
        self._stopped, self._before, self._kills = 0, {}, _oom_kills()

    def __enter__(self) -> "Training":
        description = self._point.description
        code = Path(description["code"])
        alone = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        paths = [str(code / "src"), *filter(None, [alone.get("PYTHONPATH")])]
        environment = {**alone, "PYTHONPATH": os.pathsep.join(paths), **self._environment}
        with self._log.open("a") as log:
            log.write(f"--- {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            log.flush()
            self._begin = log.tell()
            self._waiting: list[int] = []
            for number in STOPS:  # from here on none is lost: what comes before the child is there is kept for it
                self._before[number] = signal.signal(number, self._pass_on)
            self._child: subprocess.Popen | None = None
            self._child = subprocess.Popen(
                [sys.executable, str(code / "train.py"), *arguments(self._point.folder)],
                cwd=description["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=_die_with_parent,
            )
        for number in self._waiting:
            self._child.send_signal(number)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        # One is enough: a second SIGINT would end the training without a checkpoint.
        if not self._stopped:
            self._stopped = number
            if self._child:
                self._child.send_signal(number)
            else:
                self._waiting.append(number)

    def wait(self, failing: Callable[[], str]) -> None:
        """Return when the training has ended, by itself or because it has to."""
        assert self._child
        while True:
            try:
                self._child.wait(0.5)
                return
            except subprocess.TimeoutExpired:
                if failing():
                    self._child.kill()

    def verdict(self, failing: str) -> tuple[Name, str]:
        """State and reason of the point, from what process 0 wrote and how it ended."""
        result = self._point.result
        if result.get("state") == "finished":
            return "FINISHED", ""
        if failing:
            return "FAILED", failing
        state, reason = self.ended()
        if state == "FINISHED":
            return "FAILED", "train.py ended without a result"
        written = (self._point.folder / "result.json").stat().st_mtime if result else 0.0
        if state == "FAILED" and written >= self._started and result.get("reason"):
            return state, str(result["reason"])
        return state, reason

    def ended(self) -> tuple[Name, str]:
        """State and reason that follow from how this process ended, whatever the others did."""
        assert self._child and self._child.returncode is not None
        code = self._child.returncode
        number = -code if code < 0 else code - 128
        if code == 0:
            return "FINISHED", ""
        if number in STOPS:
            return "INTERRUPTED", f"stopped by {signal.Signals(number).name}"
        if number > 0:
            if _oom_kills() > self._kills:
                return "OUT_OF_MEMORY", "killed because the memory of the job was used up"
            name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
            hint = "; the kernel does that when memory is used up" if number == signal.SIGKILL else ""
            return "FAILED", f"killed by {name}{hint}"
        lines = [line.strip() for line in self._said().splitlines() if line.strip()]
        sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return "FAILED", sentences[-1] if sentences else lines[-1] if lines else f"exit code {code}"

    def _said(self) -> str:
        """The end of what this start printed."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - 20_000))
            return file.read().decode(errors="replace")


_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def arguments(folder: Path) -> list[str]:
    """Of train.py, for the configuration frozen in the run folder."""
    return [
        f"--config-path={folder}",
        "--config-name=config",
        "hydra.run.dir=" + "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
    ]


def _die_with_parent() -> None:
    """In the child: end with a checkpoint when the supervisor is killed, instead of training on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _oom_kills() -> int:
    """How many processes of this control group were killed for memory; 0 where nobody counts."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))


def main() -> int:
    """`python -m twoviews.sweeps.supervise <folder> <submitted>`: for a dispatch of this machine."""
    assert threading.current_thread() is threading.main_thread()
    _die_with_parent()
    folder, submitted = Path(sys.argv[1]), float(sys.argv[2])
    state = supervise(Point(folder, {}), submitted)
    return 0 if state.state == "FINISHED" else 1


if __name__ == "__main__":
    sys.exit(main())
