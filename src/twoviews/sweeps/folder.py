"""Sweep folders: a file for the sweep, the code that was launched, and a folder for each job.

    multirun/<name>/sweep.json         what was launched: swept values, jobs, launcher, MLflow's parent run
    multirun/<name>/code/<digest>/     the code that the jobs run, as it was when they were submitted
    multirun/<name>/<digest>/          a run folder, created as a whole with its config.yaml and
        point.json                     swept values, overrides, choices of groups, working directory, code
        state.json                     the state of the job, written by its runner alone
        log.txt                        what the training printed, of all starts

Nothing here needs torch, Hydra, MLflow or SLURM.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twoviews import foreign
from twoviews.errors import BadInput, nearest
from twoviews.files import write_atomic
from twoviews.locks import try_acquire
from twoviews.sweeps.job import Job, JobSpec

SWEEPS_FOLDER = Path("multirun")
FACTS = ("submitted", "cancelled", "given_up", "refused")  # keys of a job in sweep.json that are fields of `Job`
WRITER_THREADS = 32  # job folders that are written at once: each waits for the disk some milliseconds
SWEEP_LOCK_SECONDS = 60.0  # longest wait for another process that changes sweep.json, which takes milliseconds


def submission(slurm_id: str | None, when: float) -> dict[str, str | float | None]:
    """What `Sweep.mark` records of a job that was submitted at `when` (unix seconds): None where it is not SLURM."""
    return {"job": slurm_id, "submitted": when, "refused": ""}


class Sweep:
    """A folder with a sweep.json.

    Args:
        folder: created with an empty sweep.json if there is none.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "sweep.json").exists():
            with self.update():
                pass

    @classmethod
    def existing(cls, name: Path | str | None = None) -> "Sweep":
        """The sweep in this folder, or with this name below multirun/; without a name, the one that changed last.

        Raises:
            BadInput: there is none.
        """
        if name is not None and (Path(name) / "sweep.json").exists():
            folder = Path(name)
        elif not (names := cls.names()):
            raise BadInput(
                f"there is no sweep in {SWEEPS_FOLDER.absolute()}; go where it was launched, or name its folder."
            )
        elif name is not None and str(name) not in names:
            raise BadInput(
                f"there is no sweep '{name}'.{nearest(str(name), names)} "
                f"In {SWEEPS_FOLDER.absolute()}: {', '.join(sorted(names))}."
            )
        else:
            folder = SWEEPS_FOLDER / (names[0] if name is None else str(name))
        foreign.refuse_links(folder)
        return cls(folder)

    @staticmethod
    def names() -> list[str]:
        """Names of all sweeps below multirun/, the one that changed last first."""
        paths = sorted(SWEEPS_FOLDER.glob("*/sweep.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.parent.name for path in paths]

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
        """The content of sweep.json, to be changed inside the block; the file is replaced after it, under a lock.

        Raises:
            BadInput: another process holds the lock for more than a minute.
        """
        path, new = self.folder / "sweep.json", {"name": self.name, "created": time.time(), "commands": []}
        new |= {"launcher": {}, "axes": {}, "parent": None, "commit": None, "points": {}}
        try:
            with FileLock(self.folder / ".sweep.lock", timeout=SWEEP_LOCK_SECONDS):
                record = self.record or new
                yield record
                write_atomic(path, json.dumps(record, indent=1) + "\n")
        except Timeout as error:
            raise BadInput(
                f"another process has been changing {path} for {SWEEP_LOCK_SECONDS:g} s; try again."
            ) from error

    @property
    def jobs(self) -> list[Job]:
        """The jobs in the order in which they were added."""
        jobs = []
        for digest, entry in self.record["points"].items():
            slurm_id = entry.get("job")
            # Paths and arguments of SLURM's commands are made of these two.
            if not (re.fullmatch(r"\w[\w.-]*", digest) and re.fullmatch(r"None|\d+(_\d+)?", str(slurm_id))):
                path = self.folder / "sweep.json"
                raise BadInput(f"{path} is refused: it has a job {digest!r} with the SLURM id {slurm_id!r}.")
            facts = {key: entry[key] for key in FACTS if key in entry}
            jobs.append(Job(self.folder / digest, entry["axes"], slurm_id, **facts))
        return jobs

    def named(self, digests: Iterable[str]) -> list[Job]:
        """The jobs with these digests, in the order of `jobs`, as sweep.json describes them now."""
        wanted = {*digests}
        return [job for job in self.jobs if job.digest in wanted]

    @property
    def commands(self) -> list[str]:
        """The different commands that launched the sweep, in order."""
        return self.record.get("commands", [])

    @property
    def launcher_lock(self) -> FileLock:
        """Held by the process that starts or submits the jobs of this sweep on this machine."""
        return FileLock(self.folder / ".launcher.lock")

    @contextmanager
    def launching(self, say: Callable[[str], None]) -> Iterator[None]:
        """A block in which no other process starts or submits jobs of this sweep on this machine.

        Args:
            say: called with a sentence for the user if another one does, whose end is waited for.
        """
        lock = self.launcher_lock
        if not try_acquire(lock):
            say(f"another process works on {self.name}; waiting for its end …")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def add(self, specs: Sequence[JobSpec], command: str = "", **facts: Any) -> list[Job]:
        """Create the folders of the jobs that have none, record all, and return them.

        In a folder that exists, point.json is replaced, as the job may run other code from now on, and unless the job is
        finished also config.yaml, in which that code may name keys differently.

        Args:
            specs: the jobs.
            command: appended to the commands of the sweep, unless it is one of them.
            facts: written into sweep.json by key.
        """
        with self.update() as record:
            record.update(facts)
            if command not in ("", *(commands := record.setdefault("commands", []))):
                commands.append(command)
            with ThreadPoolExecutor(WRITER_THREADS) as pool:
                list(pool.map(self._create, specs))
            for spec in specs:
                record["points"].setdefault(spec.digest, {"axes": dict(spec.parameters)})
                for key, value in spec.parameters.items():
                    values = record["axes"].setdefault(key, [])
                    if value not in values:
                        values.append(value)
        return self.named(spec.digest for spec in specs)

    def mark(self, facts: Mapping[str, Mapping[str, str | float | None]]) -> None:
        """Record facts of jobs, by digest: a `submission`, or any of `FACTS`, which `Job` explains."""
        with self.update() as record:
            for digest, changed in facts.items():
                record["points"][digest].update(changed)

    def _create(self, spec: JobSpec) -> None:
        """The folder of a job, which appears as a whole or not at all."""
        folder = self.folder / spec.digest
        description = {"digest": spec.digest, "axes": dict(spec.parameters), "overrides": list(spec.overrides)}
        content = json.dumps({**description, **spec.details}, indent=1) + "\n"
        if folder.exists():
            write_atomic(folder / "point.json", content)
            if foreign.load(folder / "result.json").get("state") != "finished":
                write_atomic(folder / "config.yaml", spec.config_yaml)
            return
        part = self.folder / f".{spec.digest}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_atomic(part / "config.yaml", spec.config_yaml)
        write_atomic(part / "point.json", content)
        part.rename(folder)
