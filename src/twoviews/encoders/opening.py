"""The encoder that `run=` names: of a run, a file of weights, torchvision or timm."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from twoviews.classifier_file import CLASSIFIER_FILE, EVALUATIONS, HEAD_FILE, load_classifier, newest_classifier
from twoviews.config.building import build, build_data
from twoviews.config.digest import digest
from twoviews.data.images import ImageData
from twoviews.encoder_file import load_encoder
from twoviews.encoders.libraries import open_library
from twoviews.encoders.loaded import LoadedEncoder, Preprocessing, UnknownImages
from twoviews.encoders.run_names import FOLDER_NAME, LATEST, find_run, known_names
from twoviews.encoders.weight_files import (
    SUFFIXES,
    checkpoint_weights,
    fill,
    read_tensors,
    resnet_network,
    resnet_weights,
)
from twoviews.errors import BadInput, nearest, printable
from twoviews.foreign import check_regular, errors_naming
from twoviews.run import Run

FINE_TUNED = "finetune"  # behind the name of a run, as the protocol is called


def open_encoder(
    run: str,
    load_chosen: Callable[[], ImageData] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedEncoder:
    """The encoder that `run` names.

    Args:
        run: a run folder, its name, "latest", MLflow's id of a run, a file of weights, or "torchvision:<name>" or
            "timm:<name>", with random weights or, with ":pretrained" behind, those that are on this machine. Behind a run
            ":finetune" is its newest fine-tuned encoder with the classifier. Behind a file of several encoders, such as a
            student and its teacher, ":<name>" chooses one.
        load_chosen: loads images, for an encoder whose channels and size are those of its images; called only if they are needed.
        mean: per channel, of pixels in [0, 1], for an encoder that is not a run's; None: those that belong to its weights,
            or where that is not known those of the images.
        std: as `mean`.

    Raises:
        BadInput: there is no such encoder, it is damaged or could run code, or `load_chosen` is needed and None; or `mean` and
            `std` are not for it.
    """
    loaded = _open(run, load_chosen)
    preprocessing = loaded.preprocessing
    if (mean is None) != (std is None):
        raise BadInput("mean= and std= belong together; give both, one number a channel, or none.")
    if mean is not None and std is not None:
        if preprocessing.statistics_source is None:
            raise BadInput(
                f"mean= and std= are for other encoders; the run {run} knows those that it was trained with."
            )
        if {len(mean), len(std)} != {preprocessing.channels}:
            raise BadInput(
                f"mean={list(mean)} and std={list(std)} need {preprocessing.channels} number(s) each, as {loaded.name} takes "
                f"images of {preprocessing.channels} channel(s)."
            )
        preprocessing = replace(preprocessing, mean=tuple(mean), std=tuple(std), statistics_source="of the command")
    if preprocessing.statistics_source is None:
        return loaded
    shown = (f"[{','.join(f'{value:.4g}' for value in values)}]" for values in (preprocessing.mean, preprocessing.std))
    note = "images are normalised with mean={} and std={}, {}; mean= and std= set others."
    notes = (*loaded.notes, note.format(*shown, preprocessing.statistics_source))
    return replace(loaded, preprocessing=preprocessing, notes=notes)


def _open(run: str, load_chosen: Callable[[], ImageData] | None) -> LoadedEncoder:
    library, colon, name = run.partition(":")
    if colon and library in ("torchvision", "timm"):
        name, _, pretrained = name.partition(":")
        if pretrained not in ("", "pretrained"):
            raise BadInput(
                f"run={run}: what follows the name can only be :pretrained, run={library}:{name}:pretrained."
            )
        return open_library(library, name, bool(pretrained), load_chosen)
    name, _, part = run.rpartition(":")
    if part == FINE_TUNED and name and Path(name).suffix not in SUFFIXES:
        folder = find_run(name) or Path(name).expanduser()
        if (path := newest_classifier(Run.existing(folder).folder)) is None:
            raise BadInput(
                f"run={run}: {folder} has no fine-tuned classifier; `python evaluate.py run={name} protocol=finetune` makes one."
            )
        loaded = _open_classifier(path)
        return replace(loaded, notes=(*_latest_note(name, folder), *loaded.notes))
    file, colon, encoder_name = run.rpartition(":")  # <file>:<encoder> is one of several encoders in a file
    if not colon or Path(run).expanduser().is_file() or Path(file).suffix not in SUFFIXES:
        file, encoder_name = run, None
    path = Path(file).expanduser()
    if not path.is_dir():
        check_regular(path)
    if path.is_file() and (path.suffix in SUFFIXES or not path.with_name("config.yaml").exists()):
        return _open_file(path, load_chosen, encoder_name)
    if (found := find_run(run)) is not None:
        path = found
    elif not path.exists():
        if path.suffix in SUFFIXES:
            siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
            raise BadInput(f"run={run}: there is no such file.{nearest(path.name, siblings)}")
        if close := nearest(library, ("torchvision", "timm")) if colon else "":
            raise BadInput(f"run={run}: networks come from torchvision: or timm:.{close}")
        if FOLDER_NAME.fullmatch(run) and (close := nearest(run, known_names())):
            raise BadInput(f"run={run}: no run below {Path.cwd()}/outputs or multirun has this name.{close}")
    opened = Run.existing(path)
    encoder, preprocessing = opened.encoder(), Preprocessing.of_description(opened.read("encoder.json"))
    notes = _latest_note(run, path)
    return LoadedEncoder(encoder, preprocessing, printable(path.resolve().name), opened.folder, opened, notes)


def _latest_note(run: str, folder: Path) -> tuple[str, ...]:
    """A sentence about the folder that "latest" stands for."""
    return (f"run=latest is {folder}.",) if run == LATEST else ()


def _open_classifier(path: Path) -> LoadedEncoder:
    """A fine-tuned encoder with its classifier, which belongs to a run if it lies among the run's evaluations."""
    encoder, head, description = load_classifier(path)
    (name, folder), run, place = _name_and_folder(path, None), None, path.resolve().parents[2]
    if path.resolve().parents[1].name == EVALUATIONS and (place / "config.yaml").exists():
        run, name = Run.existing(place), f"{printable(place.name)}-{FINE_TUNED}"
    return LoadedEncoder(encoder, Preprocessing.of_description(description), name, folder, run, head=head)


def _open_file(path: Path, load_chosen: Callable[[], ImageData] | None, encoder_name: str | None) -> LoadedEncoder:
    """Weights from anywhere, of several encoders the named one; those in a run folder are built as its config.yaml says."""
    name, folder = _name_and_folder(path, encoder_name)
    if path.name == HEAD_FILE:
        raise BadInput(f"run={path} is a classifier of a run's features alone; name the run, whose features it takes.")
    if path.name == CLASSIFIER_FILE:
        return _open_classifier(path)
    if path.suffix == ".safetensors" and path.with_name("encoder.json").exists():
        if encoder_name is not None:
            raise BadInput(f"run={path}:{encoder_name}: {path.name} holds one encoder; use run={path}.")
        encoder, description = load_encoder(path)
        preprocessing = Preprocessing.of_description(description, "of encoder.json beside it")
        return LoadedEncoder(encoder, preprocessing, name, folder)
    weights = read_tensors(path)
    if any(key.startswith("method.encoder.") for key in weights) and path.with_name("config.yaml").exists():
        run = Run.existing(path.parent)
        config = run.config()
        with errors_naming(path.with_name("config.yaml")):
            images = load_chosen() if load_chosen else build_data(config["data"])
            encoder = build(config["backbone"], channels=images.channels, image_size=images.size)
        own, notes = checkpoint_weights(weights, list(encoder.state_dict()), path, encoder_name)
        fill(encoder, own, path)
        return LoadedEncoder(encoder, Preprocessing.of_images(images), name, folder, run, tuple(notes))
    own, recipe, channels, notes = resnet_weights(weights, path, encoder_name)
    if load_chosen is None:
        raise UnknownImages(path)
    preprocessing = replace(Preprocessing.of_images(load_chosen()), channels=channels)
    encoder, preprocessing, more = resnet_network(recipe, preprocessing, own, name)
    return LoadedEncoder(encoder, preprocessing, name, folder, notes=(*notes, *more))


def _name_and_folder(path: Path, encoder_name: str | None) -> tuple[str, Path]:
    """Name of the encoder in a file of weights, and the folder for its results, which changes with the whole path."""
    path = path.resolve()
    stem = re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})+$", "", path.name)
    # Many files are called last.pt: the folder's name tells most of them apart.
    name = re.sub(r"[^\w.-]", "_", "-".join(filter(None, (path.parent.name, stem, encoder_name))))
    return name, Path("outputs") / f"evaluation-{name}-{digest({'path': str(path)})}"
