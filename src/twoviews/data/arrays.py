"""Images in .npz and .npy files: which arrays are meant, their range of values and labels, and the store's recipe."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from twoviews.data.array_pixels import Scale, Split, chunks_of
from twoviews.data.images import stratified
from twoviews.data.layout import SWAPPED
from twoviews.data.store import Recipe
from twoviews.errors import BadInput, counted, nearest
from twoviews.foreign import check_regular

IMAGES = ("images", "image", "x", "data", "train_images", "x_train", "train_x", "arr_0")
LABELS = ("labels", "label", "y", "targets", "target", "train_labels", "y_train", "train_y", "arr_1")
TEST_IMAGES = ("test_images", "x_test", "test_x")
TEST_LABELS = ("test_labels", "y_test", "test_y")
HELD_OUT = 5  # of a labelled file without test images, one in so many is held out


def files_of(root: Path) -> list[Path]:
    """The files that a data set is read from: one, or train.npz and perhaps test.npz of a folder.

    Raises:
        BadInput: there is no such file, or no regular one.
    """
    check_regular(*(root / name for name in ("train.npz", "test.npz")), *([] if root.is_dir() else [root]))
    if root.is_dir():
        if not (root / "train.npz").is_file():
            raise BadInput(f"{root} holds no train.npz: give it one, or name an .npz or .npy file by root=.")
        return [path for path in (root / "train.npz", root / "test.npz") if path.is_file()]
    if not root.is_file():
        near = nearest(root.name, [entry.name for entry in root.parent.iterdir()]) if root.parent.is_dir() else ""
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
    scale = Scale.of(train, test, notes)
    height, width, channels = train.images.shape[1:]
    side = size or min(height, width, 224)
    if not height == width == side:
        notes.append(f"Images of {height} x {width} px are resized to {side} x {side} px (size= sets another).")
    splits = {"train": (0, len(train.rows))}
    if test is not None:
        splits["memory"], splits["test"] = (0, train.labelled), (len(train.rows), len(numbers))
    chunks = chunks_of([train] if test is None else [train, test], scale, side)
    return Recipe(splits, numbers, classes, channels, side, chunks, notes=tuple(notes))


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
    test_form, train_form = ((split.images.shape[1:], str(split.images.dtype)) for split in (test, train))
    if test_form != train_form:
        raise BadInput(f"Test images of shape and type {test_form} do not fit training images of {train_form}.")
    if train.labels is None or test.labels is None:
        return train, None, [*notes, f"The test images of {files[-1].name} are left out: not all images have labels."]
    if train.labelled < len(train.rows) or (train.labels != -1).all():
        kept = test.labels != -1 if test.labels.dtype.kind == "i" else np.full(len(test.rows), True)
        if not kept.all():
            notes.append(f"The label -1, which means none, leaves out {counted(int((~kept).sum()), 'test image')}.")
            test = replace(test, labels=test.labels[kept], rows=test.rows[kept])
    if len(test.rows) >= SWAPPED * len(train.rows):
        notes.append(
            f"warning: {len(test.rows):,} test images and {len(train.rows):,} to train on: are {names[0]} of {files[-1].name} "
            f"and the training images of {files[0].name} swapped?"
        )
    return train, (test if len(test.rows) else None), notes


def _labelled_first(train: Split, notes: list[str]) -> Split:
    """The split with images of label -1 (none) at the end; if there are only two labels, -1 is one of two classes."""
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
    """The training images without a fifth of each class, that fifth as test images, and notes."""
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
    with _numpy_errors(path):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        return loaded if path.suffix == ".npz" else {"images": loaded}


def _array(arrays: Mapping, key: str, path: Path) -> np.ndarray:
    with _numpy_errors(path):
        return arrays[key]


@contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    """Turn numpy's errors about a file into BadInput."""
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
    """The only array with one of these names, whose key is added to `used`; None if there is none."""
    keys = [key for key in arrays if key.lower() in names]
    if len(keys) > 1:
        raise BadInput(f"{path} holds both '{keys[0]}' and '{keys[1]}', which mean the same: keep one.")
    used.update(keys)
    return _array(arrays, keys[0], path) if keys else None


def _unused(arrays: Mapping, path: Path, used: set[str]) -> list[str]:
    """A sentence that names the arrays that are not used, if there are any."""
    left = [f"'{key}'" for key in arrays if key not in used]
    named = ", ".join(left[:5]) + (" ..." if len(left) > 5 else "")
    return [f"{path.name} holds arrays that are not used: {named}."] if left else []


def _checked(images: np.ndarray, labels: np.ndarray | None, path: Path) -> Split:
    """The arrays as a split, if their shapes and types are valid."""
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


def _classes(train: Split, test: Split | None, notes: list[str]) -> tuple[Int[np.ndarray, " N"], tuple[str, ...]]:
    """Labels of training and test images as numbers 0..classes-1, -1 for none, and the names of the classes."""
    if train.labels is None:
        return np.full(len(train.rows), -1), ()
    known = np.unique(train.labels[: train.labelled])
    labels = train.labels if test is None or test.labels is None else np.concatenate([train.labels, test.labels])
    none = np.arange(len(labels)) < len(train.rows)
    none[: train.labelled] = False
    odd = np.setdiff1d(labels[~none], known)
    if len(odd):
        named = ", ".join(map(str, odd[:5]))
        raise BadInput(f"{len(odd)} labels of the test images do not occur in training: {named}.")
    if known.dtype.kind not in "iu" or list(known) != list(range(len(known))):
        notes.append(f"Labels: {len(known)} classes, {known[0]} to {known[-1]}, are numbered 0 to {len(known) - 1}.")
    return np.where(none, -1, np.searchsorted(known, labels)), tuple(map(str, known))
