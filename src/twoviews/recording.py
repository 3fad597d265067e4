"""The life of a run folder around a training: begun or resumed, mirrored in MLflow, finished, interrupted or failed."""

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from twoviews import distributed, foreign, process_group
from twoviews.assembly import Parts, describe_data, describe_encoder
from twoviews.config.building import build
from twoviews.config.digest import digest
from twoviews.console import Console
from twoviews.errors import BadInput, Stopped
from twoviews.locks import FolderLock, lock_for_training
from twoviews.loop import Training
from twoviews.pictures import draw_curves, draw_views
from twoviews.run import CHECKPOINTS, Run
from twoviews.run_summary import show_result
from twoviews.runtime import format_name, peak_memory
from twoviews.stop_signal import StopSignal
from twoviews.tracking.metrics import Metrics, read
from twoviews.tracking.mirror import Mirror, flush
from twoviews.tracking.state import is_child, run_id, set_target
from twoviews.tracking.upload import is_uploaded

FAILED = 1  # exit code of a training that went wrong
IMPATIENT_S = 5.0  # that MLflow gets for the end of a run which is to stop


def last_line(folder: Path) -> None:
    """What every run ends its output with."""
    print(f"run: {folder}", flush=True)


class Recording:
    """A run folder open for one training; a context, so that whatever happens the end is recorded.

    Args:
        cfg: the checked configuration.
        folder: the run folder.
        parts: what is trained.
        console: where a person looks.

    Raises:
        BadInput: the folder holds another run or is being trained into, or MLflow does not answer a new run.
    """

    def __init__(self, cfg: DictConfig, folder: Path, parts: Parts, console: Console):

        self.cfg, self.parts, self.console = cfg, parts, console
        self.run, self.metrics, self.mirror = Run(folder), None, None
        self._training: Training | None = None
        self._ended = False  # result.json says how
        self._first = distributed.rank() == 0
        if self._first:
            tracking = build(cfg.tracking)
            resumed = any((folder / name).exists() for name in CHECKPOINTS) and not cfg.fresh
            tracking.check(resumed or is_child(folder), console.say)
            lock = lock_for_training(folder)
            try:
                lock = self._begin(lock)
            except BaseException:
                lock.release()
                raise
        process_group.wait_for_first()  # process 0 has put a damaged checkpoint out of the way
        if not self._first:
            self._state = self.run.load(console.say)
        else:
            self.metrics = Metrics(folder, self._state["metrics_bytes"] if self._state else 0, console.say, lock)
            try:
                draw_views(folder / "views.png", parts.data.train, parts.views, cfg.seed)
                self.mirror: Mirror | None = tracking.start(folder, console.say)
            except BaseException:
                self.metrics.close()
                raise

    def _begin(self, lock: FolderLock) -> FolderLock:
        """Make the folder that of this run, and load its last checkpoint; the lock of the folder that is there then."""
        cfg, folder = self.cfg, self.run.folder
        if _finished(cfg, folder):
            raise BadInput(
                f"another command has just finished the run in {folder}; the same command shows its results."
            )
        if cfg.fresh and (aside := self.run.set_aside()):
            self.console.say(f"fresh=true: the old results are in {aside}.")
            lock.release()
            lock = lock_for_training(folder)
        content = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        self.run.begin(content, digest(cfg), describe_data(self.parts.data), self.parts.device)
        self._state = self.run.load(self.console.say)
        return lock

    def __enter__(self) -> "Recording":
        return self

    def resume(self, training: Training) -> None:
        """Put the training where the last checkpoint left it, if there is one."""
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
                self.console.say(
                    f"warning: the run was begun in {before} and goes on in {now}, which runtime.precision=auto means on this "
                    f"device; for {before} throughout, interrupt it and continue on a device of the first kind."
                )
            if self._first:  # of the step where it was interrupted: after a kill -9 it would pass for the last one's
                self.run.folder.joinpath("encoder.safetensors").unlink(missing_ok=True)
        self._state = None

    def finish(self, training: Training, finished: bool, stop: StopSignal) -> int:
        """Write encoder and result, show the table; 0, or 128 + n after signal n."""
        if self._first:
            if training.position.step:  # before that it would be an untrained one
                self.run.save_encoder(training.method.encoder, describe_encoder(self.cfg, self.parts.data))
            assert self.metrics
            if self.metrics.flush():
                draw_curves(self.run.folder / "curves.png", read(self.run.folder))
            # Last of all files: with it the run is finished, and nothing would make up for what is missing.
            result = self._end(training, "finished" if finished else "interrupted")
            with contextlib.suppress(Stopped), contextlib.nullcontext() if stop.number else stop.at_once():
                self._close(IMPATIENT_S if stop.number else 60)
            show_result(self.run.folder, result, self.console)
            if not finished:
                where = "there" if training.whole else "the checkpoint before it"
                self.console.say(
                    f"interrupted by {stop.name} at step {training.position.step}; the same command goes on from {where}."
                )
            last_line(self.run.folder)
        return 0 if finished else 128 + stop.number

    def fail(self, training: Training, reason: str) -> int:
        """Write down that the training went wrong, and say why; 1."""
        if self._first:
            self._end(training, "failed", reason=reason)
            self._close()
            print(f"error: {reason}", file=sys.stderr)
            last_line(self.run.folder)
        return FAILED

    def _end(self, training: Training, state: str, **more: Any) -> dict[str, Any]:
        assert self.metrics
        self.metrics.flush()
        result = {
            "state": state,
            **training.latest,
            **peak_memory(training.device),
            "step": training.position.step,
            "epoch": training.epoch,
            "seconds": training.seconds(),
            "precision": format_name(training.dtype),
            "mlflow_run_id": run_id(self.run.folder),
            **more,
        }
        self.run.write("result.json", result)
        self._ended = True
        return result

    def _close(self, timeout_s: float = 60) -> None:
        mirror, self.mirror = self.mirror, None
        if mirror:
            mirror.close(timeout_s)
        if self.metrics:
            self.metrics.close()
            self.metrics = None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """What ended in an exception is recorded as failed, or after a second Ctrl-C as interrupted, if the disk allows."""
        error = process_group.cause_of(error) if error else None
        if self._first and error is not None and self.metrics and not isinstance(error, Stopped):
            stopped = isinstance(error, KeyboardInterrupt)
            result: dict[str, Any] = {"state": "interrupted" if stopped else "failed"}
            result["reason"] = "a second Ctrl-C" if stopped else str(error)
            if self._training:
                result |= {"step": self._training.position.step, "epoch": self._training.epoch}
            # On a full disk each of these may fail in turn, and the checkpoint is what matters.
            with contextlib.suppress(OSError):
                self.metrics.flush()
            with contextlib.suppress(OSError):
                if not self._ended:
                    self.run.write("result.json", result)
            try:
                with contextlib.suppress(OSError):
                    self._close(IMPATIENT_S if stopped else 60)
            finally:  # whoever is in a hurry presses Ctrl-C again
                last_line(self.run.folder)


def _finished(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """result.json if the folder holds this very run, finished, and it is not to be started over."""
    if cfg.fresh:
        return None
    result = foreign.load(folder / "result.json")
    same = result.get("state") == "finished" and foreign.load(folder / "environment.json").get("digest") == digest(cfg)
    return result if same else None


def finished_already(cfg: DictConfig, folder: Path) -> bool:
    """Whether the folder holds this very run, finished; then MLflow gets what it lacks, and the results are shown again."""
    result = None if cfg.preview or cfg.find_batch else _finished(cfg, folder)
    if result and distributed.rank() == 0:
        console, tracking = Console(), build(cfg.tracking)
        console.say("this run is finished; fresh=true would start it over.")
        if tracking.mirror:
            tracking.check(optional=True, say=console.say)
            set_target(folder, tracking.uri, tracking.experiment)
            if not is_uploaded(folder):  # killed, or without an answer, before the end was told
                flush(folder, mirror=True, say=console.say)
        show_result(folder, result, console)
        last_line(folder)
    return bool(result)
