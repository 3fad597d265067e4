"""`python -m twoviews.tracking`: send run folders to MLflow later, or again; an MLflow server for many machines; TensorBoard."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from twoviews import foreign
from twoviews.errors import BadInput, counted, system_reason
from twoviews.locks import is_training
from twoviews.tracking import uris
from twoviews.tracking.client import logged_error
from twoviews.tracking.metrics import METRICS_FILE, lines, metric_values
from twoviews.tracking.state import NAME_TAG, UploadState, run_id, set_target
from twoviews.tracking.upload import pending_values, upload

DONE, PENDING, BAD_INPUT = 0, 1, 2
EVENTS_SUFFIX = ".twoviews"  # of the event files written here
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
    sync.add_argument("--uri", help="MLflow's tracking URI; default: the run's own tracking.uri")
    sync.add_argument("--experiment", help="MLflow's experiment; default: the run's own tracking.experiment")
    sync.set_defaults(command=_sync)
    convert = commands.add_parser(
        "tensorboard",
        help="write TensorBoard's event files",
        description="Convert metrics.jsonl of runs to TensorBoard's event files; again replaces them.",
    )
    convert.add_argument("--out", type=Path, default=Path("tensorboard"), help="a folder for each run is made in it")
    convert.set_defaults(command=_tensorboard)
    for command in (sync, convert):
        runs_help = "a run, or a folder with runs, such as a sweep; default: all in outputs/ and multirun/"
        command.add_argument("folders", nargs="*", type=Path, metavar="folder", help=runs_help)
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
        reason = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{error.filename or 'a file'} cannot be used ({system_reason(error)})."
    print(f"error: {reason}", file=sys.stderr)
    return BAD_INPUT


def _sync(options: argparse.Namespace) -> int:
    uris.require_mlflow()
    if options.uri:
        uris.check_reachable(options.uri)
    return max(_sync_folder(folder, options.uri, options.experiment) for folder in _runs(options.folders))


def _tensorboard(options: argparse.Namespace) -> int:
    """Write an event file for each run, in place of that of an earlier call.

    Steps and times are those of metrics.jsonl. TensorBoard keeps values in single precision. The configuration is the text
    `config`.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "TensorBoard is not installed in this environment; install it: python -m pip install tensorboard."
        )
    from torch.utils.tensorboard import SummaryWriter

    for out, run in _event_folders(_runs(options.folders), options.out).items():
        foreign.refuse_links(run)
        recorded = [line for _, line in lines(run / METRICS_FILE)]
        for earlier in out.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"):
            earlier.unlink()
        with SummaryWriter(str(out), filename_suffix=EVENTS_SUFFIX) as writer:
            if config := foreign.text(run / "config.yaml"):
                writer.add_text("config", f"```yaml\n{config}\n```", walltime=recorded[0]["time"] if recorded else None)
            for line in recorded:
                for name, value in metric_values(line).items():
                    writer.add_scalar(name, value, line["step"], walltime=line["time"])
        print(f"{run}: {counted(sum(map(len, map(metric_values, recorded))), 'value')} written to {out}", flush=True)
    print(f"tensorboard --logdir {shlex.quote(str(options.out))}")
    return DONE


def _event_folders(runs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The run folders by the folder below `out` of each: its path from here, with a job's name in place of its digest."""
    folders: dict[Path, Path] = {}
    for run in runs:
        path = run.resolve()
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-2:])
        target = out / path.with_name(UploadState.load(run).tags.get(NAME_TAG, path.name).replace("/", "_"))
        if (other := folders.setdefault(target, run)) != run:
            raise BadInput(f"{other} and {run} would both be written to {target}; convert them one by one, --out.")
    return folders


def _serve(options: argparse.Namespace) -> int:
    from twoviews.tracking.server import serve

    return serve(options.folder, options.host, options.port, options.workers)


def _runs(folders: list[Path]) -> list[Path]:
    """The runs that these folders are or have in them, each once; without any folder those in outputs/ and multirun/."""
    runs: dict[Path, None] = {}
    for folder in folders or [Path("outputs"), Path("multirun")]:
        files = [folder / METRICS_FILE] if (folder / METRICS_FILE).is_file() else sorted(folder.rglob(METRICS_FILE))
        if folders and not files:
            raise BadInput(
                f"{folder} is no run folder and has none in it (no {METRICS_FILE}); name one, or none for all in outputs/."
            )
        runs |= dict.fromkeys(file.parent for file in files)
    if not runs:
        raise BadInput(f"there is no run below {Path.cwd()}/outputs or multirun; name a run folder.")
    return [*runs]


def _sync_folder(folder: Path, uri: str | None, experiment: str | None) -> int:
    """Send one run folder and print a line about it; returns the exit code."""
    try:
        foreign.refuse_links(folder)
        state = UploadState.load(folder)
        if uri is None:
            uris.refuse_untrusted(state.uri)
        set_target(folder, uri or state.uri, experiment or state.experiment)
        training = is_training(folder)
        sent = upload(folder, training_ended=not training)
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
    return PENDING if later else DONE


if __name__ == "__main__":
    sys.exit(main())
