"""Whether the folders of a data set are those that were meant: the sentences that say what looks otherwise."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from twoviews.data.picture_files import Tree

# What people call the parts of a data set, in lower case.
TRAIN = frozenset({"train", "training", "trainset", "train_set"})
TEST = frozenset({"test", "testing", "testset", "test_set", "val", "valid", "validation", "eval", "dev"})
SWAPPED = 2  # times as many test images as training images are rarely meant
NAMED = 5  # folders


def doubts(root: Path, places: Mapping[str, Path | None], train: Tree, test: Tree | None) -> list[str]:
    """Warnings about folders that look mixed up: root too high or too low, parts taken for classes; none where all is as usual.

    Args:
        root: of the data set.
        places: folder of train, memory and test, where there is one.
        train: the training images.
        test: the test images.
    """
    above = [] if any(places.values()) else _above(root, train)
    beside = _beside(root, places) if places["train"] == root / "train" else []
    return [*above, *_below(train), *_parts_as_classes(train), *beside, *_swapped(train, test)]


def listed(names: Iterable[str]) -> str:
    """The first names, sorted."""
    names = sorted(names)
    return ", ".join(names[:NAMED]) + (f" … ({len(names)})" if len(names) > NAMED else "")


def one_class(tree: Tree) -> str:
    """Of a tree with a single class folder: what that holds, and which folder would have more classes."""
    folder, inner = "", {name.split("/")[0] for name in tree.names}
    while len(inner) == 1:
        folder += f"{next(iter(inner))}/"
        below = [name.removeprefix(folder).split("/") for name in tree.names]
        inner = {parts[0] for parts in below if len(parts) > 1}
    described = f"one class folder, {tree.classes[0]}"
    return (
        f"{described}, and {tree.root / folder} has the folders {listed(inner)}: name that one" if inner else described
    )


def _is_part(name: str) -> bool:
    return name.lower() in TRAIN | TEST


def _parts(names: Iterable[str]) -> set[str]:
    """Those of the names that are parts of a data set, if there is one to train on and one to test on."""
    found = {name for name in names if _is_part(name)}
    kinds = {name.lower() in TRAIN for name in found}
    return found if len(kinds) == 2 else set()


def _above(root: Path, train: Tree) -> list[str]:
    """A warning if `root` is a part of a data set, or a class folder inside one; otherwise none."""
    for place in (root, root.parent):
        if not _is_part(place.name):
            continue
        if parts := _parts(entry.name for entry in place.parent.iterdir() if entry.is_dir()):
            return [
                f"warning: root={root} looks like a part of a data set: {place.parent} has the folders {listed(parts)}, "
                f"and root={place.parent} takes all of them. Folders taken as classes now: "
                f"{listed(train.classes) or 'none'}."
            ]
    return []


def _below(train: Tree) -> list[str]:
    """Whole data sets, each with parts of its own, lie among the training images."""
    inner: dict[str, set[str]] = {}
    for name in train.names:
        folders = name.split("/")[:-1]
        for level, folder in enumerate(folders[1:3], 1):
            inner.setdefault("/".join(folders[:level]), set()).add(folder)
    sets = {folder: parts for folder, names in inner.items() if (parts := _parts(names))}
    if not sets:
        return []
    first = min(sets)
    return [
        f"warning: {train.root} looks as if it lay above a data set: {train.root / first} has the folders "
        f"{listed(sets[first])}" + (f", and so has {listed(set(sets) - {first})}" if len(sets) > 1 else "") + f". "
        f"root={train.root / first} takes them as what they are. Folders taken as classes now: {listed(train.classes)}."
    ]


def _parts_as_classes(train: Tree) -> list[str]:
    """Train and test are spelt in a way that is not looked for, and count as classes."""
    parts = _parts(train.classes)
    if not parts:
        return []
    learn, judge = (min(part for part in parts if (part.lower() in TRAIN) == kind) for kind in (True, False))
    return [
        f"warning: {listed(parts)} of {train.root} look like parts of a data set and count as classes: "
        f"train={learn} test={judge} takes them as what they are."
    ]


def _beside(root: Path, places: Mapping[str, Path | None]) -> list[str]:
    """Folders beside train that play no part; with a class of that name they are the other classes."""
    used = {path.relative_to(root).parts[0] for path in places.values() if path and path.is_relative_to(root)}
    others = (
        {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")} - used - {"val"}
    )
    if not others:
        return []
    return [
        f"Not used of {root}: {listed(others)}, because {listed(used)} are taken for the parts of the data set; train=. "
        "takes all of them as classes."
    ]


def _swapped(train: Tree, test: Tree | None) -> list[str]:
    if test is None or len(test) < SWAPPED * len(train):
        return []
    return [
        f"warning: {test.root} has {len(test):,} test pictures and {train.root} {len(train):,} to train on (classes: "
        f"{listed(test.classes)}); if they are swapped, use train={test.root} test={train.root}."
    ]
