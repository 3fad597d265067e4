"""SLURM's commands: the states of its jobs, and requeueing and cancelling them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twoviews.errors import BadInput

ANSWER_SECONDS = 60.0  # longest wait for one of the commands
USUAL_ARRAY_SIZE = 1001  # MaxArraySize unless a cluster sets another
IDS_PER_CALL = 500  # of arrays and single jobs, far below the longest command line

# States of SLURM jobs, by what the job of the sweep does meanwhile.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class SlurmState:
    """The state of a SLURM job.

    Args:
        state: as squeue and sacct write it in full, such as NODE_FAIL.
        node: one or several; empty before the job ran.
        reason: why the job waits, or its exit code.
    """

    state: str
    node: str = ""
    reason: str = ""


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


def command_folders() -> list[str]:
    """Folders with SLURM's commands on this machine, for jobs whose PATH lacks them."""
    paths = (shutil.which(command) for command in ("srun", "squeue", "scontrol"))
    return [*dict.fromkeys(str(Path(path).parent) for path in paths if path)]


def max_array_size() -> int:
    """The largest number of tasks in an array on this cluster (MaxArraySize)."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config").stdout, re.MULTILINE)
    return max(1, int(match[1]) if match else USUAL_ARRAY_SIZE)


def queue(slurm_ids: Sequence[str]) -> Mapping[str, SlurmState] | None:
    """States by id from squeue, also of jobs that ended a short time ago; None if the controller does not answer."""
    states: dict[str, SlurmState] = {}
    for ids in _batches(slurm_ids):
        done = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={ids}")
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        for line in done.stdout.splitlines():
            slurm_id, state, node, reason = line.strip().split("|", 3)
            states[slurm_id] = SlurmState(state, node, "" if reason == "None" else reason)
    return states


def accounting(slurm_ids: Sequence[str]) -> Mapping[str, SlurmState]:
    """States by id from sacct; empty on a cluster without accounting."""
    states: dict[str, SlurmState] = {}
    for ids in _batches(slurm_ids) if shutil.which("sacct") else ():
        done = _run("sacct", "-X", "-n", "-P", "--format=JobID,State,NodeList,ExitCode", "-j", ids)
        for line in done.stdout.splitlines():
            slurm_id, state, node, code = line.strip().split("|", 3)
            # The state may be followed by other words, as in "CANCELLED by 1000".
            node = "" if node.startswith("None") else node
            states[slurm_id] = SlurmState(state.split()[0], node, f"exit code {code}")
    return states


def requeue(slurm_id: str) -> bool:
    """Put a running SLURM job back into the queue; returns whether SLURM accepted."""
    return _run("scontrol", "requeue", slurm_id).returncode == 0


def cancel(slurm_ids: Sequence[str]) -> None:
    """Cancel SLURM jobs; those that ended are left as they are.

    Raises:
        BadInput: SLURM does not answer.
    """
    for start in range(0, len(slurm_ids), IDS_PER_CALL):
        done = _run("scancel", "--quiet", *slurm_ids[start : start + IDS_PER_CALL])
        if done.returncode and "Invalid job id" not in done.stderr:
            raise BadInput(f"scancel refused: {done.stderr.strip()}")


def own_id() -> str | None:
    """The id of the SLURM job that this process belongs to, as 12_3 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _batches(slurm_ids: Sequence[str]) -> Iterator[str]:
    """Comma-separated ids for one call each; an array is named once, not by its tasks."""
    names = sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids})
    for start in range(0, len(names), IDS_PER_CALL):
        yield ",".join(names[start : start + IDS_PER_CALL])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
