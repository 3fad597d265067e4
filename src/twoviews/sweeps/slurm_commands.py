"""SLURM's commands: what it says about jobs, and what it is asked to do with them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twoviews.errors import BadInput

ANSWER_S = 60.0  # longest wait for one of its commands
USUAL_ARRAY = 1001  # MaxArraySize unless a cluster says otherwise
IDS_A_CALL = 500  # of arrays and single jobs, far below the longest command line

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class Said:
    """What SLURM says about a job.

    Args:
        state: as squeue and sacct write it in full, such as NODE_FAIL.
        node: or several; empty before it ran.
        reason: why it waits, or the exit code.
    """

    state: str
    node: str = ""
    reason: str = ""


def available() -> None:
    """Raise BadInput where there is no SLURM.

    Raises:
        BadInput: its commands are not there.
    """
    missing = [command for command in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(command)]
    if missing:
        raise BadInput(
            f"this machine has no SLURM ({' and '.join(missing)} not found); go to a login node, or use "
            "hydra/launcher=local or pool."
        )


def folders() -> list[str]:
    """Where this machine has SLURM's commands, for jobs in whose PATH they are not."""
    found = (shutil.which(command) for command in ("srun", "squeue", "scontrol"))
    return [*dict.fromkeys(str(Path(one).parent) for one in found if one)]


def largest_array() -> int:
    """How many tasks this cluster takes in an array (MaxArraySize)."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config").stdout, re.MULTILINE)
    return max(1, int(found[1]) if found else USUAL_ARRAY)


def queue(slurm_ids: Sequence[str]) -> Mapping[str, Said] | None:
    """What squeue knows of these jobs, ended ones too as long as it remembers; None while nobody answers."""
    found: dict[str, Said] = {}
    for some in _calls(slurm_ids):
        done = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={some}")
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        for line in done.stdout.splitlines():
            slurm_id, state, node, reason = line.strip().split("|", 3)
            found[slurm_id] = Said(state, node, "" if reason == "None" else reason)
    return found


def accounts(slurm_ids: Sequence[str]) -> Mapping[str, Said]:
    """What sacct knows of these jobs; nothing on a cluster without accounting."""
    found: dict[str, Said] = {}
    for some in _calls(slurm_ids) if shutil.which("sacct") else ():
        done = _run("sacct", "-X", "-n", "-P", "--format=JobID,JobState,NodeList,ExitCode", "-j", some)
        for line in done.stdout.splitlines():
            slurm_id, state, node, code = line.strip().split("|", 3)
            # "CANCELLED by 1000" and the like.
            found[slurm_id] = Said(state.split()[0], "" if node.startswith("None") else node, f"exit code {code}")
    return found


def requeue(slurm_id: str) -> str:
    """Put a running job back into the queue; an empty string, or why it could not be done."""
    done = _run("scontrol", "requeue", slurm_id)
    return "" if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"


def cancel(slurm_ids: Sequence[str]) -> None:
    """Cancel jobs, those that ended included.

    Raises:
        BadInput: SLURM does not answer.
    """
    for start in range(0, len(slurm_ids), IDS_A_CALL):
        done = _run("scancel", "--quiet", *slurm_ids[start : start + IDS_A_CALL])
        if done.returncode and "Invalid job id" not in done.stderr:
            raise BadInput(f"scancel refused: {done.stderr.strip()}")


def this_job() -> str | None:
    """The id of the job that this process belongs to, as 12_3 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _calls(slurm_ids: Sequence[str]) -> Iterator[str]:
    """Ids for one command each; of an array only its own, once."""
    names = sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids})
    for start in range(0, len(names), IDS_A_CALL):
        yield ",".join(names[start : start + IDS_A_CALL])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
