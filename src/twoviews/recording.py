"""A training in its run folder: begun or resumed, mirrored to MLflow, and recorded as finished, interrupted or failed."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twoviews import distributed, foreign, process_group
from twoviews.assembly import Parts, describe_data, describe_encoder
from twoviews.checkpoints import has_checkpoint, load_last_checkpoint
from twoviews.code import code_state
from twoviews.config.building import build
from twoviews.config.digest import NOT_IN_DIGEST, digest, without_unused
from twoviews.config.values import flat, plain
from twoviews.console import Console
from twoviews.encoder_file import WEIGHTS_FILE, save_encoder
from twoviews.environment import environment
from twoviews.errors import BadInput, Stopped
from twoviews.figures import training_title
from twoviews.files import write_atomic
from twoviews.locks import FolderLock, lock_for_training
from twoviews.loop import Training
from twoviews.pictures import draw_curves, draw_views
from twoviews.run import Run
from twoviews.run_summary import show_result
from twoviews.runtime import format_name, peak_memory
from twoviews.stop_signal import StopSignal
from twoviews.tracking.metrics import Metrics, read
from twoviews.tracking.mirror import Mirror, flush
from twoviews.tracking.state import PARENT_TAG, UploadState, run_id, set_target

FAILED = 1  # exit code of a training that went wrong
MIRROR_TIMEOUT_S = 60.0  # for MLflow to take the end of a run
STOPPED_MIRROR_TIMEOUT_S = 5.0  # the same after a signal, when little time may be left
DIVERGED_REMEDY = "lower optimizer.lr, lengthen schedule.warmup_epochs, or use runtime.precision=fp32"
MAX_CHANGED_KEYS = 3  # in a message


def show_if_finished(cfg: DictConfig, folder: Path) -> bool:
    """Whether the folder holds this very run, finished; its results are shown again, and MLflow gets what it lacks."""
    result = None if cfg.preview or cfg.find_batch else _finished_result(cfg, folder)
    if result and distributed.rank() == 0:
        console, tracking = Console(), build(cfg.tracking)
        console.say("this run is finished; fresh=true would start it over.")
        if tracking.mirror:
            tracking.check(optional=True, say=console.say)
            set_target(folder, tracking.uri, tracking.experiment, encoder=tracking.encoder)
            flush(folder, mirror=True, say=console.say)  # it may have been killed before the end was sent
        show_result(folder, result, cfg.get("protocol") or (), console)
        print_last_line(folder)
    return bool(result)


def print_last_line(folder: Path) -> None:
    """Print the line that names the run folder, with which the output of every run ends."""
    print(f"run: {folder}", flush=True)


class Recording:
    """A run folder that is open for one training; a context manager, so that the end is recorded whatever happens.

    Args:
        cfg: the checked configuration.
        folder: the run folder.
        parts: what is trained.
        console: shows messages and results.

    Raises:
        BadInput: the folder holds another run or another process uses it, or MLflow does not answer a new run.
    """

    def __init__(self, cfg: DictConfig, folder: Path, parts: Parts, console: Console):
        self.cfg, self.parts, self.console = cfg, parts, console
        self.run, self.metrics = Run(folder), None
        self._mirror: Mirror | None = None
        self._training: Training | None = None
        self._result_written = False
        self._first = distributed.rank() == 0
        if self._first:
            tracking = build(cfg.tracking)
            resumed = has_checkpoint(folder) and not cfg.fresh
            tracking.check(resumed or PARENT_TAG in UploadState.load(folder).tags, console.say)
            lock = self._begin()
        process_group.wait_for_first()  # process 0 has renamed a damaged checkpoint
        if not self._first:
            self._state = load_last_checkpoint(folder, console.say)
        else:
            self.metrics = Metrics(folder, self._state["metrics_bytes"] if self._state else 0, console.say, lock)
            try:
                draw_views(folder / "views.png", parts.data.train, parts.views, cfg.seed)
                self._mirror = tracking.start(folder, console.say)
            except BaseException:
                self.metrics.close()
                raise

    def _begin(self) -> FolderLock:
        """Lock the folder, record the run in it, and load its last checkpoint; returns the lock."""
        cfg, folder = self.cfg, self.run.folder
        lock = lock_for_training(folder)
        try:
            if _finished_result(cfg, folder):
                raise BadInput(
                    f"another command has just finished the run in {folder}; the same command shows its results."
                )
            if cfg.fresh and (renamed := self.run.set_aside()):
                self.console.say(f"fresh=true: the old results are in {renamed}.")
                lock.release()  # it is that of the renamed folder
                lock = lock_for_training(folder)
            record_start(self.run, cfg, self.parts)
            self._state = load_last_checkpoint(folder, self.console.say)
        except BaseException:
            lock.release()
            raise
        return lock

    def __enter__(self) -> "Recording":
        return self

    def resume(self, training: Training) -> None:
        """Restore the training from the last checkpoint, if there is one."""
        self._training = training
        if self._state:
            try:
                training.restore(self._state)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise BadInput(
                    f"the checkpoint in {self.run.folder} is of another network or another version ({foreign.short(error)}); put "
                    "that of the run back, or start over with fresh=true, which keeps the old results beside it."
                ) from error
            self.console.say(f"resuming at step {training.position.step} (epoch {training.epoch:.2f}).")
            before, now = self._state.get("precision"), format_name(training.dtype)
            if before not in (None, now):
                other = " or with TWOVIEWS_CPU_BF16=1 in the environment" if before == "bfloat16" else ""
                self.console.say(
                    f"warning: the run was begun in {before} and goes on in {now}, which runtime.precision=auto means on this "
                    f"device; for {before} throughout, interrupt it and continue on a device of the first kind{other}."
                )
            if self._first:  # remove the interrupted run's encoder: after kill -9 it would look current
                self.run.folder.joinpath(WEIGHTS_FILE).unlink(missing_ok=True)
        self._state = None

    def finish(self, training: Training, finished: bool, stop: StopSignal) -> int:
        """Write encoder and result and show the table; returns exit code 0, or 128 + n after signal n."""
        folder = self.run.folder
        if self._first:
            if training.position.step:  # before, it would be an untrained one
                save_encoder(folder, training.method.encoder, describe_encoder(self.cfg, self.parts.data))
            assert self.metrics
            if self.metrics.flush():
                title = training_title(self.cfg, self.parts.data.name, training.epoch)
                draw_curves(folder / "curves.png", read(folder), title)
            # The last of all files: with it the run counts as finished, and nothing would add a file that is missing.
            result = self._write_result(training, "finished" if finished else "interrupted")
            with contextlib.suppress(Stopped), contextlib.nullcontext() if stop.number else stop.at_once():
                self._close(STOPPED_MIRROR_TIMEOUT_S if stop.number else MIRROR_TIMEOUT_S)
            show_result(folder, result, self.parts.protocols, self.console)
            if not finished:
                where = "the checkpoint before it" if training.in_e_step else "there"
                self.console.say(
                    f"interrupted by {stop.name} at step {training.position.step}; the same command goes on from {where}."
                )
            print_last_line(folder)
        return 0 if finished else 128 + stop.number

    def fail(self, training: Training, reason: str) -> int:
        """Record that the training diverged, and print why and what to do; returns the exit code."""
        reason = f"{reason}: {DIVERGED_REMEDY}."
        if self._first:
            self._write_result(training, "failed", reason=reason, diverged=True)
            self._close()
            print(f"error: {reason}", file=sys.stderr)
            print_last_line(self.run.folder)
        return FAILED

    def _write_result(self, training: Training, state: str, **more: Any) -> dict[str, Any]:
        assert self.metrics
        self.metrics.flush()
        result = {
            "state": state,
            **training.monitor.latest,
            **peak_memory(training.device),
            "step": training.position.step,
            "epoch": training.epoch,
            "seconds": training.seconds(),
            "precision": format_name(training.dtype),
            "mlflow_run_id": run_id(self.run.folder),
            **more,
        }
        self.run.write("result.json", result)
        self._result_written = True
        return result

    def _close(self, timeout_s: float = MIRROR_TIMEOUT_S) -> None:
        mirror, self._mirror = self._mirror, None
        if mirror:
            mirror.close(timeout_s)
        if self.metrics:
            self.metrics.close()
            self.metrics = None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Record an exception as a failure, or a second Ctrl-C as an interruption, if the disk takes it."""
        error = process_group.cause_of(error) if error else None
        if not self._first or error is None or not self.metrics or isinstance(error, Stopped):
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        result: dict[str, Any] = {"state": "interrupted" if interrupted else "failed"}
        result["reason"] = "a second Ctrl-C" if interrupted else str(error)
        if self._training:
            result |= {"step": self._training.position.step, "epoch": self._training.epoch}
        # On a full disk each of these may fail in turn; what matters is the checkpoint.
        with contextlib.suppress(OSError):
            self.metrics.flush()
        with contextlib.suppress(OSError):
            if not self._result_written:
                self.run.write("result.json", result)
        try:
            with contextlib.suppress(OSError):
                self._close(STOPPED_MIRROR_TIMEOUT_S if interrupted else MIRROR_TIMEOUT_S)
        finally:  # also after another Ctrl-C
            print_last_line(self.run.folder)


def record_start(run: Run, cfg: DictConfig, parts: Parts) -> None:
    """Record configuration, code state, environment and data; where a run was begun, check that it is this one.

    Raises:
        BadInput: the folder holds a run with another configuration or other images.
    """
    config, data = plain(cfg), describe_data(parts.data)
    if recorded := run.read("environment.json"):
        if recorded["digest"] != digest(cfg):
            raise BadInput(
                f"{run.folder} holds a run with other settings ({_changed_keys(run.config(), config)}); start over with "
                "fresh=true, which keeps the old results beside it, or choose another folder with hydra.run.dir=."
            )
        if run.read("data.json", needed=True)["digest"] != data["digest"]:
            raise BadInput(
                f"the images of {data['name']} are not those that {run.folder} was trained on; put them back, or start over "
                "with fresh=true, which keeps the old results beside it."
            )
        return
    write_atomic(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    commit, diff = code_state()
    write_atomic(run.folder / "commit.txt", commit + "\n")
    if diff:
        write_atomic(run.folder / "diff.patch", diff)
    run.write("data.json", data)
    run.write(
        "environment.json", {**environment(parts.device), "digest": digest(cfg)}
    )  # last: it says that all is there


def _changed_keys(recorded: dict[str, Any], config: dict[str, Any]) -> str:
    """The first keys whose values differ, as part of a sentence."""
    before, now = without_unused(flat(recorded)), without_unused(flat(config))
    keys = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not key.startswith(NOT_IN_DIGEST)
        and (key, before.get(key)) != ("runtime.compile", False)  # an option that no longer exists
    ]
    shown = [
        f"{key} is {before.get(key, 'absent')} there and {now.get(key, 'absent')} here"
        for key in keys[:MAX_CHANGED_KEYS]
    ]
    return "; ".join(shown) + ("; …" if len(keys) > MAX_CHANGED_KEYS else "")


def _finished_result(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The content of result.json if the folder holds this very run, finished, and it is not to be started over."""
    if cfg.fresh:
        return None
    result = foreign.load(folder / "result.json")
    same = result.get("state") == "finished" and foreign.load(folder / "environment.json").get("digest") == digest(cfg)
    return result if same else None
