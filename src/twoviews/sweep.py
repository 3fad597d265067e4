"""`python -m twoviews.sweep`: states, outputs and results of a sweep's jobs, and commands to run or stop them."""

import argparse
import shlex
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from twoviews import foreign
from twoviews.console import ROWS, Console, duration
from twoviews.errors import BadInput, counted, nearest, system_reason
from twoviews.figures import set_formats
from twoviews.protocols.units import KNN_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import LOG, Job, JobState, StateName, short_names, summary, typed, with_varying_parameters
from twoviews.sweeps.job_states import CANCEL_SECONDS, current_states, wait_until_ended

EXIT_CODES = (
    "0 all jobs are finished or pruned, 3 some are queued or running, 1 some are neither, 2 bad input; report: 0 once it is "
    "written; collect: 1 where MLflow lacks something."
)
LOG_LINES = 40  # of a log that are shown
MAX_SHOWN_NAMES = 8  # of other sweeps


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m twoviews.sweep",
        description="Show, report, retry or stop the jobs of a sweep, which are runs that `train.py -m` launched together. "
        "A command takes the name of a sweep; without one, it is the sweep in multirun/ that changed last.",
        epilog=f"Exit code: {EXIT_CODES}",
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command, (action, sentence) in COMMANDS.items():
        sub = commands.add_parser(command, help=sentence, description=sentence[0].upper() + sentence[1:] + ".")
        sub.add_argument(
            "name", nargs="?", help="a sweep below multirun/, or its folder; default: the one that changed last"
        )
        if command in ("logs", "retry", "cancel"):
            sub.add_argument("jobs", nargs="*", help="digests, or parts such as seed=1; without one all")
        if command == "report":
            formats = {"nargs": "+", "choices": ("png", "pdf"), "default": ["png"]}
            sub.add_argument("--format", help="of the plots: png (the default), pdf or both", **formats)
        sub.set_defaults(action=action)
    options = parser.parse_args(arguments)
    set_formats(getattr(options, "format", "png"))
    try:
        sweep = Sweep.existing(options.name)
        if options.name is None and (others := [name for name in Sweep.names() if name != sweep.name]):
            more = f" and {len(others) - MAX_SHOWN_NAMES} more" if len(others) > MAX_SHOWN_NAMES else ""
            print(f"the sweep that changed last; others can be named: {', '.join(others[:MAX_SHOWN_NAMES])}{more}")
        jobs = chosen(with_varying_parameters(sweep.jobs), getattr(options, "jobs", []))
        return options.action(sweep, jobs)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({system_reason(error)}).", file=sys.stderr)
        return 2


def chosen(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs whose digest begins with one of the names, or that have such a value, as `seed=1` or `temperature=0.1` of
    method.temperature; all if none is given.

    Raises:
        BadInput: a name fits no job.
    """

    def fits(job: Job, name: str) -> bool:
        values = job.label.split(" ")
        short = "=" in name and any(value.endswith(f".{name}") for value in values)
        return job.digest.startswith(name) or name in values or short or name == job.label

    # Values of one key are alternatives; of several keys, all have to fit.
    by_key: dict[str, list[str]] = {}
    for name in names:
        if not any(fits(job, name) for job in jobs):
            choices = [choice for job in jobs for choice in (job.digest, *job.label.split(" "))]
            raise BadInput(f"there is no job '{name}' in this sweep.{nearest(name, choices)}")
        by_key.setdefault(name.partition("=")[0] if "=" in name else "", []).append(name)
    return [job for job in jobs if all(any(fits(job, name) for name in group) for group in by_key.values())]


def exit_code(states: Mapping[str, JobState]) -> int:
    """The exit code of a command for jobs with these states; its reason is printed on standard error if it is not 0."""
    if not (reason := not_finished(states)):
        return 0
    code = 3 if any(state.active for state in states.values()) else 1
    print(f"exit code {code}: {reason}.", file=sys.stderr)
    return code


def not_finished(states: Mapping[str, JobState]) -> str:
    """How many jobs are neither finished nor pruned, and their states, as part of a sentence; empty if none is."""
    left = [state.state for state in states.values() if not state.finished_or_pruned]
    of = f"{len(left):,} of {counted(len(states), 'job')} {'is' if len(left) == 1 else 'are'}"
    return f"{of} not finished ({summary(left)})" if left else ""


def show_status(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Print a table of the jobs; nothing is written."""
    states, console = current_states(jobs), Console()
    console.say(f"{sweep.folder}: {summary(state.state for state in states.values())}")
    names = short_names(dict.fromkeys(key for job in jobs for key in job.parameters))
    order = get_args(StateName)
    shown = sorted(jobs, key=lambda job: order.index(states[job.digest].state))[:ROWS]  # reading all takes long
    console.rows(sweep.name, [_row(job, states[job.digest], names) for job in shown], len(jobs))
    return exit_code(states)


def _row(job: Job, state: JobState, names: Mapping[str, str]) -> dict[str, object]:
    lines = job.metrics()
    epoch = lines[-1]["epoch"] if lines else 0
    knn = next((line[KNN_TOP1] for line in reversed(lines) if KNN_TOP1 in line), None)
    since = [line for line in lines if state.started and line["time"] >= state.started]
    left = ""
    if state.state == "RUNNING" and since and since[-1]["epoch"] > since[0]["epoch"]:
        seconds_per_epoch = (since[-1]["time"] - since[0]["time"]) / (since[-1]["epoch"] - since[0]["epoch"])
        epochs = int(foreign.load(job.folder / "config.yaml", needed=True).get("epochs", 0))
        left = duration((epochs - epoch) * seconds_per_epoch)
    return {
        "job": job.digest,
        **{name: typed(job.parameters, key) for key, name in names.items()},
        "state": state.state,
        "epoch": f"{epoch:.4g}",
        "left": left,
        "kNN": "" if knn is None else f"{knn:.2f}",
        "node": state.node or "",
        "why": state.reason,
    }


def show_logs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Print the ends of the logs of the jobs that were named, or of those that failed."""
    states = current_states(jobs)
    if len(jobs) == len(sweep.jobs) > 1:  # none was named
        jobs = [job for job in jobs if states[job.digest].ended_without_result]
    for job in jobs:
        state = states[job.digest]
        print(f"=== {job.digest} {job.label}: {state.state} {state.reason}".rstrip())
        path = job.folder / LOG
        if path.exists():
            print(f"=== the end of {path}")
            with path.open(errors="replace") as file:
                print("".join(deque(file, LOG_LINES)), end="")
        elif job.slurm_id:
            print(f"=== it printed nothing; what SLURM printed is in {sweep.folder / 'slurm'}")
        else:
            print("=== it never began, so it printed nothing")
    if not jobs:
        print("no job failed; name one to see what it printed.")
    return exit_code(states)


def retry_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Run the jobs that stopped without a result again, from their checkpoints and with the code of their launch."""
    from twoviews.sweeps.launching import print_end, retry
    from twoviews.sweeps.mlflow_sync import flush

    states, console = current_states(jobs), Console()
    retry(sweep, [job for job in jobs if states[job.digest].ended_without_result])
    if sweep.record["parent"]:
        flush(sweep, console.say)
    return exit_code(print_end(sweep, {job.digest for job in jobs}, console))


def collect_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Send what MLflow lacks of the jobs, and the ends of the jobs and of the sweep."""
    from twoviews.sweeps.mlflow_sync import collect, sweep_page

    left = collect(sweep, jobs)
    sent = f"{len(jobs) - left:,} of {counted(len(jobs), 'job')}"
    print(f"{sweep.name}: in MLflow are {sent}, run {sweep.record['parent']}")
    print(f"MLflow: {sweep_page(sweep)}")
    return 1 if left else 0


def cancel_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Stop the jobs that are queued or running, which get some seconds for a checkpoint, and tell MLflow."""
    from twoviews.sweeps.mlflow_sync import collect
    from twoviews.sweeps.slurm import cancel

    states = current_states(jobs)
    active = [job for job in jobs if states[job.digest].active]
    waiting = [job for job in active if job.slurm_id is None and states[job.digest].state == "QUEUED"]
    active = [job for job in active if job not in waiting]
    cancel(active)
    print(f"cancelled {counted(len(active), 'job')} of {sweep.name}")
    if count := len(waiting):
        print(
            f"the launcher on this machine goes on with {counted(count, 'job')} that wait for it; end it with Ctrl-C."
        )
    if active and sweep.record["parent"]:  # MLflow would show killed jobs as running
        print("waiting until they have ended, to tell MLflow …", flush=True)
        jobs = sweep.named(job.digest for job in active)
        if not wait_until_ended(jobs, CANCEL_SECONDS) or collect(sweep, jobs):
            name = shlex.quote(sweep.name)
            print(f"MLflow was not told of all ends; `python -m twoviews.sweep collect {name}` does it later.")
    return 0


def write_report(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Write the results so far into the sweep folder: a page, a table, plots; the exit code is 0 once that is done."""
    from twoviews.sweeps.report import report

    states = current_states(jobs)
    report(sweep, states, print)
    if left := not_finished(states):
        print(f"{left}; `python -m twoviews.sweep status {shlex.quote(sweep.name)}` shows why.")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sweep, Sequence[Job]], int], str]] = {
    "status": (show_status, "show all jobs"),
    "logs": (show_logs, "show the output of jobs: those named, or those that failed"),
    "report": (write_report, "write report.md, .csv, .tex and plots of the results so far into the sweep folder"),
    "collect": (collect_jobs, "send results that MLflow lacks: of jobs run with tracking=files, of killed jobs"),
    "retry": (retry_jobs, "run the jobs again that stopped without a result"),
    "cancel": (cancel_jobs, "stop the jobs that are queued or running"),
}

if __name__ == "__main__":
    sys.exit(main())
