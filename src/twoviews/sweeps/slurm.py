"""The jobs of a sweep as an array of SLURM jobs, submitted by submitit.

A job runs a supervisor, not the training: SLURM's signals come to both, and the supervisor alone talks to SLURM. With
several tasks a job each task has a supervisor and a training process of its own; that of process 0 writes the state.
"""

import contextlib
import io
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

from twoviews.console import Console
from twoviews.errors import BadInput
from twoviews.ranges import Count, Index, Length
from twoviews.sweeps import slurm_commands
from twoviews.sweeps.folder import Job, JobState, Sweep
from twoviews.sweeps.formatting import counted
from twoviews.sweeps.job_status import AGAIN, status
from twoviews.sweeps.launcher import Launcher, alone
from twoviews.sweeps.supervise import STOPS, Training, supervise

# What sbatch says where a user, an account or the cluster may have no more jobs (MaxSubmitJobs, MaxJobCount).
FULL = re.compile(r"SubmitJob\w*Limit|job submit limit|temporarily un|limit on the number of jobs", re.IGNORECASE)
ROOM_S = 30.0  # between two tries to submit what there was no room for
# Options of sbatch that the keys of the launcher set, by the key, and those that would break the array.
KEYS = {
    **{"time": "timeout_min", "signal": "signal_delay_s", "cpus_per_task": "cpus_per_task", "mem": "mem_gb"},
    **{"gpus_per_node": "gpus_per_node", "partition": "partition", "account": "account", "nodes": "nodes"},
    **{"ntasks_per_node": "tasks_per_node"},
}
OURS = ("array", "error", "ntasks", "open_mode", "output", "wait", "wrap")
SIGNAL_EARLY_S = 60  # SLURM may send it so much earlier than told
PATIENCE_S = 600.0  # of a job whose controller does not answer when it wants to be requeued
MLFLOW_S = 120.0  # for it to take the end of a job or of the sweep
PARTNERS_S = 30.0  # in which process 0 writes down why another one died, before SLURM ends the job


class PointFailed(Exception):
    """The training failed; raised in the job so that SLURM says FAILED as well."""


class Slurm(Launcher):
    """Jobs as tasks of a job array.

    Args:
        timeout_min: time limit; a job that needs more is requeued and goes on from its checkpoint.
        signal_delay_s: seconds before the time limit at which it is told to stop; a quarter of short limits at most.
        array_parallelism: jobs that run at once, of each array, whose length the cluster limits, often to 1001.
        cpus_per_task: cores of each process.
        gpus_per_node: GPUs of each node; None for none.
        mem_gb: memory of each node; None: the cluster's default.
        partition: None: the cluster's default.
        account: None: the user's default.
        nodes: of one job.
        tasks_per_node: processes of one job on each node.
        setup: shell commands before the training, such as module load.
        options: any other option of sbatch, by name; false leaves one out.

    Raises:
        BadInput: an option is one that the launcher sets itself.
    """

    def __init__(
        self,
        timeout_min: Count,
        signal_delay_s: Count,
        array_parallelism: Count,
        cpus_per_task: Count,
        gpus_per_node: Index | None,
        mem_gb: Count | None,
        partition: str | None,
        account: str | None,
        nodes: Count,
        tasks_per_node: Count,
        setup: Annotated[Sequence[str], Length()],
        options: Mapping[str, str | int | bool],
    ):
        self.timeout_min, self.signal_delay_s, self.array_parallelism = timeout_min, signal_delay_s, array_parallelism
        self.cpus_per_task, self.gpus_per_node, self.mem_gb = cpus_per_task, gpus_per_node, mem_gb
        self.partition, self.account, self.nodes, self.tasks_per_node = partition, account, nodes, tasks_per_node
        self._console, self.setup = Console(), setup
        self.options = {name.replace("-", "_"): value for name, value in options.items()}
        for name in self.options:
            if name in KEYS:
                raise BadInput(
                    f"hydra.launcher.options.{name} is set by the launcher; use hydra.launcher.{KEYS[name]}."
                )
            if name in OURS:
                raise BadInput(f"hydra.launcher.options.{name} is set by the launcher; leave it out.")

    def free_slots(self) -> int:
        """Of each array."""
        return self.array_parallelism

    def processes(self) -> int:
        """Of each job, on all its nodes."""
        return self.nodes * self.tasks_per_node

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the jobs into SLURM's queue and return.

        Raises:
            BadInput: there is no SLURM here, or it refuses.
        """
        if not jobs:
            return
        slurm_commands.available()
        sweep = Sweep(jobs[0].folder.parent)
        with alone(sweep, self._console):
            now = status(jobs)  # another process may have submitted some meanwhile
            self._submit_all(sweep, [job for job in jobs if not _taken(now[job.digest])])

    def _submit_all(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """In as many arrays as it takes; what the cluster has no room for now waits here."""
        left, waits = list(jobs), False
        size = most = slurm_commands.largest_array()
        while left:
            some, when = left[:size], time.time()
            try:
                slurm_ids = self._submit(sweep, some, when)
            except BadInput as error:
                full = FULL.search(str(error))
                if full and len(some) > 1:
                    size = len(some) // 2
                elif full and len(left) < len(jobs):
                    if not waits:
                        self._console.say(
                            f"{counted(len(left), 'job')} wait here until there is room ({full[0]}); this command may be "
                            "stopped (Ctrl-C), and the same command goes on."
                        )
                    waits = True
                    time.sleep(ROOM_S)
                else:
                    sweep.refused([job.digest for job in left], str(error))
                    raise
                continue
            sweep.submitted(dict(zip((job.digest for job in some), slurm_ids, strict=True)), when)
            array = slurm_ids[0].partition("_")[0]
            self._console.say(f"submitted {counted(len(slurm_ids), 'job')} as job {array}: {self.describe()}")
            left, size, waits = left[len(some) :], min(most, 2 * size), False

    def describe(self) -> str:
        """What SLURM is asked for each job."""
        parts = [
            f"{counted(self.nodes, 'node')} with {counted(self.tasks_per_node, 'task')} each"
            if self.processes() > 1
            else "",
            f"{counted(self.cpus_per_task, 'core')} a process",
            f"{counted(self.gpus_per_node, 'GPU')} a node" if self.gpus_per_node else "",
            f"{self.mem_gb} GB" if self.mem_gb else "",
            f"{self.timeout_min} min at a time",
            f"{counted(self.array_parallelism, 'job')} at once",
            f"partition {self.partition}" if self.partition else "",
        ]
        return ", ".join(part for part in parts if part)

    def _submit(self, sweep: Sweep, jobs: Sequence[Job], when: float) -> list[str]:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        # Of its own for each try: what is left of one that was refused is removed.
        folder = sweep.folder / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(when))}-{jobs[0].digest}"
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
        executor.update_parameters(**self._parameters(sweep, jobs))
        try:
            # What sbatch says is in the error too: submitit prints it on its own.
            with _outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):
                slurm_jobs = executor.map_array(run_point, [str(job.folder) for job in jobs], [when] * len(jobs))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            said = [line.rpartition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
            raise BadInput(
                f"sbatch refused: {'; '.join(dict.fromkeys(said)) or error}; with other values of hydra.launcher, or later, "
                "the same command goes on."
            ) from error
        return [slurm_job.job_id for slurm_job in slurm_jobs]

    def _parameters(self, sweep: Sweep, jobs: Sequence[Job]) -> dict[str, object]:
        code = Path(jobs[0].description["code"])
        setup = [
            # With options.export, SLURM would give the processes of a job as little as the job itself.
            "export SLURM_EXPORT_ENV=ALL",
            f"export PATH=${{PATH:+$PATH:}}{shlex.quote(os.pathsep.join(slurm_commands.folders()))}",
            f"export PYTHONPATH={shlex.quote(str(code / 'src'))}${{PYTHONPATH:+:$PYTHONPATH}}",
            # srun does not inherit it from sbatch since SLURM 22.05.
            f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}",
            f"export OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', self.cpus_per_task)}",
            # Without this the other processes of a job wait in a collective for one that died.
            "export SLURM_KILL_BAD_EXIT=1",
            *self.setup,
        ]
        asked = {
            "gpus_per_node": self.gpus_per_node or None,
            "mem": f"{self.mem_gb}GB" if self.mem_gb else None,
            "partition": self.partition,
            "account": self.account,
        }
        return {
            "job_name": sweep.name,
            "time": self.timeout_min,
            "signal_delay_s": self._signal_delay_s(),
            "array_parallelism": self.array_parallelism,
            "cpus_per_task": self.cpus_per_task,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "setup": setup,
            "additional_parameters": {
                key: value for key, value in {"requeue": True, **self.options}.items() if value is not False
            },
            **{key: value for key, value in asked.items() if value is not None},
        }

    def _signal_delay_s(self) -> int:
        """So early that a checkpoint can be written, so late that most of a short limit is used."""
        return min(self.signal_delay_s, self.timeout_min * 60 // 4)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take these jobs out of the queue; those that run get a moment for a checkpoint.

        Raises:
            BadInput: SLURM does not answer.
        """
        cancel_jobs(jobs)


def cancel_jobs(jobs: Sequence[Job]) -> None:
    """Cancel the jobs of those of these jobs that have one.

    Raises:
        BadInput: SLURM does not answer.
    """
    slurm_ids = {job.digest: job.slurm_id for job in jobs if job.slurm_id}
    if slurm_ids:
        slurm_commands.available()
        Sweep(jobs[0].folder.parent).cancelled([*slurm_ids])
        slurm_commands.cancel([*slurm_ids.values()])


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """As in a shell of the login node: a job that submits must not hand its own place on to the new ones."""
    import submitit

    conf = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with submitit.helpers.clean_env():
        os.environ.update(conf)
        yield


def _taken(state: JobState) -> bool:
    """Whether a job needs no job, or has one."""
    return state.done or state.state == "RUNNING" or (state.state == "QUEUED" and state.slurm_id is not None)


# ------------------------------------------------------------------------------------------------------- in the job


class _Told:
    """Handlers of a job for the time when no training runs; submitit's own would requeue or end it in the middle."""

    def __init__(self) -> None:
        self.number = 0
        for one in STOPS:
            signal.signal(one, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def wait(self, seconds: float) -> None:
        """Until the next signal, or so long."""
        self.number, end = 0, time.monotonic() + seconds
        while not self.number and time.monotonic() < end:
            time.sleep(0.1)


def run_point(folder: str, submitted: float) -> str:
    """What a job does, in each of its tasks; returns the state of the job.

    Raises:
        PointFailed: the training failed.
    """
    told, job = _Told(), Job(Path(folder), {})
    rank, tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    partners = _Partners(job, rank)
    environment = _rendezvous(tasks) if tasks > 1 else {}
    if rank > 0:
        return _follow(job, partners, environment, told)
    slurm_id = slurm_commands.this_job()
    state = supervise(job, submitted, environment, slurm_id, partners.failing)
    if state.state == "INTERRUPTED" and slurm_id:
        _requeue(job, state, slurm_id, told)
    _tell_mlflow(job)
    if state.state in ("FAILED", "OUT_OF_MEMORY"):
        raise PointFailed(state.reason)
    if state.state != "FINISHED" and tasks > 1:
        raise PointFailed("another job runs this job")  # or the other processes would wait for this one
    return state.state


def _requeue(job: Job, state: JobState, slurm_id: str, told: _Told) -> None:
    """Back into the queue, unless SLURM was faster or is ending the job for good. Does not return."""
    missing = [command for command in ("scontrol", "squeue") if not shutil.which(command)]
    if missing:
        reason = f"{state.reason}, and {_node()} has no {missing[0]} that would put it back into the queue; {AGAIN}"
        job.write(replace(state, reason=reason))
        os._exit(1)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        known = slurm_commands.queue([slurm_id])
        if known is None:  # the controller does not answer
            told.wait(5)
            continue
        said = known.get(slurm_id)
        if said is None or said.state != "RUNNING":  # requeued or cancelled by others
            os._exit(0)
        # Before it is asked: SLURM kills this process at any moment after that.
        job.write(replace(state, state="QUEUED", reason=f"requeued, {state.reason}"))
        if not slurm_commands.requeue(slurm_id):
            # Leaving now would end the job before SLURM has put it back.
            told.wait(120)
            os._exit(0)
        told.wait(2)
    job.write(state)
    os._exit(1)


def _tell_mlflow(job: Job) -> None:
    """How a job ended whose training could not say so itself, and how the sweep ended after the last that was active.

    What fails here is done by `python -m twoviews.sweep collect`.
    """
    sweep = Sweep(job.folder.parent)
    if not sweep.record["parent"]:
        return
    if not any(state.active for state in status(sweep.jobs).values()):
        command = ["twoviews.sweep", "collect", str(sweep.folder)]
    elif not job.result:
        command = ["twoviews.tracking", "sync", str(job.folder)]
    else:
        return
    with (sweep.folder / "slurm" / "mlflow.log").open("a") as log, contextlib.suppress(subprocess.TimeoutExpired):
        words = [sys.executable, "-m", *command]
        subprocess.run(words, stdout=log, stderr=log, timeout=MLFLOW_S, preexec_fn=_ignore_stops)


def _ignore_stops() -> None:
    """In a child: what SLURM sends before a time limit comes to all processes of a job, and would end this one."""
    for one in STOPS:
        signal.signal(one, signal.SIG_IGN)


class _Partners:
    """The tasks of a job tell process 0 by files why they died: a process that waits in a collective notices nothing."""

    def __init__(self, job: Job, rank: int):
        start = os.environ.get("SLURM_RESTART_COUNT") or "0"
        self._folder, self._rank = job.folder, rank
        self._name = f".dead-{slurm_commands.this_job()}-{start}"

    def failing(self) -> str:
        """Why the job cannot go on, or an empty string."""
        found = sorted(self._folder.glob(f"{self._name}-*"))
        return found[0].read_text() if found else ""

    def died(self, reason: str) -> None:
        """Tell it."""
        part = self._folder / f"{self._name.replace('dead', 'dying')}-{self._rank}"
        part.write_text(f"process {self._rank} on {_node()}: {reason}")
        part.rename(self._folder / f"{self._name}-{self._rank}")


def _follow(job: Job, partners: _Partners, environment: Mapping[str, str], told: _Told) -> str:
    """A process other than 0: train, and tell process 0 if that goes wrong."""
    if job.state.state == "FINISHED":
        return "FINISHED"
    rank = int(environment["RANK"])
    with Training(job, f"log.{rank}.txt", environment) as training:
        training.wait(lambda: "")
    state, reason = training.ended()
    if state == "FAILED":
        partners.died(reason)
        told.wait(PARTNERS_S)
        raise PointFailed(reason)
    if state == "INTERRUPTED":
        told.wait(PATIENCE_S)  # process 0 requeues
        os._exit(0)
    return state


def _rendezvous(tasks: int) -> dict[str, str]:
    """The variables by which torch.distributed finds the other processes of this job."""
    import submitit

    job_environment = submitit.JobEnvironment()
    slurm_id, start = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {
        "MASTER_ADDR": job_environment.hostnames[0],
        # Below the ports that systems give out by themselves; another one after a requeue, whose predecessor may linger.
        "MASTER_PORT": str(20000 + (slurm_id * 7 + start) % 12000),
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // job_environment.num_nodes),
    }


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", platform.node())
