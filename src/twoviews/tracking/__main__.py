"""`python -m twoviews.tracking`: send run folders to MLflow later, or again; serve MLflow to many machines."""

import argparse
import sys
from pathlib import Path

from twoviews import foreign
from twoviews.errors import BadInput, system_reason
from twoviews.tracking import stores
from twoviews.tracking.metrics import NAME
from twoviews.tracking.mirror import kept
from twoviews.tracking.sending import aim, send, unsent
from twoviews.tracking.state import State, is_written

DEFAULT_FOLDERS = ("outputs", "multirun")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 everything is in MLflow, 1 something is left, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m twoviews.tracking",
        epilog="Exit code: 0 everything is in MLflow, 1 something is left, 2 bad input.",
    )
    commands = parser.add_subparsers(required=True, metavar="sync or serve")
    sync = commands.add_parser(
        "sync",
        help="send what MLflow does not have",
        description="Send run folders to MLflow: runs trained with tracking=files, runs whose server was away, runs "
        "that were killed. It can be repeated: nothing is sent twice. A run that is still training gets what its "
        "last checkpoint keeps.",
    )
    sync.add_argument("folders", nargs="*", type=Path, metavar="folder", help="default: all in outputs/ and multirun/")
    sync.add_argument("--uri", help="MLflow's store; default: the run's own tracking.uri")
    sync.add_argument("--experiment", help="MLflow's experiment; default: the run's own tracking.experiment")
    sync.set_defaults(action=_sync)
    serve = commands.add_parser(
        "serve",
        help="an MLflow server on PostgreSQL",
        description="An MLflow server on PostgreSQL, for runs on many machines; it stays in the foreground.",
    )
    serve.add_argument("--folder", type=Path, default=Path("mlflow-server"), help="of database and artifacts")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines, in a network that is trusted")
    serve.add_argument("--port", type=int, default=5000)
    serve.add_argument("--workers", type=int, default=2, help="processes of the server")
    serve.set_defaults(action=_serve)
    given = parser.parse_args(arguments)
    try:
        return given.action(given)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({system_reason(error)}).", file=sys.stderr)
        return 2


def _sync(given: argparse.Namespace) -> int:
    stores.installed()
    if given.uri:
        stores.check(given.uri)
    return max(sync_one(folder, given.uri, given.experiment) for folder in _folders(given.folders))


def _serve(given: argparse.Namespace) -> int:
    from twoviews.tracking.server import serve

    return serve(given.folder, given.host, given.port, given.workers)


def sync_one(folder: Path, uri: str | None, experiment: str | None) -> int:
    """Send one folder and print a line about it; 0 if everything is in MLflow now, 1 if not, 2 if it cannot be."""
    try:
        state = State.load(folder)
        if uri is None:
            stores.refuse_unknown(state.uri)
        aim(folder, uri or state.uri, experiment or state.experiment)
        running = is_written(folder)
        sent = send(folder, closed=not running)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # one folder or store at fault must not keep the others
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            print(
                f"error: {folder} cannot be sent: {error.filename or 'a file'}: {system_reason(error)}.",
                file=sys.stderr,
            )
            return 2
        print(f"{folder}: {unsent(folder)} points left ({kept(folder, error)})")
        return 1
    left = unsent(folder)
    later = f", still training: {left} points follow with its next checkpoints" if running and left else ""
    print(f"{folder}: run {State.load(folder).run_id}, {sent} points sent{later}")
    return 1 if left and running else 0


def _folders(given: list[Path]) -> list[Path]:
    for folder in given:
        foreign.refuse_links(folder)
        if not (folder / NAME).is_file():
            raise BadInput(f"{folder} is not a run folder (it has no {NAME}); name one, or none for all in outputs/.")
    found = given or sorted(path.parent for name in DEFAULT_FOLDERS for path in Path(name).rglob(NAME))
    if not found:
        raise BadInput(f"there is no run below {Path.cwd()}/outputs or multirun; name a run folder.")
    return found


if __name__ == "__main__":
    sys.exit(main())
