"""`python -m twoviews.sweep`: how the jobs of a sweep are, what they printed, and what to do about them."""

import argparse
import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from twoviews import foreign
from twoviews.console import ROWS, Console, duration
from twoviews.errors import BadInput, nearest, system_reason
from twoviews.sweeps.axes import varying_parameters
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.formatting import counted, short_names, typed
from twoviews.sweeps.job import LOG, Job, JobState
from twoviews.sweeps.job_status import CANCEL_SECONDS, status, wait_until_ended

FINISHED, UNFINISHED, ACTIVE = 0, 1, 3  # exit codes; 2 is bad input
LINES = 40  # of a log that are shown
NAMED = 8  # other sweeps
# What calls for attention comes first.
STOPPED = ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "CANCELLED", "LOST", "INTERRUPTED")
ORDER = (*STOPPED, "RUNNING", "QUEUED", "PRUNED", "FINISHED")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 all jobs are finished or pruned, 3 some are queued or running, 1 some are neither, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m twoviews.sweep",
        description="Look after a sweep. Without a name: the one in multirun/ that was changed last.",
        epilog="Exit code: 0 all jobs are finished or pruned, 3 some are queued or running, 1 some are neither, 2 bad input.",
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command, (action, sentence) in COMMANDS.items():
        sub = commands.add_parser(command, help=sentence, description=sentence[0].upper() + sentence[1:] + ".")
        sub.add_argument("name", nargs="?", help="a sweep's name below multirun/, or its folder")
        if command in ("logs", "retry", "cancel"):
            sub.add_argument("jobs", nargs="*", help="digests, or parts such as seed=1; without one all")
        sub.set_defaults(action=action)
    given = parser.parse_args(arguments)
    try:
        sweep = Sweep.existing(given.name)
        if given.name is None and (others := [name for name in Sweep.names() if name != sweep.name]):
            shown = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
            print(f"the sweep that was changed last; others can be named: {shown}")
        jobs = chosen(varying_parameters(sweep.jobs), getattr(given, "jobs", []))
        return given.action(sweep, jobs)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({system_reason(error)}).", file=sys.stderr)
        return 2


def chosen(jobs: Sequence[Job], wanted: Sequence[str]) -> list[Job]:
    """The jobs whose digest begins like this, or that have this value of an axis; all if nothing is wanted.

    Raises:
        BadInput: there is no such job.
    """

    def matches(job: Job, text: str) -> bool:
        return job.digest.startswith(text) or text in job.label.split(" ") or text == job.label

    for text in wanted:
        if not any(matches(job, text) for job in jobs):
            names = [name for job in jobs for name in (job.digest, *job.label.split(" "))]
            raise BadInput(f"there is no job '{text}' in this sweep.{nearest(text, names)}")
    # Values of one axis are alternatives; of several, all have to fit.
    axes: dict[str, list[str]] = {}
    for text in wanted:
        axes.setdefault(text.partition("=")[0] if "=" in text else "", []).append(text)
    return [job for job in jobs if all(any(matches(job, text) for text in texts) for texts in axes.values())]


def exit_code(states: Mapping[str, JobState]) -> int:
    """Of a command that looked at these states."""
    if any(state.active for state in states.values()):
        return ACTIVE
    return FINISHED if all(state.done for state in states.values()) else UNFINISHED


def show_status(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """A table of the jobs; nothing is written."""
    states, console = status(jobs), Console()
    counts = Counter(state.state for state in states.values())
    console.say(f"{sweep.folder}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))

    def rank(job: Job) -> int:
        state = states[job.digest].state
        return ORDER.index(state)

    names = short_names(dict.fromkeys(key for job in jobs for key in job.axes))
    shown = sorted(jobs, key=rank)[:ROWS]  # reading what the others measured would take long
    console.rows(sweep.name, [_row(job, states[job.digest], names) for job in shown], len(jobs))
    return exit_code(states)


def _row(job: Job, state: JobState, names: Mapping[str, str]) -> dict[str, object]:
    lines = job.metrics()
    epoch = lines[-1]["epoch"] if lines else 0
    knn = next((line["knn/top1"] for line in reversed(lines) if "knn/top1" in line), None)
    since = [line for line in lines if state.started and line["time"] >= state.started]
    left = ""
    if state.state == "RUNNING" and since and since[-1]["epoch"] > since[0]["epoch"]:
        pace = (since[-1]["time"] - since[0]["time"]) / (since[-1]["epoch"] - since[0]["epoch"])
        left = duration((epochs(job) - epoch) * pace)
    return {
        "job": job.digest,
        **{name: typed(job.axes, key) for key, name in names.items()},
        "state": state.state,
        "epoch": f"{epoch:.4g}",
        "left": left,
        "kNN": "" if knn is None else f"{knn:.2f}",
        "node": state.node or "",
        "why": state.reason,
    }


def epochs(job: Job) -> int:
    """How long the training is to be."""
    return int(foreign.load(job.folder / "config.yaml", needed=True).get("epochs", 0))


def show_logs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """The ends of what jobs printed: of those named, or of those that did not finish."""
    states = status(jobs)
    if len(jobs) == len(sweep.jobs) > 1:  # none was named
        jobs = [job for job in jobs if states[job.digest].state in STOPPED]
    for job in jobs:
        state = states[job.digest]
        print(f"=== {job.digest} {job.label}: {state.state} {state.reason}".rstrip())
        path = job.folder / LOG
        if path.exists():
            print(f"=== the end of {path}")
            with path.open(errors="replace") as file:
                print("".join(deque(file, LINES)), end="")
        elif job.slurm_id:
            print(f"=== it printed nothing; what SLURM printed is in {sweep.folder / 'slurm'}")
        else:
            print("=== it never began, so it printed nothing")
    if not jobs:
        print("no job failed; name one to see what it printed.")
    return exit_code(states)


def retry_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Run again what neither finished nor is under way, from its checkpoints and with the code it had."""
    from twoviews.sweeps import collecting
    from twoviews.sweeps.launching import again, report

    states, console = status(jobs), Console()
    todo = [job for job in jobs if states[job.digest].state in STOPPED]
    again(sweep, todo)
    if sweep.record["parent"]:
        collecting.deliver(sweep, console.say)
    wanted = {job.digest for job in jobs}
    jobs = [job for job in sweep.jobs if job.digest in wanted]
    states = status(jobs)
    report(sweep, jobs, states, console)
    return exit_code(states)


def collect_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Send to MLflow what it does not have of the jobs, and how they and the sweep ended."""
    from twoviews.sweeps import collecting

    left = collecting.collect(sweep, jobs)
    print(
        f"{sweep.name}: in MLflow are {len(jobs) - left:,} of {counted(len(jobs), 'job')}, run {sweep.record['parent']}"
    )
    return 1 if left else 0


def cancel_jobs(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Stop what is queued or running, with a moment for a checkpoint; MLflow is told how it ended."""
    from twoviews.sweeps import collecting
    from twoviews.sweeps.machine import stop
    from twoviews.sweeps.slurm import cancel_jobs

    states = status(jobs)
    active = [job for job in jobs if states[job.digest].active]
    waiting = [job for job in active if job.slurm_id is None and states[job.digest].state == "QUEUED"]
    active = [job for job in active if job not in waiting]
    stop([job for job in active if job.slurm_id is None])
    cancel_jobs(active)
    print(f"cancelled {counted(len(active), 'job')} of {sweep.name}")
    if waiting:
        print(
            f"waiting for the launcher on this machine, which goes on with them: {counted(len(waiting), 'job')}; end it with "
            "Ctrl-C."
        )
    if active and sweep.record["parent"]:  # what is killed before it can say so would stay as running there
        print("waiting for their ends, to tell MLflow …", flush=True)
        wanted = {job.digest for job in active}
        jobs = [job for job in sweep.jobs if job.digest in wanted]
        if not wait_until_ended(jobs, CANCEL_SECONDS) or collecting.collect(sweep, jobs):
            print(
                f"MLflow was not told of all; `python -m twoviews.sweep collect {shlex.quote(sweep.name)}` does it later."
            )
    return 0


def write_report(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Write what was found so far into the sweep folder: a page, a table, pictures."""
    from twoviews.sweeps.report import report

    states = status(jobs)
    report(sweep, states, print)
    return exit_code(states)


COMMANDS: dict[str, tuple[Callable[[Sweep, Sequence[Job]], int], str]] = {
    "status": (show_status, "show all jobs"),
    "logs": (show_logs, "show what jobs printed: those named, or those that failed"),
    "report": (write_report, "write report.md, report.csv and pictures of what was found so far"),
    "collect": (collect_jobs, "send to MLflow what it does not have: jobs run with tracking=files, killed ones"),
    "retry": (retry_jobs, "run again what neither finished nor is under way"),
    "cancel": (cancel_jobs, "stop what is queued or running"),
}

if __name__ == "__main__":
    sys.exit(main())
