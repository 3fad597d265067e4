"""Evaluate one encoder by several protocols: numbers, intervals, tables and pictures, in a folder and in MLflow."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twoviews.classifier_file import EVALUATIONS
from twoviews.config.digest import digest
from twoviews.config.recorded import overridden, recorded_runtime
from twoviews.config.values import flat
from twoviews.console import Console, progress_of
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.encoders.projection import projected
from twoviews.errors import counted, printable
from twoviews.evaluation.pictures import draw_confusion, draw_per_class
from twoviews.evaluation.record import Evaluation, EvaluationRecord
from twoviews.fallbacks import slower
from twoviews.figures import BASELINES
from twoviews.files import write_atomic
from twoviews.foreign import errors_naming
from twoviews.protocols.classification import ClassificationScores, classification_scores
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, NamedProtocol, TableRow, named_protocols
from twoviews.protocols.units import MAX_SHOWN, with_unit
from twoviews.runtime import format_name
from twoviews.tables import as_csv
from twoviews.tracking.metrics import read
from twoviews.tracking.state import UploadState
from twoviews.unseen_pixels import unseen_pixels_note


def evaluate(
    loaded: LoadedEncoder,
    load_chosen: Callable[[], ImageData] | None,
    cfg: DictConfig,
    protocols: Mapping[str, NamedProtocol],
    overrides: Sequence[str],
    console: Console,
) -> Evaluation:
    """Evaluate an encoder; each choice of protocols, settings and images has a folder in "evaluation" of the run.

    evaluation.json beside the run is that of its newest evaluation. The numbers of a protocol are stored and shown as soon as
    it has finished, so that they outlast whatever ends the command during a later one.

    Args:
        protocols: of `cfg`, without the settings of the run's training.
        loaded, load_chosen, cfg, overrides, console: see `prepare_evaluation`.

    Raises:
        BadInput: a protocol cannot evaluate this encoder on these images.
    """
    context = prepare_evaluation(loaded, load_chosen, cfg, overrides, console)
    data, precision, prefix = context.data, format_name(context.dtype), ""
    if cfg.feature == "projection":
        context.encoder, prefix = projected(loaded).to(context.device), "projection/"
    nodes = protocol_nodes(cfg, protocols, overrides, loaded.config)
    protocols = named_protocols(nodes)
    for note in [note for protocol in protocols.values() for note in protocol.notes(data)]:
        console.say(note)
    run_result = loaded.run.read("result.json") if loaded.run else {}
    _warn_of_training(loaded.name, run_result, precision, console)
    settings = _settings(loaded, data, OmegaConf.to_container(nodes, resolve=True), precision, run_result.get("step"))
    counts = settings["data"]
    folder = context.folder = loaded.folder / EVALUATIONS / prefix / f"{'+'.join(protocols)}-{digest(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    described = counted(len(data.train), "training image")
    if counts["memory"] and counts["test"]:
        described = f"kNN bank {counts['memory']:,}, test {counted(counts['test'], 'image')}"
    console.say(f"{loaded.title}: {described} of {data.name}")
    baselines = _baselines(loaded, data, settings["protocol"], console)
    flat_settings = {
        f"protocol.{key}": value
        for key, value in flat(settings["protocol"]).items()
        if not key.endswith(("_target_", "every_epochs"))
    }
    record = EvaluationRecord(loaded, folder, prefix, settings)
    try:
        _measure(protocols, context, record, baselines, console)
    finally:
        if record.values:
            record.end(flat_settings, console)
    state = {key: run_result[key] for key in ("state", "epoch") if key in run_result}
    return Evaluation(
        record.values,
        record.intervals,
        settings={**flat_settings, "data": data.name, "digest": data.digest, **state},
        mlflow_target=_mlflow_target(loaded),
        title=loaded.title,
        config=loaded.config,
        baselines=baselines,
    )


def _settings(loaded: LoadedEncoder, data: ImageData, protocols: Any, precision: str, step: Any) -> dict[str, Any]:
    """All that the values of an evaluation depend on, as evaluation.json has it; its folder is named by their digest."""
    counts = {split: len(getattr(data, split) or ()) for split in ("memory", "test")}
    for protocol in (one for one in protocols.values() if one["_target_"].endswith(".Map")):
        if counts.get(protocol["split"]) == 0:  # then it takes the training images
            protocol["split"] = "train"
    settings = {
        "data": {"name": data.name, "digest": data.digest, **counts, "size": data.size},
        "protocol": protocols,
        "precision": precision,
        "step": step,
    }
    if loaded.preprocessing.statistics_source is not None:  # a run's are in its encoder.json
        settings |= {"mean": list(loaded.preprocessing.mean), "std": list(loaded.preprocessing.std)}
    return settings


def prepare_evaluation(
    loaded: LoadedEncoder,
    load_chosen: Callable[[], ImageData] | None,
    cfg: DictConfig,
    overrides: Sequence[str],
    console: Console,
) -> EvaluationContext:
    """The context that an encoder is evaluated in; the user is told how its images are prepared and what is slow.

    Args:
        loaded: the encoder.
        load_chosen: loads the images of the command line; None: those of the run.
        cfg: the checked configuration of evaluate.py or cluster.py.
        overrides: of the command line.
        console: to print to.

    Raises:
        BadInput: the images cannot be loaded, or the encoder cannot take them.
    """
    with errors_naming(loaded.config_path):
        runtime, runtime_notes = recorded_runtime(cfg, loaded.config, overrides)
    device = runtime.torch_device()
    runtime.configure_evaluation(device)
    data, wanted = loaded.load_data(load_chosen).to(device), loaded.preprocessing
    unseen = unseen_pixels_note(loaded.encoder, wanted.channels, wanted.image_size)
    for note in filter(None, (*loaded.notes, unseen, *runtime_notes, *data.notes)):
        console.say(note)
    for sentence in slower(runtime.device, device):
        console.say_once(sentence)
    if load_chosen is None and not loaded.trained_on(data):
        console.say(
            "warning: these are not the images of the run (their digest differs), so these numbers do not describe the run's "
            "own data."
        )
    return EvaluationContext(
        loaded.encoder.to(device),
        data,
        device,
        runtime.evaluation_dtype(device),
        runtime.channels_last,
        head=loaded.head,
        title=loaded.title,
    )


def protocol_nodes(
    cfg: DictConfig, protocols: Mapping[str, NamedProtocol], overrides: Sequence[str], recorded: Mapping[str, Any]
) -> DictConfig:
    """The settings of each protocol: of its file, of the run's training, of the command line; later ones win.

    A protocol that the command line chooses by another file, such as knn_small in place of knn, has the settings of that file
    and none of the run's. `protocols` are those of `cfg`; `recorded` is the run's configuration, empty without a run.
    """
    chosen = next((override for override in overrides if override.startswith("protocol=")), None)
    names = [*cfg.protocol] if chosen is None else re.findall(r"\w+", chosen)
    of_training, taken = recorded.get("protocol") or {}, {}
    for name, protocol in protocols.items():
        own = of_training.get(name, {}) if name in names else {}
        taken[name] = {**protocol.settings_from_run(recorded), **own}
    return OmegaConf.merge(cfg, {"protocol": taken}, {"protocol": overridden(cfg, overrides, "protocol")}).protocol


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


def _baselines(loaded: LoadedEncoder, data: ImageData, settings: Any, console: Console) -> dict[str, float]:
    """KNN of raw pixels and of the untrained encoder, from the training of the run.

    Empty, after a message, if the training measured kNN with other settings; empty if it did not, or on other images.
    """
    if not loaded.in_run_folder or not loaded.trained_on(data) or "knn" not in settings:
        return {}
    baselines = {name: line[name] for line in read(loaded.folder) for name in BASELINES if name in line}
    of_training = (loaded.config.get("protocol") or {}).get("knn") or {}
    others = [
        f"protocol.knn.{key}={of_training.get(key)}"
        for key, value in settings["knn"].items()
        if key != "every_epochs" and value != of_training.get(key)
    ]
    if baselines and others:
        console.say(
            f"kNN of raw pixels and of the untrained encoder is not shown beside this kNN: the training measured it with "
            f"{' '.join(others)}."
        )
    return {} if others else baselines


def _measure(
    protocols: Mapping[str, NamedProtocol],
    context: EvaluationContext,
    record: EvaluationRecord,
    baselines: Mapping[str, float],
    console: Console,
) -> None:
    """Run all protocols; after each of them its files are written, its numbers stored, and tables and notes shown."""
    folder = context.folder
    assert folder is not None
    for number, (name, protocol) in enumerate(protocols.items(), 1):
        try:
            with progress_of(f"protocol {name}"):
                result = protocol(context)
                scores = None
                if result.probabilities is not None:
                    scores = classification_scores(result.probabilities, context.test.y, context.data.classes)
                _write_files(name, result, scores, context, folder)
        except BaseException:
            if not any(folder.iterdir()):  # a refused command leaves nothing behind
                folder.rmdir()
            raise
        values, intervals = _numbers(name, result, scores)
        record.add(values, intervals, [*protocols][number:])
        for table, rows in result.tables.items():
            _show_rows(name, table, rows, result.rows_shown, context.data, console)
        for note in result.notes:
            console.say(note)
        shown = {}
        if len(result.values) <= MAX_SHOWN:
            shown |= {key: with_unit(key, value, intervals.get(key)) for key, value in values.items()}
        if name == "knn":
            shown |= {f"kNN of {BASELINES[key][0]}": f"{value:.2f} %" for key, value in baselines.items()}
        if result.advice:
            shown[f"{name}/advice"] = result.advice
        if shown:
            console.table(name, shown)


def _write_files(
    name: str, result: EvaluationResult, scores: ClassificationScores | None, context: EvaluationContext, folder: Path
) -> None:
    """Write the tables of a protocol and, of a classifier, the pictures."""
    tables = result.tables
    if scores:
        title = f"{context.title}: {name} on {context.data.name}"
        tables = {**tables, "classes": scores.per_class}
        draw_confusion(folder / f"{name}_confusion.png", scores.confusion, context.data.classes, title)
        draw_per_class(folder / f"{name}_classes.png", scores.per_class, title)
    for table, rows in tables.items():
        write_atomic(folder / _file(name, table), as_csv(rows))


def _numbers(
    name: str, result: EvaluationResult, scores: ClassificationScores | None
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and intervals of a protocol by full name; its own values replace those of every classifier."""
    values = {**(scores.values if scores else {}), **result.values}
    order = sorted(values, key=lambda key: (not key.startswith("top"), key))
    intervals = scores.intervals if scores else {}
    return {f"{name}/{key}": values[key] for key in order}, {f"{name}/{key}": ends for key, ends in intervals.items()}


def _file(name: str, table: str) -> str:
    """The file of a protocol's table."""
    return f"{table}.csv" if table.startswith(name) else f"{name}_{table}.csv"


def _show_rows(name: str, table: str, rows: Sequence[TableRow], limit: int, data: ImageData, console: Console) -> None:
    """Show the first rows of a protocol's table, with the paths of the data's images below the folder that they share."""
    paths = [path for images in (data.train, data.memory, data.test) if images for path in images.paths or ()]
    # All paths lie between the first and the last of them in alphabetical order.
    root = os.path.commonprefix([min(paths), max(paths)]).rpartition("/")[0] if paths else ""
    first: list[TableRow] = [
        {key: cell.removeprefix(f"{root}/") if isinstance(cell, str) and root else cell for key, cell in row.items()}
        for row in rows[:limit]
    ]
    title = table if table.startswith(name) else f"{name}: {table}"
    if first != [*rows[:limit]]:
        title += f", paths below {printable(root)}"
    console.rows(title, first, len(rows), limit, f"; all are in {_file(name, table)}")


def _mlflow_target(loaded: LoadedEncoder) -> tuple[str | None, str] | None:
    """Tracking URI and experiment of the run in MLflow; None if it is not there."""
    if not loaded.in_run_folder or not loaded.config["tracking"]["mirror"]:
        return None
    state = UploadState.load(loaded.folder)
    return state.uri, state.experiment
