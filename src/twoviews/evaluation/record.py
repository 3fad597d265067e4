"""The numbers of an evaluation in its folder, and in the metrics of the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.classifier_file import EVALUATIONS
from twoviews.console import Console
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.evaluation.pictures import draw_knn_curve
from twoviews.figures import files_of
from twoviews.files import shortened, write_atomic
from twoviews.protocols.units import MAX_SHOWN
from twoviews.tracking.metrics import log_metrics, read
from twoviews.tracking.mirror import flush


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a run, and how."""

    values: Mapping[str, float]  # by name, such as knn/top1
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of some of the values
    settings: Mapping[str, object] = field(default_factory=dict)  # of the protocols, such as knn.k
    mlflow_target: tuple[str | None, str] | None = (
        None  # tracking URI and experiment of the run; None: it is not mirrored
    )
    title: str = ""  # method, data and epochs
    config: Mapping[str, Any] = field(default_factory=dict)  # of the training; empty without a run
    baselines: Mapping[str, float] = field(default_factory=dict)  # kNN, as in metrics.jsonl, where they are comparable


class EvaluationRecord:
    """What the protocols have measured so far, on the disk after each of them.

    Args:
        loaded: the encoder.
        folder: of this evaluation; it exists.
        prefix: of the names of the values in the metrics of the run.
        settings: all that the values depend on.

    Raises:
        BadInput: evaluation.json, of an earlier evaluation with these settings, is damaged.
    """

    def __init__(self, loaded: LoadedEncoder, folder: Path, prefix: str, settings: Mapping[str, Any]):
        self._loaded, self._folder, self._prefix, self._settings = loaded, folder, prefix, settings
        # The step tells weights of a run apart; without one, stored values may be of other weights.
        self._earlier = {} if settings.get("step") is None else foreign.load(folder / "evaluation.json")
        self.values: dict[str, float] = {}  # by name, such as knn/top1
        self.intervals: dict[str, tuple[float, float]] = {}  # of some of the values

    def add(
        self, values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], remaining: Sequence[str]
    ) -> None:
        """Store the values of a protocol in evaluation.json and in the metrics of the run.

        Args:
            values: by full name.
            intervals: of some of them.
            remaining: protocols that are still to be run, whose values of an earlier evaluation with these settings are kept.
        """
        self.values |= values
        self.intervals |= intervals
        kept, kept_intervals = (
            {name: value for name, value in earlier.items() if name.partition("/")[0] in remaining}
            for earlier in (self._earlier, self._earlier.get("intervals", {}))
        )
        numbers = {**kept, **self.values, "intervals": {**kept_intervals, **self.intervals}}
        content = json.dumps({**numbers, **self._settings}, indent=2) + "\n"
        write_atomic(self._folder / "evaluation.json", content)
        if not self._prefix:
            write_atomic(self._loaded.folder / "evaluation.json", content)
        if self._loaded.in_run_folder:
            named = {f"evaluation/{self._prefix}{name}": value for name, value in values.items()}
            log_metrics(self._loaded.folder, named)

    def end(self, settings: Mapping[str, object], console: Console) -> None:
        """Say by which settings it was measured, if they are few, and where the files are; draw the kNN curve of the training,
        and send all to MLflow."""
        if len(settings) <= MAX_SHOWN:
            console.say(", ".join(f"{key.removeprefix('protocol.')} {value}" for key, value in settings.items()))
        files = sorted(f"{path.name}/" if path.is_dir() else path.name for path in self._folder.iterdir())
        console.say(f"written to {shortened(self._folder)}: {', '.join(files)}; evaluation.json has all settings")
        if self._loaded.in_run_folder:
            curve = self._loaded.folder / EVALUATIONS / "knn_curve.png"
            if draw_knn_curve(curve, read(self._loaded.folder), self._loaded.title):
                console.say(f"written to {shortened(curve.parent)}: {', '.join(file.name for file in files_of(curve))}")
            flush(self._loaded.folder, self._loaded.config["tracking"]["mirror"], console.say)
