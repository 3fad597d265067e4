"""Images in .npz and .npy files: which arrays are meant, their range of values and labels, and the store's recipe."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.data.images import stratified
from twoviews.data.layout import SWAPPED
from twoviews.data.store import Part, Recipe
from twoviews.errors import BadInput, nearest
from twoviews.foreign import regular

IMAGES = ("images", "image", "x", "data", "train_images", "x_train", "train_x", "arr_0")
LABELS = ("labels", "label", "y", "targets", "target", "train_labels", "y_train", "train_y", "arr_1")
TEST_IMAGES = ("test_images", "x_test", "test_x")
TEST_LABELS = ("test_labels", "y_test", "test_y")
HELD_OUT = 5  # of a labelled file without test images, one in so many is held out
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Split:
    """Some images of an array and their labels, as they stand in the file."""

    images: np.ndarray  # [N, H, W, C]
    labels: np.ndarray | None  # [n], of the rows
    rows: Int[np.ndarray, "n"]
    labelled: int = 0  # rows before those whose label is -1, which means that they have none

    def chunks(self) -> Iterator[np.ndarray]:
        """The images, some megabytes at a time."""
        step = max(1, CHUNK_BYTES // (self.images[0].size * 8))
        for start in range(0, len(self.rows), step):
            yield self.images[self.rows[start : start + step]]

    @cached_property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value of each channel.

        Raises:
            BadInput: a value is NaN or infinite.
        """
        low, high, seen = [], [], 0
        for chunk in self.chunks():
            finite = np.isfinite(chunk).all(axis=(1, 2, 3))
            if not finite.all():
                first = self.rows[seen + int(np.argmin(finite))]
                raise BadInput(f"Image {first} (counted from 0) holds NaN or infinite values: replace or remove them.")
            low.append(chunk.min(axis=(0, 1, 2)))
            high.append(chunk.max(axis=(0, 1, 2)))
            seen += len(chunk)
        return np.min(low, axis=0).astype(np.float64), np.max(high, axis=0).astype(np.float64)


def files_of(root: Path) -> list[Path]:
    """The files that a data set is read from: one, or train.npz and perhaps test.npz of a folder.

    Raises:
        BadInput: there is no such file, or no regular one.
    """
    regular(*(root / name for name in ("train.npz", "test.npz")), *([] if root.is_dir() else [root]))
    if root.is_dir():
        if not (root / "train.npz").is_file():
            raise BadInput(f"{root} holds no train.npz: give it one, or name an .npz or .npy file by root=.")
        return [path for path in (root / "train.npz", root / "test.npz") if path.is_file()]
    if not root.is_file():
        near = nearest(root.name, [each.name for each in root.parent.iterdir()]) if root.parent.is_dir() else ""
        raise BadInput(f"root={root} is not there.{near}")
    if root.suffix not in (".npz", ".npy"):
        raise BadInput(f"root={root} is no .npz or .npy file, nor a folder with train.npz.")
    return [root]


def recipe(files: list[Path], labels: Path | None, size: int | None) -> Recipe:
    """How to build the store of the arrays in these files.

    Raises:
        BadInput: the arrays are not what the docstring of `sources.array` asks for.
    """
    train, test, notes = _splits(files, labels)
    numbers, classes = _classes(train, test, notes)
    scale = _Scale.of(train, test, notes)
    height, width, channels = train.images.shape[1:]
    side = size or min(height, width, 224)
    if not height == width == side:
        notes.append(f"Images of {height} x {width} px are resized to {side} x {side} px (size= sets another).")
    splits = {"train": (0, len(train.rows))}
    if test is None:
        notes.append("No labelled test images: kNN and linear accuracy are left out.")
    else:
        splits["memory"], splits["test"] = (0, train.labelled), (len(train.rows), len(numbers))
    parts = _parts([train] if test is None else [train, test], scale, side)
    return Recipe(splits, numbers, classes, channels, side, parts, notes=tuple(notes))


def _splits(files: list[Path], labels: Path | None) -> tuple[Split, Split | None, list[str]]:
    """Training images, and test images where both have labels, with notes on how they came about."""
    arrays, used = _opened(files[0]), set()
    images, own = _pick(arrays, IMAGES, files[0], used), _pick(arrays, LABELS, files[0], used)
    if images is None:
        held = ", ".join(f"'{key}'" for key in arrays) or "nothing"
        raise BadInput(f"{files[0]} holds {held} and no array 'images': rename it, or use one of {', '.join(IMAGES)}.")
    if labels is not None:
        beside = _opened(labels)
        own = _array(beside, next(iter(beside)), labels)
    notes = []
    train = _checked(images, own, files[0])
    if train.labels is not None and len(np.unique(train.labels)) < 2:
        notes.append(f"All labels are {train.labels[0]}: the images count as unlabelled.")
        train = replace(train, labels=None)
    train = _labelled_first(train, notes)
    if len(files) > 1:
        notes += _unused(arrays, files[0], used)
        arrays, used = _opened(files[1]), set()
        names, label_names = IMAGES + TEST_IMAGES, LABELS + TEST_LABELS
    else:
        names, label_names = TEST_IMAGES, TEST_LABELS
    images, own = _pick(arrays, names, files[-1], used), _pick(arrays, label_names, files[-1], used)
    notes += _unused(arrays, files[-1], used)
    if images is None:
        train, test, more = _held_out(train, files[0].name)
        return train, test, notes + more
    test = _checked(images, own, files[-1])
    given, needed = ((each.images.shape[1:], str(each.images.dtype)) for each in (test, train))
    if given != needed:
        raise BadInput(f"Test images of shape and type {given} do not fit training images of {needed}.")
    if train.labels is None or test.labels is None:
        return train, None, [*notes, f"The test images of {files[-1].name} are left out: not all images have labels."]
    if train.labelled < len(train.rows) or (train.labels != -1).all():
        kept = test.labels != -1 if test.labels.dtype.kind == "i" else np.full(len(test.rows), True)
        if not kept.all():
            notes.append(f"{(~kept).sum()} test images have the label -1, which means none: they are left out.")
            test = replace(test, labels=test.labels[kept], rows=test.rows[kept])
    if len(test.rows) >= SWAPPED * len(train.rows):
        notes.append(
            f"warning: {len(test.rows):,} test images and {len(train.rows):,} to train on: are {names[0]} of {files[-1].name} "
            f"and the training images of {files[0].name} swapped?"
        )
    return train, (test if len(test.rows) else None), notes


def _labelled_first(train: Split, notes: list[str]) -> Split:
    """The split with images of label -1 behind all others; where -1 and one more are all labels, both are classes."""
    count = len(train.rows)
    if train.labels is None or train.labels.dtype.kind != "i":
        return replace(train, labelled=count)
    none = train.labels == -1
    if not none.any() or len(np.unique(train.labels)) < 3:
        return replace(train, labelled=count)
    order = np.argsort(none, kind="stable")
    notes.append(f"{none.sum()} of {count} images have the label -1, which means none: they are trained on alone.")
    return Split(train.images, train.labels[order], train.rows[order], count - int(none.sum()))


def _held_out(train: Split, name: str) -> tuple[Split, Split | None, list[str]]:
    """The images without a fifth of each class, and that fifth as test images."""
    if train.labels is None:
        return train, None, []
    total = train.labelled
    numbers = np.unique(train.labels[:total], return_inverse=True)[1]
    several = np.flatnonzero(np.bincount(numbers)[numbers] > 1)  # the only image of a class stays
    if len(several) < HELD_OUT:
        return train, None, [f"{name} has too few images to hold some out for testing."]
    chosen = stratified(torch.from_numpy(numbers[several]), len(several), len(several) // HELD_OUT)
    held = several[chosen.numpy()]
    kept = np.setdiff1d(np.arange(len(train.rows)), held)
    note = f"{name} has no test images: {len(held)} of {total}, a fifth of each class, are held out for testing"
    note += f"; {total - len(several)} classes have a single image, which stays." if len(several) < total else "."
    own = Split(train.images, train.labels[kept], train.rows[kept], total - len(held))
    return own, Split(train.images, train.labels[held], train.rows[held]), [note]


def _opened(path: Path) -> Mapping:
    """The arrays of a file by name; those of an .npz file are read when they are asked for, by `_array`."""
    with _readable(path):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        return loaded if path.suffix == ".npz" else {"images": loaded}


def _array(arrays: Mapping, key: str, path: Path) -> np.ndarray:
    with _readable(path):
        return arrays[key]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What numpy objects to, as a sentence."""
    try:
        yield
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise BadInput(
                f"{path} holds Python objects, which could run code: save plain arrays of numbers."
            ) from None
        raise BadInput(f"{path} is no sound numpy file: {error}.") from None
    except Exception as error:  # zipfile and zlib have their own kinds
        raise BadInput(f"{path} cannot be read: {error}.") from None


def _pick(arrays: Mapping, names: tuple[str, ...], path: Path, used: set[str]) -> np.ndarray | None:
    """The one array with one of these names, which is used from then on."""
    found = [key for key in arrays if key.lower() in names]
    if len(found) > 1:
        raise BadInput(f"{path} holds both '{found[0]}' and '{found[1]}', which mean the same: keep one.")
    used.update(found)
    return _array(arrays, found[0], path) if found else None


def _unused(arrays: Mapping, path: Path, used: set[str]) -> list[str]:
    """The sentence that names what is left alone."""
    left = [f"'{key}'" for key in arrays if key not in used]
    named = ", ".join(left[:5]) + (" ..." if len(left) > 5 else "")
    return [f"{path.name} holds arrays that are not used: {named}."] if left else []


def _checked(images: np.ndarray, labels: np.ndarray | None, path: Path) -> Split:
    """The arrays as a split, if they have the shapes and kinds that are asked for."""
    shape = images.shape
    if images.dtype.kind not in "buif":
        raise BadInput(f"The images in {path} are of type {images.dtype}: save them as uint8 or float.")
    if images.ndim not in (3, 4) or not images.size:
        raise BadInput(f"The images in {path} have shape {shape}: [N, H, W, C] or [N, H, W] is needed.")
    if images.ndim == 3:
        images = images[..., None]
    elif not (shape[3] < min(shape[1:3]) or shape[1] == shape[2] != shape[3]):
        raise BadInput(
            f"The images in {path} have shape {shape}, which looks like [N, C, H, W], and [N, H, W, C] is needed: save "
            "np.moveaxis(images, 1, -1)."
        )
    if labels is not None:
        labels = labels.reshape(-1) if labels.size == len(images) else labels
        if labels.shape != (len(images),):
            raise BadInput(f"{path} has {len(images)} images and labels of shape {labels.shape}: one each is needed.")
        if labels.dtype.kind not in "biuUS" and not (labels.dtype.kind == "f" and (labels == np.round(labels)).all()):
            raise BadInput(f"The labels in {path} are of type {labels.dtype}: whole numbers or strings are needed.")
        labels = labels.astype(np.int64) if labels.dtype.kind in "bf" else labels
        labels = np.char.decode(labels) if labels.dtype.kind == "S" else labels
    return Split(images, labels, np.arange(len(images)))


def _classes(train: Split, test: Split | None, notes: list[str]) -> tuple[Int[np.ndarray, "N"], tuple[str, ...]]:
    """Numbers 0..classes-1 of training and test labels, and what they stand for; all -1 where there are none."""
    if train.labels is None:
        return np.full(len(train.rows), -1), ()
    known = np.unique(train.labels[: train.labelled])
    given = train.labels if test is None or test.labels is None else np.concatenate([train.labels, test.labels])
    none = np.arange(len(given)) < len(train.rows)
    none[: train.labelled] = False
    odd = np.setdiff1d(given[~none], known)
    if len(odd):
        named = ", ".join(map(str, odd[:5]))
        raise BadInput(f"{len(odd)} labels of the test images do not occur in training: {named}.")
    if known.dtype.kind not in "iu" or list(known) != list(range(len(known))):
        notes.append(f"Labels: {len(known)} classes, {known[0]} to {known[-1]}, are numbered 0 to {len(known) - 1}.")
    return np.where(none, -1, np.searchsorted(known, given)), tuple(map(str, known))


@dataclass(frozen=True)
class _Scale:
    """The way from the values in the file to 0..255, taken from the training images."""

    low: Float[np.ndarray, "C"]
    high: Float[np.ndarray, "C"]

    @staticmethod
    def of(train: Split, test: Split | None, notes: list[str]) -> "_Scale":
        kind = train.images.dtype
        channels = train.images.shape[-1]
        if kind == np.uint8:
            return _Scale(np.zeros(channels), np.full(channels, 255.0))
        low, high = train.range
        if channels == 3:  # colours keep their balance; measurements of different kinds keep their precision
            low, high = np.full(3, low.min()), np.full(3, high.max())
        if (low == high).all():
            raise BadInput(f"All values of the training images are {low[0]:g}: there is nothing to learn from.")
        same = (low == low[0]).all() and (high == high[0]).all()
        ranges = [f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True)]
        shown = ranges[0] if same else f"{', '.join(ranges[:5])}{' ...' if channels > 5 else ''} by channel"
        notes.append(f"Values {shown} of the training images ({kind}) become 0 to 255.")
        if test is not None:
            outside = sum(int(((chunk < low) | (chunk > high)).sum()) for chunk in test.chunks())
            if outside:
                notes.append(f"{outside} values of the test images lie outside that range and are set to its ends.")
            _ = test.range  # refuses NaN
        return _Scale(low, high)

    def __call__(self, chunk: np.ndarray) -> UInt8[Tensor, "b C H W"]:
        if chunk.dtype != np.uint8:
            width = np.where(self.high > self.low, self.high - self.low, 1)
            chunk = np.round(np.clip((chunk - self.low) / width, 0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(chunk.transpose(0, 3, 1, 2)))


def _parts(splits: list[Split], scale: _Scale, side: int) -> Iterator[Part]:
    done = 0
    for split in splits:
        for chunk in split.chunks():
            pixels = scale(chunk)
            count, _, height, width = pixels.shape
            if not height == width == side:
                large = nnf.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
                pixels = large.round().clamp(0, 255).to(torch.uint8)
            yield Part(torch.arange(done, done + count), pixels, torch.tensor([[height, width]] * count))
            done += count
