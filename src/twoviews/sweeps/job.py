"""The jobs of a sweep: their specification, their run folders and their states.

A job is one run of a sweep. Its folder is a run folder with point.json, which describes it, and state.json. Jobs were called
points once: the files keep that name, and `job` in them is the id of a SLURM job.
Nothing here needs torch, Hydra, MLflow or SLURM.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from twoviews import foreign
from twoviews.files import write_atomic
from twoviews.signatures import complaint
from twoviews.sweeps.formatting import text
from twoviews.tracking.metrics import read

SEED = "seed"  # the key of the parameter that is not searched for
LOG = "log.txt"  # in the folder of a job: what its training printed
# Keys of state.json and sweep.json by attribute, where the names differ.
KEYS = {"slurm_id": "job"}
ATTRIBUTES = {key: name for name, key in KEYS.items()}

StateName = Literal[
    "QUEUED",  # not started, or back in SLURM's queue
    "RUNNING",
    "FINISHED",
    "FAILED",  # in training, or because it made no progress, or because the scheduler refused it
    "INTERRUPTED",  # stopped with a checkpoint, and nothing restarts it automatically
    "TIMEOUT",  # this and the next four as SLURM calls them
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "CANCELLED",
    "LOST",  # the process that should run it is gone
    "PRUNED",  # stopped by a search for good
]


@dataclass(frozen=True)
class JobState:
    """The state of a job. Times are unix seconds."""

    state: StateName = "QUEUED"
    slurm_id: str | None = None  # of the SLURM job that runs it, as 12_3 for a task of an array
    node: str | None = None
    submitted: float = 0.0  # the submission that this state belongs to, as in sweep.json
    started: float | None = None  # of the last start
    ended: float | None = None
    starts: int = 0  # of the training, over all submissions
    stalled: int = 0  # starts in a row that wrote no checkpoint
    checkpoint: int = 0  # when last.pt was written, in ns, as seen by the last start; 0 without one
    step: int = 0  # optimizer steps that metrics.jsonl has
    reason: str = ""  # of this state, as a sentence

    @property
    def active(self) -> bool:
        """Whether the job is queued or running."""
        return self.state in ("QUEUED", "RUNNING")

    @property
    def done(self) -> bool:
        """Whether there is nothing left to run: the job has a result, or none is wanted any more."""
        return self.state in ("FINISHED", "PRUNED")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        folder: the run folder; its name is the digest of the configuration.
        axes: swept values by dotted key, and swept choices by group.
        slurm_id: of the SLURM job that was submitted for it last; None where it was not SLURM.
        submitted: time of the last submission, unix seconds; 0 if never.
        cancelled: time of the last cancellation, unix seconds; 0 if never.
        given_up: why a search stopped it for good; empty if none did.
        refused: why the scheduler refused the last submission; empty if it did not.
    """

    folder: Path
    axes: Mapping[str, Any]
    slurm_id: str | None = None
    submitted: float = 0.0
    cancelled: float = 0.0
    given_up: str = ""
    refused: str = ""

    @property
    def digest(self) -> str:
        """Eight hex digits that follow from the resolved configuration."""
        return self.folder.name

    @property
    def label(self) -> str:
        """The swept values as they are typed, or the digest if nothing was swept."""
        return " ".join(f"{key}={text(value)}" for key, value in self.axes.items()) or self.digest

    @property
    def description(self) -> dict[str, Any]:
        """The content of point.json."""
        return foreign.load(self.folder / "point.json", needed=True)

    @property
    def state(self) -> JobState:
        """The state that the runner wrote last, QUEUED before that; `job_status.status` compares it with the scheduler."""
        known, path = {field.name for field in fields(JobState)}, self.folder / "state.json"
        content = {ATTRIBUTES.get(key, key): value for key, value in foreign.load(path).items()}
        if content and (wrong := complaint(content["state"], StateName)):
            raise foreign.damaged(path, f"state={content['state']} {wrong}")
        return JobState(**{key: value for key, value in content.items() if key in known})

    def write(self, state: JobState) -> None:
        """Replace state.json; only for the runner that holds `lock`."""
        content = {KEYS.get(name, name): value for name, value in asdict(state).items()}
        write_atomic(self.folder / "state.json", json.dumps(content, indent=1) + "\n")

    @property
    def lock(self) -> FileLock:
        """The lock that the runner holds; the system releases it however that process ends."""
        return FileLock(self.folder / ".supervisor.lock")

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json; empty until the training ended."""
        return foreign.load(self.folder / "result.json")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return list(read(self.folder))

    def checkpoint(self) -> int:
        """Time of the last checkpoint, in ns since 1970; 0 without one."""
        try:
            return (self.folder / "last.pt").stat().st_mtime_ns
        except FileNotFoundError:
            return 0


@dataclass(frozen=True)
class JobSpec:
    """A job that has no folder yet.

    Args:
        digest: of the configuration.
        axes: swept values by dotted key, and swept choices by group.
        overrides: the command line that describes it.
        config: the resolved configuration as YAML.
        more: other content of point.json: choices of groups, working directory, code.
    """

    digest: str
    axes: Mapping[str, Any]
    overrides: Sequence[str]
    config: str
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The swept values as they are typed; empty if nothing was swept."""
        return " ".join(f"{key}={text(value)}" for key, value in self.axes.items())
