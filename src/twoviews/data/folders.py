"""Folders of pictures as a data set: which folder plays which part, and its recipe for the store."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from twoviews.data.decoding import CHUNK_SIZE, Decoded
from twoviews.data.layout import doubts, listed, one_class
from twoviews.data.picture_files import Tree, class_of, shorter_side, tree
from twoviews.data.store import Recipe
from twoviews.errors import BadInput, counted, nearest

LARGEST_CANVAS = 224  # px; from here on pictures are decoded on demand
SIDES_LOOKED_AT = 1000  # files whose heads are read to choose the side of the canvas


@dataclass(frozen=True)
class Folders:
    """The trees of a data set; the same tree may play two parts. Memory and test are both there or both not."""

    train: Tree
    memory: Tree | None
    test: Tree | None
    classes: tuple[str, ...]  # of memory and test, or of train alone; () without labels
    train_labelled: bool
    notes: tuple[str, ...]

    @property
    def trees(self) -> list[Tree]:
        """Each tree once, train first."""
        return list(
            {
                id(pictures): pictures for pictures in (self.train, self.memory, self.test) if pictures is not None
            }.values()
        )

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """Range of rows of train, memory and test when the trees are listed one after the other."""
        ranges, start = {}, 0
        for pictures in self.trees:
            ranges[id(pictures)] = (start, start + len(pictures))
            start += len(pictures)
        parts = {"train": self.train, "memory": self.memory, "test": self.test}
        return {name: ranges[id(pictures)] for name, pictures in parts.items() if pictures is not None}

    def labels(self) -> np.ndarray:
        """Label of every row, -1 for none."""
        number = {name: label for label, name in enumerate(self.classes)}
        return np.concatenate(
            [
                np.array([number[class_of(name)] for name in pictures.names])
                if pictures is not self.train or self.train_labelled
                else np.full(len(pictures), -1)
                for pictures in self.trees
            ]
        )


def find(root: Path, train: str | None, memory: str | None, test: str | None, labels: bool) -> Folders:
    """The trees that the paths name, relative to `root` or absolute, or where they usually lie below it.

    Raises:
        BadInput: a folder is missing, or its classes do not fit those of the others.
    """
    if not root.is_dir():
        raise BadInput(f"root={root} is no folder." + (_beside(root) if not root.exists() else ""))
    places = {
        "train": _place(root, "train", train, ("train",)),
        "memory": _place(root, "memory", memory, ("memory",)),
        "test": _place(root, "test", test, ("test", "val")),
    }
    if places["train"] is None and (places["memory"] or places["test"]):
        there = listed(entry.name for entry in root.iterdir() if entry.is_dir())
        raise BadInput(f"{root} has the folders {there}, but no 'train': name the training images by train=.")
    start = places["train"] or root
    trees: dict[Path | None, Tree] = {path: tree(path) for path in {start, *places.values()} if path}
    folders = _agree(trees[start], trees.get(places["memory"]), trees.get(places["test"]), labels)
    notes = [*folders.notes, *doubts(root, places, folders.train, folders.test)]
    if test is None and places["test"] == root / "test" and (root / "val").is_dir():
        notes.append(f"{root / 'val'} is not used: {root / 'test'} is.")
    return replace(folders, notes=tuple(notes))


def _place(root: Path, part: str, given: str | None, usual: tuple[str, ...]) -> Path | None:
    """The folder given for this part, or the first usual one that is there."""
    if given is None:
        return next((root / name for name in usual if (root / name).is_dir()), None)
    path = root / Path(given).expanduser()
    if not path.is_dir():
        raise BadInput(f"{part}={given} is no folder below {root}.{_beside(path)}")
    return path


def _beside(path: Path) -> str:
    """The folder that was probably meant."""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _agree(train: Tree, memory: Tree | None, test: Tree | None, labels: bool) -> Folders:
    """The folders of a data set, whose labels and classes were checked against each other; notes say what is left out."""
    notes = [
        f"Files below {pictures.root} that are not taken for pictures: {pictures.others}."
        for pictures in (train, memory, test)
        if pictures and pictures.ignored
    ]
    train_labelled = labels and _labelled(train, "labels=false makes all of it one unlabelled set")
    if labels and not train_labelled:
        has = one_class(train) if train.classes and not train.loose else "no class folders"
        notes.append(f"{train.root} has {has}: it counts as {counted(len(train), 'unlabelled picture')}.")
    if memory is None and train_labelled:
        memory = train
    for part, pictures in (("memory", memory), ("test", test)):
        if pictures and not _labelled(pictures, "move them into one"):
            raise BadInput(
                f"{part}={pictures.root} needs at least two class folders; it has "
                f"{one_class(pictures) if pictures.classes else 'none'}: "
                "name the folder that holds them, or move it away, and training goes without labelled images."
            )
    if memory and test:
        _same_classes(memory, test)
        if train_labelled and train.classes != memory.classes:
            notes.append(f"The classes of {train.root} are not those of {memory.root}: it counts as unlabelled.")
            train_labelled = False
        classes = memory.classes
    else:
        missing = "test" if memory else "memory"
        if memory or test:
            notes.append(f"There is no labelled {missing} folder ({missing}= names one).")
        memory = test = None
        classes = train.classes if train_labelled else ()
    return Folders(train, memory, test, classes, train_labelled, tuple(notes))


def _labelled(pictures: Tree, remedy: str) -> bool:
    """Whether a tree has class folders: at least two, and no picture beside them."""
    if pictures.loose and pictures.classes:
        raise BadInput(
            f"{pictures.root} has {counted(pictures.loose, 'picture')} directly in it, beside its class folders: {remedy}."
        )
    return len(pictures.classes) > 1


def _same_classes(memory: Tree, test: Tree) -> None:
    for pictures, counterpart in ((memory, test), (test, memory)):
        odd = sorted(set(pictures.classes) - set(counterpart.classes))
        if odd:
            named = ", ".join(odd[:5]) + (" ..." if len(odd) > 5 else "")
            close = nearest(odd[0], set(counterpart.classes) - set(pictures.classes))
            raise BadInput(
                f"{counterpart.root} lacks {counted(len(odd), 'class')} of {pictures.root}: {named}.{close} Add pictures of them "
                "there, move their folders away, or give both the same name."
            )


def usual_side(train: Tree) -> tuple[int, str]:
    """Side of the canvas in px for these pictures, and the sentence that says so.

    Raises:
        BadInput: no picture could be read.
    """
    paths = train.paths[:: -(-len(train) // SIDES_LOOKED_AT)]
    sides = sorted(side for side in map(shorter_side, paths) if side)
    if not sides:
        raise BadInput(f"None of {len(paths)} files below {train.root} is a sound picture, {paths[0]} for one.")
    median = sides[len(sides) // 2]
    size = min(median, LARGEST_CANVAS)
    return size, f"Canvas of {size} x {size} px: the median shorter side is {median} px (size= sets another)."


def recipe(folders: Folders, size: int, channels: int, workers: int) -> Recipe:
    """How to build the store of these folders."""
    paths = [path for pictures in folders.trees for path in pictures.paths]
    reader = Decoded(paths, size=size, channels=channels, workers=workers)
    return Recipe(
        splits=folders.splits,
        labels=folders.labels(),
        classes=folders.classes,
        channels=channels,
        size=size,
        chunks=reader.read(torch.arange(len(reader)).split(CHUNK_SIZE)),
        keep_pixels=size < LARGEST_CANVAS,
        names=tuple(paths),
    )
