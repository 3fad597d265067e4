"""The launcher that submits jobs to SLURM as tasks of job arrays, by submitit. What then runs there is in slurm_job.py."""

import contextlib
import io
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from twoviews.console import Console
from twoviews.errors import BadInput, counted
from twoviews.ranges import Count, Length, NonNegativeInt
from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import Job
from twoviews.sweeps.job_states import IDS_PER_CALL, RESUME_HINT, run_slurm
from twoviews.sweeps.machine import Launcher, stop

# What sbatch prints if a user, an account or the cluster may have no more jobs (MaxSubmitJobs, MaxJobCount).
QUEUE_FULL = re.compile(r"SubmitJob\w*Limit|job submit limit|temporarily un|limit on the number of jobs", re.IGNORECASE)
RETRY_SECONDS = 30.0  # between two attempts to submit to a full queue
# Options of sbatch that parameters of the launcher set, by option, and options that would break the array.
PARAMETERS = {
    **{"time": "timeout_min", "signal": "signal_delay_s", "cpus_per_task": "cpus_per_task", "mem": "mem_gb"},
    **{"gpus_per_node": "gpus_per_node", "partition": "partition", "account": "account", "nodes": "nodes"},
    **{"ntasks_per_node": "tasks_per_node"},
}
RESERVED = ("array", "error", "ntasks", "open_mode", "output", "wait", "wrap")
USUAL_ARRAY_SIZE = 1001  # MaxArraySize unless a cluster sets another
JOB_FUNCTION = "twoviews.sweeps.slurm_job:run_job"
OLD_JOB_FUNCTION = "twoviews.sweeps.slurm:run_point"  # its name in the code of sweeps that version 0.1.0 launched


@dataclass
class Slurm(Launcher):
    """Jobs as tasks of SLURM job arrays; conf/hydra/launcher/slurm.yaml says what its parameters mean.

    Raises:
        BadInput: an option is one that the launcher sets itself.
    """

    timeout_min: Count
    signal_delay_s: Count
    array_parallelism: Count
    cpus_per_task: Count
    gpus_per_node: NonNegativeInt | None
    mem_gb: Count | None
    partition: str | None
    account: str | None
    nodes: Count
    tasks_per_node: Count
    setup: Annotated[Sequence[str], Length()]
    options: Mapping[str, str | int | bool]

    def __post_init__(self):
        self._console = Console()
        self.options = {name.replace("-", "_"): value for name, value in self.options.items()}
        for name in self.options:
            if name in (*PARAMETERS, *RESERVED):
                remedy = f"use {PARAMETERS[name]}=" if name in PARAMETERS else "leave it out"
                raise BadInput(f"options.{name}= is set by the launcher; {remedy}.")

    def capacity(self) -> int:
        """Number of jobs of each array that run at once."""
        return self.array_parallelism

    def processes(self) -> int:
        """Number of processes per job, on all its nodes."""
        return self.nodes * self.tasks_per_node

    def start(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Put the jobs into SLURM's queue, in as many arrays as it takes; waits here while the queue is full.

        Raises:
            BadInput: this machine has no SLURM, or it refuses.
        """
        require_slurm()
        left = list(jobs)
        size = max_size = max_array_size()
        while left:
            array, when = left[:size], time.time()
            try:
                slurm_ids = self._submit_array(sweep, array, when)
            except BadInput as error:
                full = QUEUE_FULL.search(str(error))
                if full and len(array) > 1:
                    size = len(array) // 2
                elif full and len(left) < len(jobs):
                    self._console.say_once(
                        f"waiting with {counted(len(left), 'job')} until the queue has room ({full[0]}); this command may "
                        f"be stopped (Ctrl-C), and {RESUME_HINT}."
                    )
                    time.sleep(RETRY_SECONDS)
                else:
                    sweep.mark({job.digest: {"refused": str(error)} for job in left})
                    raise
                continue
            ids = zip(array, slurm_ids, strict=True)
            sweep.mark({job.digest: submission(slurm_id, when) for job, slurm_id in ids})
            array_id = slurm_ids[0].partition("_")[0]
            self._console.say(f"submitted {counted(len(array), 'job')} as SLURM job {array_id}: {self.describe()}")
            left, size = left[len(array) :], min(max_size, 2 * size)

    def describe(self) -> str:
        """The resources that SLURM is asked for, per job."""
        nodes = f"{counted(self.nodes, 'node')} with {counted(self.tasks_per_node, 'task')} each"
        parts = {
            nodes: self.processes() > 1,
            f"{counted(self.cpus_per_task, 'core')} per process": True,
            f"{counted(self.gpus_per_node or 0, 'GPU')} per node": self.gpus_per_node,
            f"{self.mem_gb} GB": self.mem_gb,
            f"time limit {self.timeout_min} min": True,
            f"{counted(self.array_parallelism, 'job')} at once": True,
            f"partition {self.partition}": self.partition,
        }
        return ", ".join(part for part, asked in parts.items() if asked)

    def _submit_array(self, sweep: Sweep, jobs: Sequence[Job], when: float) -> list[str]:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        code = Path(jobs[0].description["code"])
        # Each attempt has a folder of its own, because the files of a refused one are removed.
        folder = sweep.folder / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(when))}-{jobs[0].digest}"
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
        executor.update_parameters(**self._parameters(sweep, code))
        function: Any = NamedFunction(OLD_JOB_FUNCTION if runner.is_old(code) else JOB_FUNCTION)
        conf = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
        try:
            # Without the variables of a surrounding SLURM job, which would be passed on to the submitted ones. submitit
            # prints the error of sbatch, which is in its exception too.
            with submitit.helpers.clean_env(), contextlib.redirect_stderr(io.StringIO()):
                os.environ.update(conf)
                slurm_jobs = executor.map_array(function, [str(job.folder) for job in jobs], [when] * len(jobs))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            errors = [line.rpartition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
            raise BadInput(
                f"sbatch refused: {'; '.join(dict.fromkeys(errors)) or error}; with other values of hydra.launcher, or later, "
                f"{RESUME_HINT}."
            ) from error
        return [slurm_job.job_id for slurm_job in slurm_jobs]

    def _parameters(self, sweep: Sweep, code: Path) -> dict[str, object]:
        """Parameters of submitit's executor."""
        commands = filter(None, map(shutil.which, ("srun", "squeue", "scontrol")))  # which the PATH of jobs may lack
        path = shlex.quote(os.pathsep.join(dict.fromkeys(str(Path(command).parent) for command in commands)))
        setup = [
            # Otherwise options.export, which limits the environment of a job, would limit that of its processes (srun) as well.
            "export SLURM_EXPORT_ENV=ALL",
            f"export PATH=${{PATH:+$PATH:}}{path}",
            f"export PYTHONPATH={shlex.quote(str(code / 'src'))}${{PYTHONPATH:+:$PYTHONPATH}}",
            # srun does not inherit it from sbatch since SLURM 22.05.
            f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}",
            f"export OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', self.cpus_per_task)}",
            # Without this the other processes of a job wait in a collective for one that died.
            "export SLURM_KILL_BAD_EXIT=1",
            *self.setup,
        ]
        options = {"requeue": True, **self.options}
        return {  # submitit leaves out what is None
            "job_name": sweep.name,
            "time": self.timeout_min,
            # Early enough to write a checkpoint, late enough to use most of a short limit.
            "signal_delay_s": min(self.signal_delay_s, self.timeout_min * 60 // 4),
            "array_parallelism": self.array_parallelism,
            "cpus_per_task": self.cpus_per_task,
            "gpus_per_node": self.gpus_per_node or None,
            "mem": f"{self.mem_gb}GB" if self.mem_gb else None,
            "partition": self.partition,
            "account": self.account,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "setup": setup,
            "additional_parameters": {key: value for key, value in options.items() if value is not False},
        }


def cancel(jobs: Sequence[Job]) -> None:
    """Ask these jobs to stop, with a checkpoint if they run; does not wait for their end.

    Raises:
        BadInput: SLURM does not answer.
    """
    stop([job for job in jobs if job.slurm_id is None])
    if not (on_slurm := [job for job in jobs if job.slurm_id]):
        return
    require_slurm()
    # SLURM keeps no record of tasks that are cancelled before they begin.
    Sweep(jobs[0].folder.parent).mark({job.digest: {"cancelled": time.time()} for job in on_slurm})
    for start in range(0, len(on_slurm), IDS_PER_CALL):
        slurm_ids = [str(job.slurm_id) for job in on_slurm[start : start + IDS_PER_CALL]]
        answer = run_slurm("scancel", "--quiet", *slurm_ids)
        if answer.returncode and "Invalid job id" not in answer.stderr:
            raise BadInput(f"scancel refused: {answer.stderr.strip()}")


def require_slurm() -> None:
    """Make sure that SLURM's commands are installed.

    Raises:
        BadInput: some are missing.
    """
    missing = [command for command in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(command)]
    if missing:
        raise BadInput(
            f"this machine has no SLURM ({' and '.join(missing)} not found); go to a login node, or use "
            "hydra/launcher=local or pool."
        )


def max_array_size() -> int:
    """The largest number of tasks in an array on this cluster (MaxArraySize)."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return max(1, int(match[1]) if match else USUAL_ARRAY_SIZE)


class NamedFunction:
    """A function that is pickled as its name, `module:function`, and looked up in the code that unpickles it."""

    def __init__(self, name: str):
        self._name = name

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pkgutil.resolve_name, (self._name,)
