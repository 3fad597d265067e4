"""The jobs of a sweep: their specification, their run folders, their states, and the parameters in which they differ.

A job is one run of a sweep. Its folder is a run folder with point.json, which describes it, and state.json. Jobs were called
points once: the files keep that name, and `job` in them is the id of a SLURM job.
Nothing here needs torch, Hydra, MLflow or SLURM.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from twoviews import foreign
from twoviews.config.digest import NOT_IN_DIGEST, without_unused
from twoviews.config.values import flat
from twoviews.errors import BadInput
from twoviews.files import write_atomic
from twoviews.signatures import mismatch
from twoviews.tracking.metrics import read

SEED = "seed"  # the key of the parameter that is not searched for
LOG = "log.txt"  # in the folder of a job: what its training printed

StateName = Literal[  # states that need attention first, which is their order in tables
    "FAILED",  # in training, or because it made no progress, or because the scheduler refused it
    "OUT_OF_MEMORY",  # this and the next four as SLURM calls them
    "NODE_FAIL",
    "TIMEOUT",
    "PREEMPTED",
    "CANCELLED",
    "LOST",  # the process that should run it is gone
    "INTERRUPTED",  # stopped with a checkpoint, and nothing restarts it automatically
    "RUNNING",
    "QUEUED",  # not started, or back in SLURM's queue
    "PRUNED",  # stopped by a search for good
    "FINISHED",
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
    def finished_or_pruned(self) -> bool:
        """Whether nothing is left to run: the job has a result, or a search wants none any more."""
        return self.state in ("FINISHED", "PRUNED")

    @property
    def ended_without_result(self) -> bool:
        """Whether the job stopped without the result that is wanted of it: the same command runs it again."""
        return not (self.active or self.finished_or_pruned)

    @property
    def needs_start(self) -> bool:
        """Whether a launcher has to start the job: it has ended without a result, or is queued without being in SLURM's queue."""
        return self.ended_without_result or (self.state == "QUEUED" and not self.slurm_id)


@dataclass(frozen=True)
class Job:
    """One run of a sweep, as sweep.json describes it."""

    folder: Path  # the run folder; its name is the digest of the configuration
    parameters: Mapping[str, Any]  # swept values by dotted key, and swept choices by group
    slurm_id: str | None = None  # of the SLURM job that was submitted for it last; None where it was not SLURM
    submitted: float = 0.0  # time of the last submission, unix seconds; 0 if never
    cancelled: float = 0.0  # time of the last cancellation, unix seconds; 0 if never
    given_up: str = ""  # why a search stopped it for good, after which it is PRUNED; empty if none did
    refused: str = ""  # why the scheduler refused the last submission; empty if it did not

    @property
    def digest(self) -> str:
        """Eight hex digits that follow from the resolved configuration."""
        return self.folder.name

    @property
    def label(self) -> str:
        """The swept values as they are typed, or the digest if nothing was swept."""
        return assigned(self.parameters) or self.digest

    @property
    def description(self) -> dict[str, Any]:
        """The content of point.json."""
        return foreign.load(self.folder / "point.json", needed=True)

    @property
    def state(self) -> JobState:
        """The state that the runner wrote last, QUEUED before that; `current_states` compares it with the scheduler."""
        names, path = {field.name for field in fields(JobState)}, self.folder / "state.json"
        content = foreign.load(path)
        if content and (wrong := mismatch(content["state"], StateName)):
            raise foreign.damaged(path, f"state={content['state']} {wrong}")
        content["slurm_id"] = content.get("job")
        return JobState(**{key: value for key, value in content.items() if key in names})

    def write(self, state: JobState) -> None:
        """Replace state.json; only for the runner that holds `lock`."""
        content = {"job" if name == "slurm_id" else name: value for name, value in asdict(state).items()}
        write_atomic(self.folder / "state.json", json.dumps(content, indent=1) + "\n")

    @property
    def lock(self) -> FileLock:
        """The lock that the runner holds; the system releases it however that process ends."""
        return FileLock(self.folder / ".supervisor.lock")

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json; empty until the training ended."""
        return foreign.load(self.folder / "result.json")

    def diverged_since(self, started: float | None) -> bool:
        """Whether a training that was started at that time (unix seconds) diverged, not one before it."""
        path = self.folder / "result.json"
        return bool(self.result.get("diverged")) and path.stat().st_mtime >= (started or 0)

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
    """A job that has no folder yet."""

    digest: str  # of the configuration
    parameters: Mapping[str, Any]  # swept values by dotted key, and swept choices by group
    overrides: Sequence[str]  # the command line that describes it
    config_yaml: str  # the resolved configuration
    details: Mapping[str, Any] = field(default_factory=dict)  # the rest of point.json: choices, working directory, code


def summary(states: Iterable[str]) -> str:
    """The number of jobs in each state, such as "1 FAILED, 3 FINISHED"."""
    return ", ".join(f"{count:,} {state}" for state, count in sorted(Counter(states).items()))


def text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def assigned(values: Mapping[str, Any], names: Mapping[str, str] | None = None, separator: str = " ") -> str:
    """The values as they are typed, such as "seed=1 method.temperature=0.1"; with other names for the keys if given."""
    return separator.join(f"{names[key] if names else key}={text(value)}" for key, value in values.items())


def typed(values: Mapping[str, Any], key: str) -> str:
    """The value of a key as it is typed; "-" if the configuration has no such key."""
    return text(values[key]) if key in values else "-"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole key where two end alike."""
    keys = list(keys)
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def with_varying_parameters(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, whose `parameters` have a value for every key in which the jobs differ, swept or not.

    A sweep may be launched again with other keys swept or other values fixed, to compare them. So these keys vary:

    - those that any launch swept,
    - those that a command fixed, if jobs differ in them,
    - any other key, such as a default that has changed, if two jobs would pass for the same config without it.

    A key that the configuration of a job lacks is not among its parameters.
    """
    descriptions = [job.description for job in jobs]
    if len(set(map(_launch_key, jobs, descriptions))) < 2:
        return list(jobs)  # they differ in swept values alone, and no configuration has to be read
    recorded = all("choices" in description for description in descriptions)  # which the first version did not do
    choices = [_choices(description) if recorded else {} for description in descriptions]
    values = [{**_values(job), **chosen, **job.parameters} for job, chosen in zip(jobs, choices, strict=True)]
    keys = [*dict.fromkeys(key for job in jobs for key in job.parameters)]
    fixed = dict.fromkeys(_key(override) for description in descriptions for override in description["overrides"])
    for key in (*fixed, SEED):
        if key not in keys and len({typed(job, key) for job in values if key in job}) > 1:
            keys.append(key)
    for key in dict.fromkeys(key for job in (*choices, *values) for key in job):
        if key not in keys and _distinguishes(key, values, [other for other in keys if other != SEED]):
            keys.append(key)
    return [
        replace(job, parameters={key: known[key] for key in keys if key in known})
        for job, known in zip(jobs, values, strict=True)
    ]


def _launch_key(job: Job, description: Mapping[str, Any]) -> tuple[object, ...]:
    """A key that is equal for jobs of one launch, whose configurations differ in swept values alone."""
    fixed = [override for override in description["overrides"] if _key(override) not in job.parameters]
    return tuple(job.parameters), tuple(fixed), description.get("code")


def _choices(description: Mapping[str, Any]) -> dict[str, Any]:
    """The file chosen in each group that can change the result of a job; null of version 0.1.0 is "none"."""
    choices = description["choices"].items()
    return {group: choice or "none" for group, choice in choices if not group.startswith(NOT_IN_DIGEST)}


def _values(job: Job) -> dict[str, Any]:
    """The values of a configuration that can change the result of a job, by dotted key."""
    path = job.folder / "config.yaml"
    # A node of the configuration is at the left margin; most are the same in all jobs, and parsed once.
    nodes = re.split(r"\n(?=\w)", foreign.text(path) or "{}")
    try:
        return without_unused({key: value for node in nodes for key, value in _leaves(node).items()})
    except BadInput:
        foreign.load(path)  # raises the same with the name of the file
        raise


@cache
def _leaves(node: str) -> dict[str, Any]:
    values = flat(foreign.parse(node, Path("config.yaml")))
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_DIGEST)}


def _distinguishes(key: str, jobs: Sequence[Mapping[str, Any]], others: Sequence[str]) -> bool:
    """Whether two jobs with the same values of the other keys differ in this key."""
    values = [typed(job, key) for job in jobs]
    if len(set(values)) == 1:
        return False
    configs = [tuple(typed(job, other) for other in others) for job in jobs]
    return len({*zip(configs, values, strict=True)}) > len({*configs})


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
