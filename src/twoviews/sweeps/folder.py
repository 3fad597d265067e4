"""A sweep is a folder, and a point is a run folder in it that is named by the digest of its configuration.

    multirun/<name>/sweep.json         what was launched: axes, points, launcher, MLflow's parent run
    multirun/<name>/code/<digest>/     the code that points run, as it was when they were submitted
    multirun/<name>/<digest>/          a run folder, made whole with its config.yaml and
        point.json                     values of the axes, overrides, choices of groups, where it runs, which code
        state.json                     what became of it; written by its supervisor alone
        log.txt                        what the training printed, of all its starts

Nothing here needs torch, Hydra, MLflow or SLURM.
"""

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from twoviews import foreign
from twoviews.errors import BadInput, nearest
from twoviews.files import write_atomic
from twoviews.signatures import complaint
from twoviews.sweeps.words import text
from twoviews.tracking.metrics import read

MULTIRUN = Path("multirun")
WRITERS = 32  # points whose files are written at once: each waits for the disk some milliseconds
LOCK_S = 60.0  # longest wait for another process that changes sweep.json, which takes milliseconds

Name = Literal[
    "QUEUED",  # not begun, or put back into SLURM's queue
    "RUNNING",
    "FINISHED",
    "FAILED",  # in training, or because it made no progress, or the scheduler refused it
    "INTERRUPTED",  # stopped with a checkpoint, and nothing will start it again by itself
    "TIMEOUT",  # from here on as SLURM calls it
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "CANCELLED",
    "LOST",  # whoever should be running it is gone
    "PRUNED",  # a search gave it up, and nothing starts it again
]


@dataclass(frozen=True)
class State:
    """What became of a point. Times are unix seconds."""

    state: Name = "QUEUED"
    job: str | None = None  # SLURM's job, as 12_3 for a task of an array
    node: str | None = None
    submitted: float = 0.0  # the submission that this state belongs to, as in sweep.json
    started: float | None = None  # of the last start
    ended: float | None = None
    starts: int = 0  # of the training, over all submissions
    stalled: int = 0  # starts in a row that wrote no checkpoint
    checkpoint: int = 0  # when last.pt was written, in ns, as the last start found it; 0 without one
    step: int = 0  # optimizer steps that metrics.jsonl knows of
    reason: str = ""  # why it is in this state, in a sentence

    @property
    def active(self) -> bool:
        """Somebody runs it, or will."""
        return self.state in ("QUEUED", "RUNNING")

    @property
    def done(self) -> bool:
        """Nothing is left to do: it has a result, or none is wanted any more."""
        return self.state in ("FINISHED", "PRUNED")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        folder: the run folder; its name is the digest of the configuration.
        axes: value by dotted key, or choice by group.
        job: SLURM's job that was submitted for it last, None where it was not SLURM.
        submitted: when that was, unix seconds; 0 if never.
        cancelled: when somebody wanted it cancelled, unix seconds; 0 if never.
        given_up: why a search does not want it any more; empty where it does.
        refused: why the scheduler did not take it the last time; empty where it did, or was not asked.
    """

    folder: Path
    axes: Mapping[str, Any]
    job: str | None = None
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
        """The values of its axes as they are typed, for a person."""
        return " ".join(f"{key}={text(value)}" for key, value in self.axes.items()) or self.digest

    @property
    def description(self) -> dict[str, Any]:
        """The content of point.json."""
        return foreign.load(self.folder / "point.json", needed=True)

    @property
    def state(self) -> State:
        """What the supervisor wrote last, QUEUED before that; `Dispatch.look` compares it with the scheduler."""
        known, path = {field.name for field in fields(State)}, self.folder / "state.json"
        content = {key: value for key, value in foreign.load(path).items() if key in known}
        if content and (wrong := complaint(content["state"], Name)):
            raise foreign.damaged(path, f"state={content['state']} {wrong}")
        return State(**content)

    def write(self, state: State) -> None:
        """Replace state.json; only for the supervisor that holds `lock`."""
        write_atomic(self.folder / "state.json", json.dumps(asdict(state), indent=1) + "\n")

    @property
    def lock(self) -> FileLock:
        """Held by the supervisor; the system releases it however that ends."""
        return FileLock(self.folder / ".supervisor.lock")

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json; empty until the training ended."""
        return foreign.load(self.folder / "result.json")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return list(read(self.folder))

    def checkpoint(self) -> int:
        """When the last checkpoint was written, in ns since 1970; 0 without one."""
        try:
            return (self.folder / "last.pt").stat().st_mtime_ns
        except FileNotFoundError:
            return 0


@dataclass(frozen=True)
class New:
    """A point to be.

    Args:
        digest: of the configuration.
        axes: value by dotted key, or choice by group.
        overrides: what was typed for it.
        config: the resolved configuration as YAML.
    """

    digest: str
    axes: Mapping[str, Any]
    overrides: Sequence[str]
    config: str
    more: Mapping[str, Any] = field(default_factory=dict)  # what point.json says beside: choices of groups, cwd, code


class Sweep:
    """A folder with a sweep.json.

    Args:
        folder: made where it is not there, with an empty sweep.json.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "sweep.json").exists():
            with self.update():
                pass

    @classmethod
    def existing(cls, name: Path | str | None = None) -> "Sweep":
        """The sweep of that folder, or of that name below multirun/; without a name the one that was changed last.

        Raises:
            BadInput: there is none.
        """
        foreign.refuse_links(folder := cls._folder(name))
        return cls(folder)

    @staticmethod
    def _folder(name: Path | str | None) -> Path:
        if name is not None and (Path(name) / "sweep.json").exists():
            return Path(name)
        found = {path.parent.name: path for path in MULTIRUN.glob("*/sweep.json")}
        if not found:
            raise BadInput(f"there is no sweep in {MULTIRUN.absolute()}; go where it was launched, or name its folder.")
        if name is None:
            return max(found.values(), key=lambda path: path.stat().st_mtime).parent
        if str(name) not in found:
            raise BadInput(
                f"there is no sweep '{name}'.{nearest(str(name), found)} In {MULTIRUN.absolute()}: "
                f"{', '.join(sorted(found))}."
            )
        return found[str(name)].parent

    @staticmethod
    def names() -> list[str]:
        """Of all sweeps below multirun/, the one that was changed last first."""
        found = sorted(MULTIRUN.glob("*/sweep.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.parent.name for path in found]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def record(self) -> dict[str, Any]:
        """The content of sweep.json: name, created, commands, launcher, axes, parent, commit, points."""
        return foreign.load(self.folder / "sweep.json")

    @contextmanager
    def update(self) -> Iterator[dict[str, Any]]:
        """The content of sweep.json to change; it is written back whole, and nobody else changes it meanwhile.

        Raises:
            BadInput: another process holds it for more than a minute.
        """
        try:
            with FileLock(self.folder / ".sweep.lock", timeout=LOCK_S):
                record = self.record or {
                    "name": self.name,
                    "created": time.time(),
                    "commands": [],
                    "launcher": {},
                    "axes": {},
                    "parent": None,
                    "commit": None,
                    "points": {},
                }
                yield record
                write_atomic(self.folder / "sweep.json", json.dumps(record, indent=1) + "\n")
        except Timeout as error:
            raise BadInput(
                f"another process has been changing {self.folder / 'sweep.json'} for {LOCK_S:g} s; try again."
            ) from error

    @property
    def points(self) -> list[Point]:
        """In the order in which they were added."""
        keys = ("job", "submitted", "cancelled", "given_up", "refused")
        for digest, known in self.record["points"].items():
            job = known.get("job")
            # Names of folders and words of SLURM's commands are made of them.
            if not re.fullmatch(r"\w[\w.-]*", digest) or not (job is None or re.fullmatch(r"\d+(_\d+)?", job)):
                raise BadInput(f"{self.folder / 'sweep.json'} is refused: it has a point {digest!r} with job {job!r}.")
        return [
            Point(self.folder / digest, known["axes"], **{key: known[key] for key in keys if key in known})
            for digest, known in self.record["points"].items()
        ]

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The values of each key that was swept, in the order in which they were added."""
        return self.record["axes"]

    @property
    def commands(self) -> list[str]:
        """What was typed to launch it, each different one, in order."""
        return _commands(self.record)

    @property
    def launching(self) -> FileLock:
        """Held by the process that works through this sweep's points on this machine."""
        return FileLock(self.folder / ".launcher.lock")

    def add(self, points: Sequence[New], command: str = "", **facts: Any) -> list[Point]:
        """Make the folders of the points that are not there yet, and record all; `facts` go into sweep.json.

        The command that adds them is kept beside those before it, unless it is one of them.

        The point.json of a folder that is there is renewed, because the code that it is to run may be another one, and so
        is its config.yaml, which says the same in the options of that code, unless the point is finished.
        """
        with self.update() as record:
            record.update(facts)
            if command not in ("", *(commands := _commands(record))):
                record["commands"] = [*commands, command]
            with ThreadPoolExecutor(WRITERS) as pool:
                list(pool.map(self._make, points))
            for new in points:
                record["points"].setdefault(new.digest, {"axes": dict(new.axes)})
                for key, value in new.axes.items():
                    values = record["axes"].setdefault(key, [])
                    if value not in values:
                        values.append(value)
        wanted = {new.digest for new in points}
        return [point for point in self.points if point.digest in wanted]

    def submitted(self, jobs: Mapping[str, str | None], when: float) -> None:
        """Record that these points were submitted at that time: digest to SLURM's job, None where it is not SLURM."""
        with self.update() as record:
            for digest, job in jobs.items():
                record["points"][digest].update(job=job, submitted=when, refused="")

    def refused(self, digests: Sequence[str], reason: str) -> None:
        """Record that the scheduler does not take these points, and why; until they are submitted."""
        with self.update() as record:
            for digest in digests:
                record["points"][digest]["refused"] = reason

    def cancelled(self, digests: Sequence[str]) -> None:
        """Record that these points are cancelled now: SLURM forgets tasks that never began."""
        with self.update() as record:
            for digest in digests:
                record["points"][digest]["cancelled"] = time.time()

    def given_up(self, digests: Sequence[str], reason: str) -> None:
        """Record that nobody wants these points any more, and why."""
        with self.update() as record:
            for digest in digests:
                record["points"][digest]["given_up"] = reason

    def _make(self, new: New) -> None:
        """The folder of a point: whole or not at all."""
        folder = self.folder / new.digest
        description = {"digest": new.digest, "axes": dict(new.axes), "overrides": list(new.overrides), **new.more}
        text = json.dumps(description, indent=1) + "\n"
        if folder.exists():
            write_atomic(folder / "point.json", text)
            if foreign.load(folder / "result.json").get("state") != "finished":
                write_atomic(folder / "config.yaml", new.config)  # with the options of the code that will go on with it
            return
        part = self.folder / f".{new.digest}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_atomic(part / "config.yaml", new.config)
        write_atomic(part / "point.json", text)
        part.rename(folder)


def _commands(record: Mapping[str, Any]) -> list[str]:
    """Of a sweep.json; once it held the words of the last one alone."""
    words = record.get("command")
    return record.get("commands") or ([shlex.join(words)] if words else [])
