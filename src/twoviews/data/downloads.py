"""Known data sets through torchvision: its checksums, and a sentence where there is no network."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twoviews.console import say_on_stderr
from twoviews.data.store import Chunk, Recipe
from twoviews.errors import BadInput
from twoviews.files import file_errors

TIMEOUT_S = 30.0  # without an answer of the server
ANOTHER_FOLDER = "choose another folder with root="
CHUNK_SIZE = 1000  # images copied into the store at a time


def cifar(kind: str, root: Path, classes: tuple[str, ...]) -> Recipe:
    """CIFAR10 or CIFAR100, 50,000 training and 10,000 test images of 32 px; the memory is the training set."""
    from torchvision import datasets

    known = getattr(datasets, kind)
    train = _loaded(known, root, lambda: known(root, train=True))
    test = known(root, train=False)
    _same_names(kind, classes, train.classes)
    pixels = [split.data.transpose(0, 3, 1, 2) for split in (train, test)]
    labels = np.concatenate([train.targets, test.targets])
    splits = {"train": (0, len(train)), "memory": (0, len(train)), "test": (len(train), len(labels))}
    return Recipe(splits, labels, classes, channels=3, size=32, chunks=_chunks(pixels))


def stl10(root: Path, classes: tuple[str, ...]) -> Recipe:
    """STL-10, 96 px: 5,000 labelled images (the memory) and 100,000 unlabelled ones for training, 8,000 for testing."""
    from torchvision.datasets import STL10

    labelled = _loaded(STL10, root, lambda: STL10(root, split="train"))
    unlabelled, test = STL10(root, split="unlabeled"), STL10(root, split="test")
    _same_names("STL10", classes, labelled.classes)
    labels = np.concatenate([np.asarray(split.labels, np.int64) for split in (labelled, unlabelled, test)])
    known = len(labelled) + len(unlabelled)
    splits = {"train": (0, known), "memory": (0, len(labelled)), "test": (known, len(labels))}
    chunks = _chunks([labelled.data, unlabelled.data, test.data])
    return Recipe(splits, labels, classes, channels=3, size=96, chunks=chunks)


def _chunks(arrays: list[np.ndarray]) -> Iterator[Chunk]:
    done = 0
    for array in arrays:
        for start in range(0, len(array), CHUNK_SIZE):
            pixels = torch.from_numpy(np.ascontiguousarray(array[start : start + CHUNK_SIZE]))
            count, side = len(pixels), pixels.shape[-1]
            yield Chunk(torch.arange(done, done + count), pixels, torch.full((count, 2), side))
            done += count


def _same_names(kind: str, given: tuple[str, ...], present: list[str]) -> None:
    if list(given) != list(present):
        raise BadInput(f"classes= does not name the {len(present)} classes of {kind} in their order: {present}.")


def _loaded(known, root: Path, load: Callable[[], Any]) -> Any:
    """What `load` makes of the files below `root`; they are downloaded or unpacked first where that is not done yet."""
    from torchvision.datasets.utils import check_md5, extract_archive

    try:
        return load()
    except RuntimeError:  # torchvision's word for files that are missing or have the wrong checksum
        pass
    archive = root / known.filename
    if not archive.exists():
        _download(known, archive)
    elif not check_md5(archive, known.tgz_md5):
        raise BadInput(
            f"{archive} is damaged (its md5 is not {known.tgz_md5}): delete it to have it downloaded, or replace it."
        )
    with file_errors(root, ANOTHER_FOLDER):
        extract_archive(str(archive), str(root))
    return load()


def _download(known, archive: Path) -> None:
    """Download the archive beside its place and move it there when its checksum is right."""
    from torchvision.datasets.utils import download_url

    say_on_stderr(f"Downloading {known.filename} to {archive.parent} ...")
    before = socket.getdefaulttimeout()
    with file_errors(archive.parent, ANOTHER_FOLDER):
        archive.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".download-", dir=archive.parent))
    try:
        socket.setdefaulttimeout(TIMEOUT_S)
        with file_errors(archive.parent, ANOTHER_FOLDER):
            download_url(known.url, beside, known.filename, known.tgz_md5)
            (beside / known.filename).replace(archive)
    except (OSError, RuntimeError, HTTPException) as error:
        raise BadInput(
            f"{known.filename} could not be downloaded ({getattr(error, 'reason', error)}): put the file from "
            f"{known.url} (md5 {known.tgz_md5}) at {archive}; `train.py data=digits` needs no download."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
        shutil.rmtree(beside, ignore_errors=True)
