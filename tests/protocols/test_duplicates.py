"""Near-duplicates: pairs against a loop over all images, copies in and across splits, and the sheet."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from twoviews.data.images import ImageData, Images
from twoviews.data.sources import digits, folder
from twoviews.features import PixelEncoder
from twoviews.pictures import fitted, font
from twoviews.protocols import duplicates
from twoviews.protocols.duplicates import MAX_PAIRS, DuplicatePair, Duplicates, shown_pairs
from twoviews.protocols.protocol import EvaluationContext


def context(data: ImageData, place: Path | None) -> EvaluationContext:
    made = EvaluationContext(PixelEncoder(data.channels, data.size), data, torch.device("cpu"), torch.float32)
    made.folder = place
    return made


@pytest.fixture
def copied() -> ImageData:
    """300 digits and 60 others to test, of which image 5 is training image 7, and 6 and 9 are each other's copies."""
    data = digits()
    train, test = data.train.subset(torch.arange(300)), data.test.subset(torch.arange(60))
    test.pixels[5], test.labels[5] = train.pixels[7], train.labels[7]
    test.pixels[9] = test.pixels[6]
    return replace(data, train=train, memory=train, test=test)


def test_pairs_are_those_of_a_loop(copied: ImageData, tmp_path: Path) -> None:
    found = Duplicates(0.9, 50, 0)(context(copied, tmp_path))
    made = context(copied, None)
    x = torch.cat([made.embed(copied.train), made.embed(copied.test)]).double()
    x = (x / x.norm(dim=1, keepdim=True)).numpy()
    names = [("train", str(row)) for row in range(300)] + [("test", str(row)) for row in range(60)]
    expected = {
        (names[one], names[other]) for one in range(360) for other in range(one + 1, 360) if x[one] @ x[other] >= 0.9
    }
    rows = found.tables["duplicates"]
    assert {((row["split"], row["image"]), (row["other_split"], row["other_image"])) for row in rows} == expected
    assert found.values["pairs"] == len(rows) == len(expected) > 3, len(expected)
    assert found.values["pairs"] == sum(found.values[name] for name in ("train", "test", "train_test"))
    assert [row["cosine"] for row in rows] == sorted((row["cosine"] for row in rows), reverse=True)
    exact = [(row["split"], row["image"], row["other_image"]) for row in rows if row["exact"]]
    assert sorted(exact) == [("test", "6", "9"), ("train", "7", "5")] and found.values["exact"] == 2
    leaked = {row["other_image"] for row in rows if row["split"] == "train" and row["other_split"] == "test"}
    assert found.values["test_duplicated"] == pytest.approx(100 * len(leaked) / 60)
    assert found.notes[0] == "300 memory images are training images, and are compared as those."
    assert (
        f"{len(rows) - 2} pairs by cosine alone: " in found.notes[1] and "raise threshold= (now 0.9)" in found.notes[1]
    )
    assert rows[0]["class"] == copied.classes[int(copied.train.labels[7])] == rows[0]["other_class"] or rows[0]["exact"]
    assert Image.open(tmp_path / "duplicates.png").width > 400


def test_pairs_of_two_classes_are_counted(copied: ImageData) -> None:
    found = Duplicates(0.8, 50, 0)(context(copied, None))
    near = [row for row in found.tables["duplicates"] if not row["exact"]]
    mixed = sum(row["class"] != row["other_class"] for row in near)
    assert f"{len(near)} pairs by cosine alone, {mixed} of them of two classes" in found.notes[1] and mixed > 0


def test_more_copies_than_neighbours_are_said() -> None:
    data = digits()
    train = data.train.subset(torch.tensor([0] * 6 + [*range(1, 10)]))
    found = Duplicates(0.9999, 3, 0)(context(replace(data, train=train, memory=None, test=None), None))
    assert found.values["exact"] == found.values["pairs"] == found.values["train"] >= 9
    assert "test_duplicated" not in found.values
    assert "6 of 15 images have 3 near-duplicates or more" in found.notes[0]
    assert len(found.notes) == 1  # equal pixels need no threshold


def test_memory_images_that_are_training_images_are_one(copied: ImageData) -> None:
    """By their pixels, of which each copy counts: one of three copies is in the memory only."""
    train = copied.train.subset(torch.tensor([0, 1, 1, 2, 3]))
    memory = copied.train.subset(torch.tensor([1, 1, 1, 2, 4]))
    found = Duplicates(0.9999, 5, 0)(context(replace(copied, train=train, memory=memory), None))
    assert found.notes == ["3 memory images are training images, and are compared as those."]
    assert {name: found.values[name] for name in ("train", "memory", "train_memory")} == {
        "train": 1,
        "memory": 0,
        "train_memory": 2,
    }


def test_files_are_told_by_their_paths_and_need_no_labels(tmp_path: Path) -> None:
    images = (load_digits().images * 15).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.fromarray(images[number]).resize((32, 32)).save(tmp_path / "photos" / f"{number:02}.png")
    options = {"size": 32, "channels": 1, "workers": 0, "cache": str(tmp_path / "cache")}
    data = folder(root=str(tmp_path / "photos"), **options)
    found = Duplicates(0.999, 3, 0)(context(data, tmp_path))
    assert found.values == {"pairs": 0, "exact": 0, "train": 0} and not (tmp_path / "duplicates.png").exists()
    assert not Duplicates.needs_labels
    one = data.train.subset(torch.arange(4))
    test = Images(one.pixels, one.sizes, torch.zeros(4).long(), [f"{path}.copy" for path in one.paths])
    data = replace(data, test=test, classes=("a",))
    found = Duplicates(0.999, 3, 0)(context(data, tmp_path))
    assert found.values["train_test"] == found.values["exact"] == 4 and found.values["test_duplicated"] == 100
    assert found.rows_shown == 10
    row = found.tables["duplicates"][0]
    assert (row["class"], row["other_class"]) == ("", "a") and f"{row['image']}.copy" == row["other_image"]


def test_captions_keep_the_ends_of_names() -> None:
    face = font("DejaVuSans", 12)
    text = fitted("IMG_20240612_00292_edited.png", face, 96, keep_end=True)
    assert text.startswith("…") and text.endswith("_edited.png") and face.getlength(text) <= 96
    assert fitted("a.png", face, 96, keep_end=True) == "a.png"
    assert fitted("digit number 4 of the second hand", face, 96).startswith("digit num")


def test_an_image_without_a_class_has_its_folder_in_the_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(duplicates, "fitted", lambda text, *_, **__: texts.append(text) or text)
    train, pair = digits().train, DuplicatePair(("train", "train"), 0, 1, 0.99, False)
    for paths in (["p/cat/1.png", "p/dog/1.png"], ["p/1.png", "p/2.png"]):
        images = Images(train.pixels[:2], train.sizes[:2], None, paths)
        duplicates.draw_duplicates(tmp_path / "a.png", {"train": images}, [pair], (), 0.9)
    assert texts == ["1.png", "cat", "1.png", "dog", "1.png", "2.png"]


def test_the_sheet_shows_both_ends() -> None:
    pairs = [DuplicatePair(("train", "test"), number, number, 1 - number / 1000, False) for number in range(100)]
    assert shown_pairs(pairs[:MAX_PAIRS]) == pairs[:MAX_PAIRS]
    assert shown_pairs(pairs) == [*pairs[:20], *pairs[80:]]
