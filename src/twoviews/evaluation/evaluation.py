"""Evaluate one encoder by several protocols: numbers, intervals, tables and pictures, in a folder and in MLflow."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twoviews.backbones import Encoder
from twoviews.config.building import build
from twoviews.config.digest import digest, flat
from twoviews.config.recorded import overridden
from twoviews.console import Console, progress_of
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.encoders.projection import projected
from twoviews.errors import BadInput, counted
from twoviews.evaluation.comparison import Evaluation
from twoviews.evaluation.pictures import draw_confusion, draw_knn_curve, draw_per_class, published_curve
from twoviews.evaluation.preparation import prepare_evaluation
from twoviews.figures import BASELINES
from twoviews.files import write_atomic
from twoviews.protocols.classification import classification_scores
from twoviews.protocols.named import build_protocol
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.units import MAX_SHOWN, with_unit
from twoviews.runtime import format_name
from twoviews.tables import as_csv
from twoviews.tracking.metrics import log_metrics, read
from twoviews.tracking.mirror import flush
from twoviews.tracking.state import UploadState

FOLDER = "evaluation"  # below the run's: for tables and pictures


@dataclass
class CombinedResult:
    """What all protocols measured."""

    values: dict[str, float] = field(default_factory=dict)  # by name, such as knn/top1
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of some of the values
    shown: dict[str, str] = field(default_factory=dict)  # rows of the table on the console


def evaluate(
    loaded: LoadedEncoder,
    chosen_data: Callable[[], ImageData] | None,
    cfg: DictConfig,
    overrides: Sequence[str],
    console: Console,
) -> Evaluation:
    """Evaluate an encoder; each choice of protocols, settings and images has a folder in "evaluation" of the run.

    evaluation.json beside the run is that of its newest evaluation.

    Args:
        loaded: the encoder.
        chosen_data: loads the images of the command line; None: those of the run.
        cfg: the checked configuration of evaluate.py.
        overrides: of the command line.
        console: to print to.

    Raises:
        BadInput: a protocol cannot evaluate this encoder on these images.
    """
    context = prepare_evaluation(loaded, chosen_data, cfg, overrides, console)
    data, precision = context.data, format_name(context.dtype)
    encoder, prefix = _encoder(loaded, cfg.feature)
    context.encoder = encoder.to(context.device)
    nodes = protocol_nodes(cfg, overrides, loaded.config)
    protocols = {str(name): build_protocol(str(name), node) for name, node in nodes.items()}
    for note in [note for protocol in protocols.values() for note in protocol.notes(data)]:
        console.say(note)
    run_result = loaded.run.read("result.json") if loaded.run else {}
    _warn_of_training(loaded.name, run_result, precision, console)
    protocol_settings = OmegaConf.to_container(nodes, resolve=True)
    settings = {"data": _description(data), "protocol": protocol_settings, "precision": precision}
    settings["step"] = run_result.get("step")
    if loaded.preprocessing.statistics is not None:  # a run's are in its encoder.json
        settings |= {"mean": list(loaded.preprocessing.mean), "std": list(loaded.preprocessing.std)}
    folder = context.folder = loaded.folder / FOLDER / prefix / f"{'+'.join(protocols)}-{digest(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    measured = _measure(protocols, context, console)
    content = json.dumps({**measured.values, "intervals": measured.intervals, **settings}, indent=2) + "\n"
    for path in (folder / "evaluation.json", *([] if prefix else [loaded.folder / "evaluation.json"])):
        write_atomic(path, content)
    if loaded.in_run_folder:
        recorded = {f"evaluation/{prefix}{name}": value for name, value in measured.values.items()}
        _record_in_run(loaded, recorded, console)
    banks = f"kNN bank {len(data.memory or ()):,}, test {counted(len(data.test or ()), 'image')} of {data.name}"
    baselines = _baselines(loaded, data, protocol_settings)
    measured.shown |= {f"kNN of {BASELINES[name][0]}": f"{value:.2f} %" for name, value in baselines.items()}
    console.table(f"{loaded.title}: {banks}", measured.shown)
    flat_settings = {f"protocol.{key}": value for key, value in flat(protocol_settings).items()}
    flat_settings = {k: value for k, value in flat_settings.items() if not k.endswith(("_target_", "every_epochs"))}
    if len(flat_settings) <= MAX_SHOWN:
        console.say(", ".join(f"{key.removeprefix('protocol.')} {value}" for key, value in flat_settings.items()))
    console.say(f"written, with all settings, to {folder}")
    state = {key: run_result[key] for key in ("state", "epoch") if key in run_result}
    shown_settings = {**flat_settings, "data": data.name, "digest": data.digest, **state}
    about = (_mlflow_experiment(loaded), loaded.title, loaded.config, baselines)
    return Evaluation(measured.values, measured.intervals, shown_settings, *about)


def protocol_nodes(cfg: DictConfig, overrides: Sequence[str], recorded: Mapping[str, Any]) -> DictConfig:
    """The settings of each protocol: of its file, of the run's training, of the command line; the later ones win.

    Args:
        cfg: of evaluate.py.
        overrides: of the command line. A protocol that they choose by another file, such as knn_small in place of knn, has
            the settings of that file and none of the run's.
        recorded: the run's configuration; empty without a run.
    """
    chosen = next((override for override in overrides if override.startswith("protocol=")), "knn linear")
    names = re.findall(r"\w+", chosen)
    of_training = recorded.get("protocol") or {}
    taken = {}
    for name, node in cfg.protocol.items():
        protocol: Protocol = build(node)
        own = of_training.get(name, {}) if name in names else {}
        taken[name] = {**protocol.settings_from_run(recorded), **own}
    return OmegaConf.merge(cfg, {"protocol": taken}, {"protocol": overridden(cfg, overrides, "protocol")}).protocol


def _encoder(loaded: LoadedEncoder, feature: str) -> tuple[Encoder, str]:
    """The encoder to evaluate, and the prefix of the names of its values."""
    if feature == "backbone":
        return loaded.encoder, ""
    if loaded.run is None or loaded.head is not None:
        raise BadInput(f"feature=projection needs a run, and {loaded.name} is a network alone; use feature=backbone.")
    return projected(loaded.encoder, loaded.run), "projection/"


def _warn_of_training(name: str, run_result: Mapping[str, Any], precision: str, console: Console) -> None:
    """Warn if the training is not finished, or had another number format."""
    if run_result.get("state", "finished") != "finished":
        console.say(
            f"warning: {name} is {run_result['state']} after {counted(run_result.get('epoch', 0), 'epoch', '.4g')}."
        )
    if (trained := run_result.get("precision", precision)) != precision:
        console.say(
            f"evaluating in {precision}; {name} was trained, and measured during training, in {trained}, which changes the "
            "last digits."
        )


def _baselines(loaded: LoadedEncoder, data: ImageData, settings: Any) -> dict[str, float]:
    """KNN of raw pixels and of the untrained encoder from the run's training, if kNN is measured here in the same way."""
    same = loaded.in_run_folder and loaded.trained_on(data) and "knn" in settings
    of_training = (loaded.config.get("protocol") or {}).get("knn") or {}
    if not same or {**settings["knn"], "every_epochs": 0} != {**of_training, "every_epochs": 0}:
        return {}
    return {name: line[name] for line in read(loaded.folder) for name in BASELINES if name in line}


def _description(data: ImageData) -> dict[str, Any]:
    return {
        "name": data.name,
        "digest": data.digest,
        "memory": len(data.memory or ()),
        "test": len(data.test or ()),
        "size": data.size,
    }


def _measure(protocols: Mapping[str, Protocol], context: EvaluationContext, console: Console) -> CombinedResult:
    """Run all protocols; tables and pictures are written, and tables and notes shown, after each of them."""
    measured = CombinedResult()
    assert context.folder is not None
    for name, protocol in protocols.items():
        try:
            with progress_of(f"protocol {name}"):
                result = protocol(context)
                values, intervals = _write(name, result, context, f"{context.title}: {name} on {context.data.name}")
        except BaseException:
            if not any(context.folder.iterdir()):  # a refused command leaves nothing behind
                context.folder.rmdir()
            raise
        for table, rows in result.tables.items():
            console.rows(f"{name}: {table}", rows)
        for note in result.notes:
            console.say(note)
        measured.values |= values
        measured.intervals |= intervals
        if len(result.values) <= MAX_SHOWN:
            measured.shown |= {key: with_unit(key, value, intervals.get(key)) for key, value in values.items()}
        if result.advice:
            measured.shown[f"{name}/advice"] = result.advice
    return measured


def _write(
    name: str, result: EvaluationResult, context: EvaluationContext, title: str
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Write the tables and, for a classifier, the pictures of a protocol; its values and intervals by full name."""
    values, intervals, tables = dict(result.values), {}, dict(result.tables)
    assert context.folder is not None
    if result.probabilities is not None:
        scores = classification_scores(result.probabilities, context.test.y, context.data.classes)
        values, intervals = {**scores.values, **values}, scores.intervals
        tables["classes"] = scores.per_class
        draw_confusion(context.folder / f"{name}_confusion.png", scores.confusion, context.data.classes, title)
        draw_per_class(context.folder / f"{name}_classes.png", scores.per_class, title)
    for table, rows in tables.items():
        file = table if table.startswith(name) else f"{name}_{table}"
        write_atomic(context.folder / f"{file}.csv", as_csv(rows))
    order = sorted(values, key=lambda key: (not key.startswith("top"), key))
    full = {f"{name}/{key}": interval for key, interval in intervals.items()}
    return {f"{name}/{key}": values[key] for key in order}, full


def _record_in_run(loaded: LoadedEncoder, values: Mapping[str, float], console: Console) -> None:
    """Add values to the run's metrics and to its MLflow run, and draw the kNN curve of its training."""
    curve = loaded.folder / FOLDER / "knn_curve.png"
    draw_knn_curve(curve, read(loaded.folder), published_curve(loaded.config), loaded.title)
    log_metrics(loaded.folder, values)
    flush(loaded.folder, loaded.config["tracking"]["mirror"], console.say)


def _mlflow_experiment(loaded: LoadedEncoder) -> tuple[str | None, str] | None:
    """Tracking URI and experiment of the run in MLflow; None if it is not there."""
    if not loaded.in_run_folder or not loaded.config["tracking"]["mirror"]:
        return None
    state = UploadState.load(loaded.folder)
    return state.uri, state.experiment
