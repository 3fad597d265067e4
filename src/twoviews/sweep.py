"""`python -m twoviews.sweep`: how the points of a sweep are, what they printed, and what to do about them."""

import argparse
import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from twoviews import foreign
from twoviews.console import ROWS, Console, duration
from twoviews.errors import BadInput, nearest, system_reason
from twoviews.sweeps.axes import told_apart
from twoviews.sweeps.folder import Point, State, Sweep
from twoviews.sweeps.supervise import LOG
from twoviews.sweeps.truth import CANCEL_S, ended, look
from twoviews.sweeps.words import counted, short_names, typed

FINISHED, UNFINISHED, ACTIVE = 0, 1, 3  # exit codes; 2 is bad input
LINES = 40  # of a log that are shown
NAMED = 8  # other sweeps
# What calls for attention comes first.
STOPPED = ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "CANCELLED", "LOST", "INTERRUPTED")
ORDER = (*STOPPED, "RUNNING", "QUEUED", "PRUNED", "FINISHED")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 all points are finished or pruned, 3 some are queued or running, 1 some are neither, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m twoviews.sweep",
        description="Look after a sweep. Without a name: the one in multirun/ that was changed last.",
        epilog="Exit code: 0 all points are finished or pruned, 3 some are queued or running, 1 some are neither, 2 bad input.",
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command, (action, sentence) in COMMANDS.items():
        sub = commands.add_parser(command, help=sentence, description=sentence[0].upper() + sentence[1:] + ".")
        sub.add_argument("name", nargs="?", help="a sweep's name below multirun/, or its folder")
        if command in ("logs", "retry", "cancel"):
            sub.add_argument("points", nargs="*", help="digests, or parts such as seed=1; without one all")
        sub.set_defaults(action=action)
    given = parser.parse_args(arguments)
    try:
        sweep = Sweep.existing(given.name)
        if given.name is None and (others := [name for name in Sweep.names() if name != sweep.name]):
            shown = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
            print(f"the sweep that was changed last; others can be named: {shown}")
        points = chosen(told_apart(sweep.points), getattr(given, "points", []))
        return given.action(sweep, points)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({system_reason(error)}).", file=sys.stderr)
        return 2


def chosen(points: Sequence[Point], wanted: Sequence[str]) -> list[Point]:
    """The points whose digest begins like this, or that have this value of an axis; all if nothing is wanted.

    Raises:
        BadInput: there is no such point.
    """

    def matches(point: Point, text: str) -> bool:
        return point.digest.startswith(text) or text in point.label.split(" ") or text == point.label

    for text in wanted:
        if not any(matches(point, text) for point in points):
            names = [name for point in points for name in (point.digest, *point.label.split(" "))]
            raise BadInput(f"there is no point '{text}' in this sweep.{nearest(text, names)}")
    # Values of one axis are alternatives; of several, all have to fit.
    axes: dict[str, list[str]] = {}
    for text in wanted:
        axes.setdefault(text.partition("=")[0] if "=" in text else "", []).append(text)
    return [point for point in points if all(any(matches(point, text) for text in texts) for texts in axes.values())]


def exit_code(states: Mapping[str, State]) -> int:
    """Of a command that looked at these states."""
    if any(state.active for state in states.values()):
        return ACTIVE
    return FINISHED if all(state.done for state in states.values()) else UNFINISHED


def status(sweep: Sweep, points: Sequence[Point]) -> int:
    """A table of the points; nothing is written."""
    states, console = look(points), Console()
    counts = Counter(state.state for state in states.values())
    console.say(f"{sweep.folder}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))

    def rank(point: Point) -> int:
        state = states[point.digest].state
        return ORDER.index(state)

    names = short_names(dict.fromkeys(key for point in points for key in point.axes))
    shown = sorted(points, key=rank)[:ROWS]  # reading what the others measured would take long
    console.rows(sweep.name, [_row(point, states[point.digest], names) for point in shown], len(points))
    return exit_code(states)


def _row(point: Point, state: State, names: Mapping[str, str]) -> dict[str, object]:
    lines = point.metrics()
    epoch = lines[-1]["epoch"] if lines else 0
    knn = next((line["knn/top1"] for line in reversed(lines) if "knn/top1" in line), None)
    since = [line for line in lines if state.started and line["time"] >= state.started]
    left = ""
    if state.state == "RUNNING" and since and since[-1]["epoch"] > since[0]["epoch"]:
        pace = (since[-1]["time"] - since[0]["time"]) / (since[-1]["epoch"] - since[0]["epoch"])
        left = duration((epochs(point) - epoch) * pace)
    return {
        "point": point.digest,
        **{name: typed(point.axes, key) for key, name in names.items()},
        "state": state.state,
        "epoch": f"{epoch:.4g}",
        "left": left,
        "kNN": "" if knn is None else f"{knn:.2f}",
        "node": state.node or "",
        "why": state.reason,
    }


def epochs(point: Point) -> int:
    """How long the training is to be."""
    return int(foreign.load(point.folder / "config.yaml", needed=True).get("epochs", 0))


def logs(sweep: Sweep, points: Sequence[Point]) -> int:
    """The ends of what points printed: of those named, or of those that did not finish."""
    states = look(points)
    if len(points) == len(sweep.points) > 1:  # none was named
        points = [point for point in points if states[point.digest].state in STOPPED]
    for point in points:
        state = states[point.digest]
        print(f"=== {point.digest} {point.label}: {state.state} {state.reason}".rstrip())
        path = point.folder / LOG
        if path.exists():
            print(f"=== the end of {path}")
            with path.open(errors="replace") as file:
                print("".join(deque(file, LINES)), end="")
        elif point.slurm_id:
            print(f"=== it printed nothing; what SLURM printed is in {sweep.folder / 'slurm'}")
        else:
            print("=== it never began, so it printed nothing")
    if not points:
        print("no point failed; name one to see what it printed.")
    return exit_code(states)


def retry(sweep: Sweep, points: Sequence[Point]) -> int:
    """Run again what neither finished nor is under way, from its checkpoints and with the code it had."""
    from twoviews.sweeps import collecting
    from twoviews.sweeps.launching import again, report

    states, console = look(points), Console()
    todo = [point for point in points if states[point.digest].state in STOPPED]
    again(sweep, todo)
    if sweep.record["parent"]:
        collecting.deliver(sweep, console.say)
    wanted = {point.digest for point in points}
    points = [point for point in sweep.points if point.digest in wanted]
    states = look(points)
    report(sweep, points, states, console)
    return exit_code(states)


def collect(sweep: Sweep, points: Sequence[Point]) -> int:
    """Send to MLflow what it does not have of the points, and how they and the sweep ended."""
    from twoviews.sweeps import collecting

    left = collecting.collect(sweep, points)
    print(
        f"{sweep.name}: in MLflow are {len(points) - left:,} of {counted(len(points), 'point')}, run {sweep.record['parent']}"
    )
    return 1 if left else 0


def cancel(sweep: Sweep, points: Sequence[Point]) -> int:
    """Stop what is queued or running, with a moment for a checkpoint; MLflow is told how it ended."""
    from twoviews.sweeps import collecting
    from twoviews.sweeps.machine import stop
    from twoviews.sweeps.slurm import cancel_jobs

    states = look(points)
    active = [point for point in points if states[point.digest].active]
    waiting = [point for point in active if point.slurm_id is None and states[point.digest].state == "QUEUED"]
    active = [point for point in active if point not in waiting]
    stop([point for point in active if point.slurm_id is None])
    cancel_jobs(active)
    print(f"cancelled {counted(len(active), 'point')} of {sweep.name}")
    if waiting:
        print(
            f"waiting for the launcher on this machine, which goes on with them: {counted(len(waiting), 'point')}; end it with "
            "Ctrl-C."
        )
    if active and sweep.record["parent"]:  # what is killed before it can say so would stay as running there
        print("waiting for their ends, to tell MLflow …", flush=True)
        wanted = {point.digest for point in active}
        points = [point for point in sweep.points if point.digest in wanted]
        if not ended(points, CANCEL_S) or collecting.collect(sweep, points):
            print(
                f"MLflow was not told of all; `python -m twoviews.sweep collect {shlex.quote(sweep.name)}` does it later."
            )
    return 0


def report(sweep: Sweep, points: Sequence[Point]) -> int:
    """Write what was found so far into the sweep folder: a page, a table, pictures."""
    from twoviews.sweeps.report import report as write

    states = look(points)
    write(sweep, states, print)
    return exit_code(states)


COMMANDS: dict[str, tuple[Callable[[Sweep, Sequence[Point]], int], str]] = {
    "status": (status, "show all points"),
    "logs": (logs, "show what points printed: those named, or those that failed"),
    "report": (report, "write report.md, report.csv and pictures of what was found so far"),
    "collect": (collect, "send to MLflow what it does not have: points run with tracking=files, killed ones"),
    "retry": (retry, "run again what neither finished nor is under way"),
    "cancel": (cancel, "stop what is queued or running"),
}

if __name__ == "__main__":
    sys.exit(main())
