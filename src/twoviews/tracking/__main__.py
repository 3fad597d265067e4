"""`python -m twoviews.tracking`: send run folders to MLflow later, or again; an MLflow server for many machines; TensorBoard."""

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from twoviews import foreign
from twoviews.errors import BadInput, counted, system_reason
from twoviews.locks import is_training
from twoviews.tracking import uris
from twoviews.tracking.client import logged_error
from twoviews.tracking.metrics import METRICS_FILE
from twoviews.tracking.state import UploadState, run_id, set_target
from twoviews.tracking.upload import pending_values, upload

DONE, PENDING, BAD_INPUT = 0, 1, 2
RUNS_HELP = "a run, or a folder with runs, such as a sweep; default: all in outputs/ and multirun/"
EXIT_CODES = "Exit code: 0 everything is in MLflow, 1 something is left, 2 bad input."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m twoviews.tracking", epilog=EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="sync, tensorboard or serve")
    sync = commands.add_parser(
        "sync",
        help="send what MLflow does not have",
        description="Send run folders to MLflow: runs trained with tracking=files, runs whose server was away, runs "
        "that were killed. It can be repeated: nothing is sent twice. Of a run that is still training, what its last "
        "checkpoint keeps is sent.",
    )
    sync.add_argument("folders", nargs="*", type=Path, metavar="folder", help="default: all in outputs/ and multirun/")
    sync.add_argument("--uri", help="MLflow's tracking URI; default: the run's own tracking.uri")
    sync.add_argument("--experiment", help="MLflow's experiment; default: the run's own tracking.experiment")
    sync.set_defaults(command=_sync)
    convert = commands.add_parser(
        "tensorboard",
        help="write TensorBoard's event files",
        description="Convert metrics.jsonl of runs to TensorBoard's event files; again replaces them.",
    )
    convert.add_argument("folders", nargs="*", type=Path, metavar="folder", help=RUNS_HELP)
    convert.add_argument("--out", type=Path, default=Path("tensorboard"), help="a folder for each run is made in it")
    convert.set_defaults(command=_tensorboard)
    serve = commands.add_parser(
        "serve",
        help="an MLflow server on PostgreSQL",
        description="An MLflow server on PostgreSQL, for runs on many machines; it stays in the foreground.",
    )
    serve.add_argument("--folder", type=Path, default=Path("mlflow-server"), help="of database and artifacts")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines, in a network that is trusted")
    serve.add_argument("--port", type=int, default=5000)
    serve.add_argument("--workers", type=int, default=2, help="processes of the server")
    serve.set_defaults(command=_serve)
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({system_reason(error)}).", file=sys.stderr)
        return BAD_INPUT


def _sync(options: argparse.Namespace) -> int:
    uris.require_mlflow()
    if options.uri:
        uris.check_reachable(options.uri)
    return max(sync_folder(folder, options.uri, options.experiment) for folder in _folders(options.folders))


def _tensorboard(options: argparse.Namespace) -> int:
    from twoviews.tracking import tensorboard

    if importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "TensorBoard is not installed in this environment; install it: python -m pip install tensorboard."
        )
    runs = [run for folder in options.folders for run in _runs_in(folder)] or _folders([])
    for run, place in tensorboard.places(list(dict.fromkeys(runs)), options.out).items():
        foreign.refuse_links(run)
        print(f"{run}: {counted(tensorboard.convert(run, place), 'value')} written to {place}", flush=True)
    print(f"tensorboard --logdir {shlex.quote(str(options.out))}")
    return DONE


def _runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder, or the folder itself if it is one."""
    runs = [folder] if (folder / METRICS_FILE).is_file() else sorted(path.parent for path in folder.rglob(METRICS_FILE))
    if not runs:
        raise BadInput(f"{folder} is no run folder and has none in it (no {METRICS_FILE}); name one, or none for all.")
    return runs


def _serve(options: argparse.Namespace) -> int:
    from twoviews.tracking.server import serve

    return serve(options.folder, options.host, options.port, options.workers)


def sync_folder(folder: Path, uri: str | None, experiment: str | None) -> int:
    """Send one run folder and print a line about it; returns the exit code."""
    try:
        state = UploadState.load(folder)
        if uri is None:
            uris.refuse_untrusted(state.uri)
        set_target(folder, uri or state.uri, experiment or state.experiment)
        training = is_training(folder)
        sent = upload(folder, closed=not training)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # a fault of one folder or of the server must not keep the other folders from being sent
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            reason = f"{error.filename or 'a file'}: {system_reason(error)}"
            print(f"error: {folder} cannot be sent: {reason}.", file=sys.stderr)
            return BAD_INPUT
        print(f"{folder}: {counted(pending_values(folder), 'value')} left ({logged_error(error, folder)})")
        return PENDING
    pending = pending_values(folder)
    more = f"{counted(pending, 'value')} to follow with its next checkpoints"
    later = f", still training: {more}" if training and pending else ""
    print(f"{folder}: run {run_id(folder)}, {counted(sent, 'value')} sent{later}")
    return PENDING if training and pending else DONE


def _folders(named: list[Path]) -> list[Path]:
    for folder in named:
        foreign.refuse_links(folder)
        if not (folder / METRICS_FILE).is_file():
            raise BadInput(
                f"{folder} is not a run folder (it has no {METRICS_FILE}); name one, or none for all in outputs/."
            )
    folders = named or sorted(
        path.parent for name in ("outputs", "multirun") for path in Path(name).rglob(METRICS_FILE)
    )
    if not folders:
        raise BadInput(f"there is no run below {Path.cwd()}/outputs or multirun; name a run folder.")
    return folders


if __name__ == "__main__":
    sys.exit(main())
