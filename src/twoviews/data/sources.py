"""The data sets: each a function whose signature is the schema of its file in conf/data, returning ImageData."""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from twoviews.console import progress_of
from twoviews.data import arrays, downloads, folders
from twoviews.data.contents import contents
from twoviews.data.decoding import Decoded, cores
from twoviews.data.images import ImageData, Images, stratified
from twoviews.data.picture_files import dark
from twoviews.data.store import Recipe, Store, statistics, stored
from twoviews.errors import BadInput, counted, printable
from twoviews.foreign import check_regular
from twoviews.randomness import generator
from twoviews.ranges import Fraction, Length, NonNegativeInt, Positive, Range, Size

Side = Annotated[int, Range(at_least=8, at_most=4096)]
Workers = Annotated[int, Range(at_least=0, at_most=1000)]
Means = Annotated[list[Fraction], Length(3, 3)]
Deviations = Annotated[list[Positive], Length(3, 3)]

MAX_NAMED = 5  # broken files in a message


def digits(*, train_images: Size | None = None) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, enlarged twice, each at a random place of a black 32 x 32 canvas.

    Unmoved, they are solved by comparing pixels (kNN 98%); moved, there is something to learn (60%). 1,437 are for
    training, 360 for testing. Source: UCI optical recognition of handwritten digits, 8 x 8 px with values 0..16.
    """
    # The file that sklearn.datasets.load_digits reads: importing scikit-learn for it would take seconds.
    package = importlib.util.find_spec("sklearn")
    assert package and package.origin
    place = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(place, delimiter=",", dtype=np.int64))  # 64 pixels and the digit
    small = (table[:, :64].view(-1, 8, 8) * 255 / 16).round().to(torch.uint8)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    places = torch.randint(0, 17, (len(large), 2), generator=generator("digits"))
    pixels = torch.zeros(len(large), 1, 32, 32, dtype=torch.uint8)
    for canvas, digit, (top, left) in zip(pixels, large, places.tolist(), strict=True):
        canvas[0, top : top + 16, left : left + 16] = digit
    labels = table[:, 64].clone()
    everything = Images(pixels, torch.full((len(pixels), 2), 32), labels)
    held_out = stratified(labels, len(labels), 360)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    train = everything.subset(kept.nonzero().flatten())
    mean, std = statistics(pixels[kept])
    data = ImageData(
        name="digits",
        train=train,
        memory=train,
        test=everything.subset(held_out),
        classes=tuple("0123456789"),
        channels=1,
        size=32,
        mean=mean,
        std=std,
        digest=hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest(),
        notes=(),
    )
    return data.with_train_images(train_images)


def cifar10(
    *,
    root: str,
    mean: Means,
    std: Deviations,
    classes: Annotated[list[str], Length(10, 10)],
    train_images: Size | None = None,
    cache: str = "~/.cache/twoviews",
) -> ImageData:
    """CIFAR-10: 50,000 training images, which are the memory too, and 10,000 test images, 32 px.

    Args:
        root: where the archive or what it holds lies, or is downloaded to; looked at only to fill the cache.
        mean: of each channel, of pixels in [0, 1].
        std: likewise.
        classes: their names, in order.
        train_images: use only so many, class by class in proportion; memory and test stay whole.
        cache: where the unpacked images are kept.

    Raises:
        BadInput: the data are not there and cannot be downloaded.
    """
    recipe = partial(downloads.cifar, "CIFAR10", Path(root).expanduser(), tuple(classes))
    return _known("cifar10", recipe, mean, std, classes, train_images, cache)


def cifar100(
    *,
    root: str,
    mean: Means,
    std: Deviations,
    classes: Annotated[list[str], Length(100, 100)],
    train_images: Size | None = None,
    cache: str = "~/.cache/twoviews",
) -> ImageData:
    """CIFAR-100 with its 100 fine classes; everything else as in `cifar10`."""
    recipe = partial(downloads.cifar, "CIFAR100", Path(root).expanduser(), tuple(classes))
    return _known("cifar100", recipe, mean, std, classes, train_images, cache)


def stl10(
    *,
    root: str,
    mean: Means,
    std: Deviations,
    classes: Annotated[list[str], Length(10, 10)],
    train_images: Size | None = None,
    cache: str = "~/.cache/twoviews",
) -> ImageData:
    """STL-10, 96 px: training on 105,000 images without labels, memory the 5,000 labelled of them, 8,000 for testing.

    Parameters as in `cifar10`.
    """
    recipe = partial(downloads.stl10, Path(root).expanduser(), tuple(classes))
    return _known("stl10", recipe, mean, std, classes, train_images, cache)


def _known(
    name: str,
    recipe: Callable[[], Recipe],
    mean: list[float],
    std: list[float],
    classes: list[str],
    train_images: int | None,
    cache: str,
) -> ImageData:
    store = stored(cache, name, {"classes": classes}, recipe)
    data = replace(_data(name, store), mean=tuple(mean), std=tuple(std))
    return data.with_train_images(train_images)


def array(
    *,
    root: str | None,
    labels: str | None = None,
    size: Side | None = None,
    train_images: Size | None = None,
    cache: str = "~/.cache/twoviews",
) -> ImageData:
    """Images in numpy files: [N, H, W, C] or [N, H, W], any number of channels, integers or floats.

    8-bit images are taken as they are; of all others the range of the training images becomes 0..255, one range for
    3 channels (colours), else one for each channel. Labels may be any whole numbers or strings; -1 means none.

    Args:
        root: an .npz file with arrays `images` and perhaps `labels`, `test_images`, `test_labels`; an .npy file of
            images; or a folder with train.npz and perhaps test.npz. Without test images a fifth of the labelled ones,
            class by class, is held out.
        labels: an .npy file of labels, to go with images that have none beside them.
        size: side of the canvas in px; null is the shorter side of the images, at most 224.
        train_images: use only so many, class by class in proportion; memory and test stay whole.
        cache: where the images are kept as bytes.

    Raises:
        BadInput: the files are missing or broken, or hold something else.
    """
    if root is None:
        raise BadInput("no file of arrays is named; name one by root=/path/to/images.npz.")
    place = Path(root).expanduser().absolute()
    files = arrays.files_of(place)
    beside = None if labels is None else Path(labels).expanduser().absolute()
    check_regular(*([beside] if beside else []))
    if beside is not None and not beside.is_file():
        raise BadInput(f"labels={labels} is not there.")
    read = [path for path in (*files, beside) if path]
    key = {
        "files": [path.name for path in read],
        "contents": contents([str(path) for path in read], cache),
        "size": size,
    }
    store = stored(cache, place.stem, key, lambda: arrays.recipe(files, beside, size))
    return _data(place.stem, store).with_train_images(train_images)


def folder(
    *,
    root: str | None,
    train: str | None = None,
    memory: str | None = None,
    test: str | None = None,
    labels: bool = True,
    size: Side | None = None,
    channels: Literal[1, 3] = 3,
    train_images: Size | None = None,
    max_broken: NonNegativeInt = 0,
    workers: Workers | None = None,
    cache: str = "~/.cache/twoviews",
) -> ImageData:
    """Pictures in folders, at any depth; the first folder level below a split is the class.

    Args:
        root: where the folders lie.
        train: training images, relative to root; null is root/train, or root itself where there is none.
        memory: labelled images that kNN looks up; null is root/memory, or train where that has classes.
        test: labelled images to test on; null is root/test or root/val.
        labels: false where the folders below train mean nothing.
        size: side of the canvas in px; null is the median shorter side of the data, at most 224.
        channels: 3 for colour, 1 for grey.
        train_images: use only so many, class by class in proportion; memory and test stay whole.
        max_broken: how many broken files may be skipped.
        workers: processes that decode; null is one for each core.
        cache: where the decoded images are kept.

    Raises:
        BadInput: a folder is missing or empty, classes do not agree, or more files are broken than allowed.
    """
    if root is None:
        raise BadInput("no folder of images is named; name one by root=/path/to/images.")
    place = Path(root).expanduser().absolute()
    with progress_of(f"looking through {place}"):
        trees = folders.find(place, train, memory, test, labels)
        notes = [*trees.notes, *dark(trees.train.paths)]
        if size is None:
            size, note = folders.usual_side(trees.train)
            notes.append(note)
    workers = cores() if workers is None else workers
    key = {
        "size": size,
        "channels": channels,
        "splits": trees.splits,
        "classes": trees.classes,
        "train_labelled": trees.train_labelled,
        "files": [tree.names for tree in trees.trees],
        "contents": contents([path for tree in trees.trees for path in tree.paths], cache),
    }
    store = stored(cache, place.name, key, lambda: folders.recipe(trees, size, channels, workers))
    notes += _broken(store, max_broken)
    paths = [path for tree in trees.trees for path in tree.paths]
    sound = [paths[row] for row in store.rows.tolist()]
    files = Decoded(sound, size=size, channels=channels, workers=workers)
    return _data(place.name, store, files, notes).with_train_images(train_images)


def _broken(store: Store, max_broken: int) -> list[str]:
    """A sentence that names the broken files, if there are any and no more than allowed."""
    broken = store.meta["broken"]
    if not broken:
        return []
    named = "; ".join(f"{path} ({reason})" for path, reason in broken[:MAX_NAMED]) + (
        " ..." if len(broken) > MAX_NAMED else ""
    )
    files = counted(len(broken), "broken file", "")
    if len(broken) > max_broken:
        raise BadInput(
            f"{files}, and max_broken={max_broken} allows no more: {named}. "
            f"Repair or remove, or skip with max_broken={len(broken)}."
        )
    return [f"{files} skipped: {named}."]


def _data(name: str, store: Store, files: Decoded | None = None, notes: Sequence[str] = ()) -> ImageData:
    """The splits of a store; splits of the same range are the same Images, and `files` stand in for absent pixels."""
    pixels = files if store.pixels is None else store.pixels
    assert pixels is not None
    made: dict[tuple[int, int], Images] = {}

    def split(start: int, stop: int) -> Images:
        own = pixels.subset(torch.arange(start, stop)) if isinstance(pixels, Decoded) else pixels[start:stop]
        labels = store.labels[start:stop]
        paths = None if files is None else files.paths[start:stop]
        return Images(own, store.sizes[start:stop], None if (labels < 0).any() else labels, paths)

    meta = store.meta
    ranges = {part: (start, stop) for part, (start, stop) in meta["splits"].items()}
    for part, (start, stop) in ranges.items():
        if start == stop:
            raise BadInput(f"No sound image is left for {part}.")
        if (start, stop) not in made:
            made[start, stop] = split(start, stop)
    return ImageData(
        name=printable(name),
        train=made[ranges["train"]],
        memory=made[ranges["memory"]] if "memory" in ranges else None,
        test=made[ranges["test"]] if "test" in ranges else None,
        classes=tuple(meta["classes"]),
        channels=meta["channels"],
        size=meta["size"],
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        digest=meta["digest"],
        notes=(*meta["notes"], *notes),
    )
