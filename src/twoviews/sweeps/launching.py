"""Launching a sweep: `train.py -m` from the checked command to jobs that are submitted, and `sweep retry`."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from twoviews import foreign, launched
from twoviews.code import code_state, copy_digest, freeze, left_out, no_commit
from twoviews.config.building import build
from twoviews.config.checks import checked_plugin
from twoviews.config.digest import as_float, without_unused
from twoviews.config.values import flat, plain
from twoviews.console import Console
from twoviews.errors import BadInput, counted
from twoviews.sweeps.composing import SINGLE_RUN_FLAGS, Composer, job_specs
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobSpec, JobState, summary
from twoviews.sweeps.job_states import current_states, wait_until_ended
from twoviews.sweeps.machine import CLUSTER_POLL_SECONDS, Launcher
from twoviews.sweeps.mlflow_sync import attach_jobs, flush, sweep_page
from twoviews.sweeps.plan import plan
from twoviews.tracking import uris

MAX_SHOWN_FILES = 5  # of those that git does not track
# Overrides of Hydra's own node that matter to a sweep.
_HYDRA_KEYS = re.compile(r"[+~]*hydra([.]mode=|[.]sweep[.]dir=|[.]launcher|[.]sweeper|/launcher=|/sweeper=)")
# Root keys that may differ between launches of one sweep.
FREE_KEYS = ("hydra", "sweep", "tracking", "runtime", *SINGLE_RUN_FLAGS)
# Parameters of launchers that version 0.1.0 recorded, by their present names.
_OLD_PARAMETERS = {"points_per_gpu": "jobs_per_gpu", "cores_per_point": "cores_per_job"}


@dataclass(frozen=True)
class SweepOptions:
    """The node `sweep` of conf/train.yaml, where its keys are explained."""

    name: str | None
    wait: bool
    plan: bool


class SweepCommand:
    """One command `train.py -m`, checked before anything is written.

    Args:
        config: the configuration without swept values, with Hydra's own node.
        compose: composes the configuration of a combination of overrides.

    Raises:
        BadInput: the launcher, the name of the sweep or the tracking URI is wrong.
    """

    def __init__(self, config: DictConfig, compose: Callable[[list[str]], DictConfig]):
        options = cast(dict[str, Any], OmegaConf.to_container(config.sweep))
        if not isinstance(name := options["name"], str | None):
            raise BadInput(f"sweep.name={name} is a number and has to be a name; quote it: 'sweep.name=\"{name}\"'.")
        self.options, self.console = SweepOptions(**options), Console()
        for override in config.hydra.overrides.hydra:
            if not _HYDRA_KEYS.match(override):
                raise BadInput(f"{override} would not reach the jobs of a sweep; leave it out, or leave out -m.")
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self.swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
        self.launcher_config = checked_plugin(config, "launcher")
        name = name or default_name(config, self.swept)
        if not re.fullmatch(r"[\w+-][\w.+-]*", name):
            raise BadInput(f"sweep.name={name} is not the name of a folder; use letters, digits and any of . _ + -")
        self.folder = Path(config.hydra.sweep.dir) / name
        tracking = plain(config.tracking)
        self.tracking = {**tracking, "uri": uris.resolve(tracking["uri"])}
        if self.tracking["mirror"]:
            uris.check_reachable(self.tracking["uri"])
        uris.trust(self.tracking["uri"])
        self.launcher: Launcher = build(self.launcher_config)
        self.protocols = [*(config.get("protocol") or {})]  # their values will be in result.json
        self._composer = Composer(compose)
        self._where: dict[str, str] = {}  # what point.json has of the working directory and the code of the jobs

    def specs(self, combinations: Sequence[Sequence[str]]) -> list[JobSpec]:
        """The jobs of these combinations of overrides, as `job_specs` makes them."""
        return job_specs(self._composer, combinations, self.swept)

    def add(self, specs: Sequence[JobSpec]) -> tuple[Sweep, list[Job]]:
        """Create the folders of these jobs, with the code as it was at the first call."""
        sweep = Sweep(self.folder)
        if not self._where:
            self._report_untracked(specs)
            if reason := no_commit():
                self.console.say(f"code      no commit is recorded: {reason}.")
            copy = freeze(sweep.folder / "code")
            self._where = {"cwd": str(Path.cwd()), "code": str(copy)}
            launched.remember(copy_digest(copy))
            launched.remember(json.dumps(self.launcher_config, sort_keys=True))
        specs = [replace(spec, details={**spec.details, **self._where}) for spec in specs]
        command, commit = shlex.join(["python", *sys.argv]), code_state()[0]
        return sweep, sweep.add(specs, command, launcher=self.launcher_config, commit=commit)

    def _report_untracked(self, specs: Sequence[JobSpec]) -> None:
        """Name the files that git does not track and the copy of the code lacks.

        Raises:
            BadInput: a job needs one of them.
        """
        files = left_out()
        chosen = {f"conf/{group}/{choice}.yaml" for spec in specs for group, choice in spec.details["choices"].items()}

        def needed(file: str) -> bool:
            module = file.removeprefix("src/").removesuffix(".py").replace("/", ".")
            return file in chosen or any(f"_target_: {module}." in spec.config_yaml for spec in specs)

        if lacking := [*filter(needed, files)]:
            verb, them = ("is", "it") if len(lacking) == 1 else ("are", "them")
            raise BadInput(
                f"{' and '.join(lacking)} {verb} not tracked by git, so jobs would lack {them}; run "
                f"`git add {' '.join(lacking)}`."
            )
        if files:
            shown = ", ".join(files[:MAX_SHOWN_FILES]) + (" …" if len(files) > MAX_SHOWN_FILES else "")
            self.console.say(f"code      without {counted(len(files), 'file')} that git does not track: {shown}")


def launch_all(command: SweepCommand, combinations: Sequence[Sequence[str]]) -> int:
    """Run the jobs of a sweep that have no result yet; returns the exit code: 0, or 1 if jobs failed.

    Args:
        command: whose jobs these are.
        combinations: overrides of each job.

    Raises:
        BadInput: a job is wrong; nothing was started.
        SystemExit: a signal stopped it.
    """
    specs = command.specs(combinations)
    if command.options.plan:
        existing = Sweep(command.folder).jobs if (command.folder / "sweep.json").exists() else []
        plan(command.folder, specs, current_states(existing), command.launcher, command.console)
        return 0
    sweep, jobs = command.add(specs)
    states = current_states(jobs)
    todo = [job for job in jobs if states[job.digest].ended_without_result]
    digests = {job.digest for job in jobs}
    others = summary(state.state for state in states.values() if not state.ended_without_result)
    shown = ", ".join(filter(None, (counted(len(jobs), "job"), others, f"{len(todo):,} to run" if todo else "")))
    command.console.say(f"sweep {sweep.name}: {shown}; {sweep.folder}")
    mirror = command.tracking["mirror"]
    if todo and mirror:
        attach_jobs(sweep, todo, command.tracking)
    try:
        command.launcher.submit(todo)
        if command.options.wait:
            wait_until_ended(sweep.named(digests), poll_s=CLUSTER_POLL_SECONDS, say=command.console.say)
    finally:
        if mirror:
            flush(sweep, command.console.say)
    return 1 if any(state.ended_without_result for state in print_end(sweep, digests, command.console).values()) else 0


def retry(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Run jobs again with the launcher, the configuration and the code of their launch, from their checkpoints.

    Raises:
        BadInput: this user did not launch that code or that launcher: what came from elsewhere is not run.
    """
    launcher: dict[str, Any] = sweep.record["launcher"]
    copies = {job.description["code"] for job in jobs}
    from_here = all(launched.remembered(copy_digest(Path(copy))) for copy in copies)
    if jobs and not (from_here and launched.remembered(json.dumps(launcher, sort_keys=True))):
        raise BadInput(
            f"{sweep.folder} has code or a launcher that was not launched from here, so nothing of it is run; launch the "
            "sweep with `train.py -m` and sweep.name= again, which goes on from its checkpoints with the code of this checkout."
        )
    for job in jobs:
        uris.refuse_untrusted(foreign.load(job.folder / "config.yaml").get("tracking", {}).get("uri"))
    build({_OLD_PARAMETERS.get(key, key): value for key, value in launcher.items()}).submit(jobs)


def default_name(config: DictConfig, swept: Sequence[str]) -> str:
    """The name of a sweep without sweep.name=, which does not depend on the values of the swept keys."""
    nodes = OmegaConf.masked_copy(config, [str(key) for key in config if key not in FREE_KEYS])
    values = without_unused(flat(plain(nodes)))
    fixed = {key: value for key, value in values.items() if not any(f"{key}.".startswith(f"{node}.") for node in swept)}
    text = repr((sorted((key, as_float(value)) for key, value in fixed.items()), sorted(swept)))
    choices = config.hydra.runtime.choices
    front = [group if group in swept else choices[group] for group in ("method", "data")]
    return "-".join([*front, hashlib.blake2b(text.encode(), digest_size=4).hexdigest()])


def print_end(sweep: Sweep, digests: set[str], console: Console) -> Mapping[str, JobState]:
    """Print the number of jobs in each state, and a line for each that failed; returns the states by digest."""
    jobs, name = sweep.named(digests), shlex.quote(sweep.name)
    states = current_states(jobs)
    failed = [job for job in jobs if states[job.digest].ended_without_result]
    console.say(f"sweep {sweep.name}: {counted(len(jobs), 'job')}, {summary(state.state for state in states.values())}")
    for job in failed:
        console.say(f"  {states[job.digest].state} {job.label}: {states[job.digest].reason}")
    if any(state.active for state in states.values()):
        console.say(f"`python -m twoviews.sweep status {name}` shows their states.")
    if page := sweep_page(sweep):
        console.say(f"MLflow: {page}")
    if failed:
        console.say(
            f"{counted(len(failed), 'job')} did not finish; `python -m twoviews.sweep logs {name} <job>` shows the output of "
            "one, and the same command runs them again."
        )
    return states
