"""The life of a run folder around a training: begun or resumed, mirrored in MLflow, finished, interrupted or failed."""

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from twoviews import distributed, foreign
from twoviews.assembly import Parts, describe_data, describe_encoder, show_result
from twoviews.config import build, digest
from twoviews.console import Console
from twoviews.loop import Training
from twoviews.pictures import draw_curves, draw_views
from twoviews.run import Run
from twoviews.runtime import StopSignal, format_name, peak_memory
from twoviews.tracking import Metrics, Mirror, is_child, read, run_id, wait_for_writer

FAILED = 1  # exit code of a training that went wrong


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
        self._first = distributed.rank() == 0
        if self._first:
            tracking = build(cfg.tracking)
            resumed = any((folder / name).exists() for name in ("last.pt", "previous.pt")) and not cfg.fresh
            tracking.check(resumed or is_child(folder), console.say)
            wait_for_writer(folder)
            if cfg.fresh and (aside := self.run.set_aside()):
                console.say(f"fresh=true: the old results are in {aside}.")
            content = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
            self.run.begin(content, digest(cfg), describe_data(parts.data), parts.device)
            self._tracking = tracking
            self._state = self.run.load(console.say)
        distributed.wait_for_first()  # process 0 has put a damaged checkpoint out of the way
        if not self._first:
            self._state = self.run.load(console.say)
        else:
            self.metrics = Metrics(folder, self._state["metrics_bytes"] if self._state else 0, console.say)
            draw_views(folder / "views.png", parts.data.train, parts.views, cfg.seed)
            self.mirror: Mirror | None = self._tracking.start(folder, console.say)

    def __enter__(self) -> "Recording":
        return self

    def resume(self, training: Training) -> None:
        """Put the training where the last checkpoint left it, if there is one."""
        if self._state:
            training.restore(self._state)
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
            result = self._end(training, "finished" if finished else "interrupted")
            if self.run.folder.joinpath("metrics.jsonl").stat().st_size:
                draw_curves(self.run.folder / "curves.png", read(self.run.folder))
            self._close()
            show_result(self.run.folder, result, self.console)
            if not finished:
                self.console.say(
                    f"interrupted by {stop.name} at step {training.position.step}; the same command goes on from there."
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
        self.metrics.mark()
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
        return result

    def _close(self) -> None:
        if self.mirror:
            self.mirror.close()
            self.mirror = None
            result = self.run.read("result.json")
            if result.get("mlflow_run_id") != run_id(
                self.run.folder
            ):  # a run so short that MLflow had not answered yet
                self.run.write("result.json", {**result, "mlflow_run_id": run_id(self.run.folder)})
        if self.metrics:
            self.metrics.close()
            self.metrics = None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """A training that ended in an exception is recorded as failed, as far as the disk allows."""
        if self._first and error is not None and self.metrics:
            # On a full disk each of these may fail in turn, and the checkpoint is what matters.
            with contextlib.suppress(OSError):
                self.metrics.mark()
            with contextlib.suppress(OSError):
                self.run.write("result.json", {"state": "failed", "reason": str(distributed.explained(error))})
            with contextlib.suppress(OSError):
                self._close()
            last_line(self.run.folder)


def finished_already(cfg: DictConfig, folder: Path) -> bool:
    """Whether the folder holds this very run, finished; then its results are shown again."""
    path = folder / "result.json"
    if cfg.fresh or cfg.preview or cfg.find_batch or not path.exists():
        return False
    result = foreign.load(path)
    if result.get("state") != "finished" or foreign.load(folder / "environment.json").get("digest") != digest(cfg):
        return False
    if distributed.rank() == 0:
        console = Console()
        console.say("this run is finished; fresh=true would start it over.")
        show_result(folder, result, console)
        last_line(folder)
    return True
