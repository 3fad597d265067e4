"""One encoder context by protocols: numbers with intervals and settings, tables and pictures, beside the run and in MLflow."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twoviews.assembly import recorded_data
from twoviews.backbones import Encoder, left_over
from twoviews.config.building import build
from twoviews.config.digest import digest, flat
from twoviews.config.recorded import overridden, recorded_runtime
from twoviews.console import Console
from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.evaluation.comparison import Evaluation, as_csv
from twoviews.evaluation.pictures import draw_confusion, draw_knn_curve, draw_per_class, published_curve
from twoviews.evaluation.projection import projected
from twoviews.evaluation.scores import scores
from twoviews.evaluation.source import Source
from twoviews.fallbacks import slower
from twoviews.files import write_atomic
from twoviews.foreign import blamed
from twoviews.protocols.health import advice
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.run import Run
from twoviews.runtime import format_name
from twoviews.tracking.metrics import log_metrics, read
from twoviews.tracking.mirror import flush
from twoviews.tracking.state import UploadState

FEW = 12  # values of a protocol that are shown as they are; those with more have a table of them
FOLDER = "evaluation"  # of tables and pictures, in the run's


def protocols(cfg: DictConfig, asked: Sequence[str], recorded: Mapping[str, Any] | None) -> DictConfig:
    """The protocols' nodes: the numbers that the run used, unless another file was chosen; then what the command says.

    Args:
        cfg: of evaluate.py.
        asked: the command's overrides.
        recorded: the run's configuration; None if it is no run.
    """
    plain = re.findall(r"\w+", next((one for one in asked if one.startswith("protocol=")), "knn linear"))
    there = (recorded or {}).get("protocol") or {}
    used = {name: there[name] for name in cfg.protocol if name in there and name in plain}
    if probe := there.get("linear"):  # the run's own, also for those that classify with it
        for name in (name for name, node in cfg.protocol.items() if "linear" in node):
            used[name] = {"linear": probe, **used.get(name, {})}
        if "predict" in cfg.protocol:
            shared = {key: value for key, value in probe.items() if key in cfg.protocol.predict and key[0] != "_"}
            used["predict"] = {**shared, **used.get("predict", {})}
    return OmegaConf.merge(cfg, {"protocol": used}, {"protocol": overridden(cfg, asked, "protocol")}).protocol


def evaluate(
    source: Source, given: Callable[[], ImageData] | None, cfg: DictConfig, asked: Sequence[str], console: Console
) -> Evaluation:
    """Measure, show and write down; each choice of protocols, settings and images has a folder in "evaluation" of the run.

    evaluation.json beside the run is that of the newest evaluation of its features.

    Args:
        source: the encoder.
        given: the images of the command line; None: those of the run.
        cfg: the checked configuration of evaluate.py.
        asked: the command's overrides.
        console: where a person looks.

    Raises:
        BadInput: a protocol cannot judge this encoder on these images.
    """
    recorded = OmegaConf.create(source.config or {})
    run = Run(source.origin) if source.origin else None
    path = (source.origin or source.folder) / "config.yaml"
    with blamed(path):
        runtime, notes = recorded_runtime(cfg, source.config or {}, asked)
    device = runtime.torch_device()
    runtime.configure_evaluation(device)
    precision = format_name(dtype := runtime.evaluation_dtype(device))
    data = source.fed(given() if given else recorded_data(source.config or {}, path)).to(device)
    unseen = left_over(source.encoder, source.channels, source.image_size)
    for note in (*source.notes, *([unseen] if unseen else []), *notes, *data.notes):
        console.say(note)
    for sentence in slower(runtime.device, device):
        console.say_once(sentence)
    if given is None and run and data.digest != run.read("data.json", needed=True)["digest"]:
        console.say("warning: these are not the images of the run (their digest differs), so the numbers are not its.")
    encoder, prefix = _encoder(source, cfg.feature)
    nodes = protocols(cfg, asked, source.config)
    judges = {str(name): build(node) for name, node in nodes.items()}
    for note in [note for judge in judges.values() for note in judge.notes(data)]:
        console.say(note)
    plain, about = OmegaConf.to_container(nodes, resolve=True), _about(data)
    run_result = run.read("result.json") if run else {}
    if run_result.get("state", "finished") != "finished":
        console.say(f"warning: {source.name} is {run_result['state']} after {run_result.get('epoch', 0):.4g} epochs.")
    if (trained := run_result.get("precision", precision)) != precision:
        console.say(
            f"evaluating in {precision}; {source.name} was trained, and measured during training, in {trained}, which "
            "changes the last digits."
        )
    how = {"data": about, "protocol": plain, "precision": precision, "step": run_result.get("step")}
    if source.statistics is not None:  # a run's are in its encoder.json
        how |= {"mean": list(source.mean), "std": list(source.std)}
    folder = source.folder / FOLDER / prefix / f"{'+'.join(judges)}-{digest(how)}"
    folder.mkdir(parents=True, exist_ok=True)
    context = EvaluationContext(encoder.to(device), data, device, dtype, runtime.channels_last, folder=folder)
    values, intervals, rows = _measured(judges, context, source.name, console)
    own = source.config is not None and source.folder == source.origin  # not of a file of the run that was named
    if own and source.config:
        curve = source.folder / FOLDER / "knn_curve.png"  # the run's own, whatever is measured now
        draw_knn_curve(curve, read(source.folder), published_curve(source.config), source.name)
    settings = {f"protocol.{key}": value for key, value in flat(plain).items()}
    settings = {key: value for key, value in settings.items() if not key.endswith(("_target_", "every_epochs"))}
    write = {**values, "intervals": intervals, **how}
    for file in (folder / "evaluation.json", *([] if prefix else [source.folder / "evaluation.json"])):
        write_atomic(file, json.dumps(write, indent=2) + "\n")
    if own:
        log_metrics(source.folder, {f"evaluation/{prefix}{name}": value for name, value in values.items()})
        flush(source.folder, recorded.tracking.mirror, console.say)
    console.table(f"{source.name}: kNN bank {about['memory']:,}, test {about['test']:,} images of {data.name}", rows)
    if len(settings) <= FEW:
        console.say(", ".join(f"{key.removeprefix('protocol.')} {value}" for key, value in settings.items()))
    console.say(f"written, with all settings, to {folder}")
    state = UploadState.load(source.folder)
    mirrored = own and recorded.tracking.mirror
    return Evaluation(
        values,
        intervals,
        {
            **settings,
            "data": data.name,
            "digest": data.digest,
            **{key: run_result[key] for key in ("state", "epoch") if key in run_result},
        },
        (state.uri, state.experiment) if mirrored else None,
    )


def _encoder(source: Source, feature: str) -> tuple[Encoder, str]:
    """What is context, and what stands before the names of its numbers."""
    if feature == "backbone":
        return source.encoder, ""
    if source.origin is None:
        raise BadInput(f"feature=projection needs a run, and {source.name} is a network alone; use feature=backbone.")
    return projected(source.encoder, Run(source.origin)), "projection/"


def _measured(
    judges: Mapping[str, Protocol], context: EvaluationContext, title: str, console: Console
) -> tuple[dict[str, float], dict[str, tuple[float, float]], dict[str, str]]:
    """Values and intervals by full name, and the rows of the table that is shown; tables of protocols are shown at once."""
    values, intervals, shown, advices = {}, {}, [], {}
    assert context.folder is not None
    for name, judge in judges.items():
        try:
            result = judge(context)
        except BaseException:
            if not any(context.folder.iterdir()):  # what is refused leaves nothing behind
                context.folder.rmdir()
            raise
        found, between = _written(name, result, context, title)
        for table, lines in result.tables.items():
            console.rows(f"{name}: {table}", lines)
        for note in result.notes:
            console.say(note)
        values.update(found)
        intervals.update(between)
        if len(result.values) <= FEW:
            shown += found
        if name == "health" and (sentence := advice(result.values)):
            advices["advice"] = sentence
    rows = {name: _shown(name, value, intervals) for name, value in values.items() if name in shown}
    return values, intervals, {**rows, **advices}


def _about(data: ImageData) -> dict[str, Any]:
    return {
        "name": data.name,
        "digest": data.digest,
        "memory": len(data.memory or ()),
        "test": len(data.test or ()),
        "size": data.size,
    }


def _written(
    name: str, result: EvaluationResult, context: EvaluationContext, title: str
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and intervals by full name; tables and pictures go to the folder."""
    values, intervals, tables = dict(result.values), {}, dict(result.tables)
    assert context.folder is not None
    if result.probabilities is not None:
        found = scores(result.probabilities, context.test.y, context.data.classes)
        values = {**found.values, **values}
        intervals = found.intervals
        tables["classes"] = found.per_class
        about = f"{title}, {name}"
        draw_confusion(context.folder / f"{name}_confusion.png", found.confusion, context.data.classes, about)
        draw_per_class(context.folder / f"{name}_classes.png", found.per_class, about)
    for table, lines in tables.items():
        file = table if table[:7] == name[:7] else f"{name}_{table}"  # predictions.csv, of predict
        write_atomic(context.folder / f"{file}.csv", as_csv(lines))
    order = sorted(values, key=lambda key: (not key.startswith("top"), key))
    return {f"{name}/{key}": values[key] for key in order}, {f"{name}/{key}": v for key, v in intervals.items()}


def _shown(name: str, value: float, intervals: Mapping[str, tuple[float, float]]) -> str:
    low, high = intervals.get(name, (None, None))
    text = f"{value:.2f} %" if "/top" in name else f"{value:.4g}"
    return text if low is None else f"{text}  [{low:.2f}, {high:.2f}]"
