"""Predict, embed and neighbours on files of one's own: alpha, CMYK, 16 bits, a broken one, and the errors."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from test_configs import composed

from twoviews.backbones import ResNet
from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.data.images import Images
from twoviews.data.sources import digits, folder
from twoviews.errors import BadInput
from twoviews.features import PixelEncoder
from twoviews.pictures import GAP, RED
from twoviews.protocols import neighbours, user_images
from twoviews.protocols.classification import calibration_error
from twoviews.protocols.embed import Embed
from twoviews.protocols.linear import Linear
from twoviews.protocols.neighbours import Neighbours, nearest_rows
from twoviews.protocols.predict import Predict
from twoviews.protocols.protocol import EvaluationContext

LINEAR = {"weight_decays": [1e-3], "held_out": 0.1, "iterations": 30, "every_epochs": 0}
FORMATS = ["npz", "parquet", "csv"]
KINDS = ("alpha.png", "broken.jpg", "cmyk.jpg", "deep.tif", "palette.gif", "photo.jpg", "turned.jpg")


def encoder(channels: int) -> ResNet:
    torch.manual_seed(0)
    made = ResNet(channels, 32, "basic", [1, 1], width=8)
    made(torch.randn(16, channels, 32, 32))  # running statistics
    return made


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes of crops from scikit-learn's photographs, as files."""
    root = tmp_path_factory.mktemp("set")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for part, count in (("train", 20), ("test", 5)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                left, top = 11 * number, 7 * number + (300 if part == "test" else 0)
                crop = photo[top : top + 60, left : left + 60]
                Image.fromarray(crop).save(root / part / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """What people's folders hold."""
    place = tmp_path_factory.mktemp("my photos")
    flower = Image.fromarray(load_sample_images().images[1])
    transparent = flower.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(flower.size))
    transparent.save(place / "alpha.png")
    flower.convert("CMYK").save(place / "cmyk.jpg")
    Image.fromarray(np.asarray(flower.convert("L")).astype(np.uint16) * 257).save(place / "deep.tif")
    flower.convert("P").save(place / "palette.gif")
    flower.save(place / "photo.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    flower.transpose(Image.Transpose.ROTATE_90).save(place / "turned.jpg", exif=exif)
    (place / "broken.jpg").write_bytes((place / "photo.jpg").read_bytes()[:200])
    (place / "notes.txt").write_text("not a picture")
    return place


@pytest.fixture
def context(classes: Path, tmp_path: Path) -> EvaluationContext:
    data = folder(root=str(classes), size=32, workers=0, cache=str(tmp_path / "cache"))
    made = EvaluationContext(encoder(3), data, torch.device("cpu"), torch.float32)
    made.folder = tmp_path
    return made


def predict(images: str | None) -> Predict:
    return Predict(images, **LINEAR)


def test_every_kind_of_file_is_predicted_or_named(context: EvaluationContext, photos: Path, tmp_path: Path) -> None:
    found = predict(str(photos))(context)
    rows = found.tables["predictions"]
    assert [Path(row["image"]).name for row in rows] == list(KINDS)
    assert found.values["images"] == 7 and found.values["broken"] == 1 and found.probabilities is None
    full = {
        Path(one["image"]).name: one for one in json.loads((tmp_path / "predictions.json").read_text())["predictions"]
    }
    assert set(full) == set(KINDS)
    for row in rows:
        one = full[Path(row["image"]).name]
        if "broken" in row["image"]:
            assert row["class"] == "" and row["broken"] == one["broken"] != "" and "probabilities" not in one
        else:
            assert row["broken"] == "" and one["class"] == row["class"] in ("china", "flower")
            assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert row["probability_percent"] == 100 * max(one["probabilities"].values())
            assert row["second_percent"] == pytest.approx(100 - row["probability_percent"], abs=1e-3)
    # The same picture in another mode, or turned and marked as turned, is the same to the encoder.
    shares = {name: full[name]["probabilities"]["flower"] for name in KINDS if name != "broken.jpg"}
    assert shares["turned.jpg"] == pytest.approx(shares["photo.jpg"], abs=0.05)
    assert shares["cmyk.jpg"] == pytest.approx(shares["photo.jpg"], abs=0.2)


def test_a_test_image_by_its_file_is_what_the_protocol_linear_makes_of_it(
    context: EvaluationContext, classes: Path
) -> None:
    found = predict(str(classes / "test"))(context)
    rows, temperature = found.tables["predictions"], found.values["temperature"]
    expected = (Linear(**LINEAR)(context).probabilities.log() / temperature).softmax(1)
    assert [row["image"] for row in rows] == context.data.test.paths
    for row, shares in zip(rows, expected, strict=True):
        assert row["class"] == ("china", "flower")[int(shares.argmax())]
        assert row["probability_percent"] == pytest.approx(100 * shares.max().item(), abs=1e-2)
    assert {row["class"] for row in rows} == {"china", "flower"}


@pytest.fixture(scope="module")
def sure(tmp_path_factory) -> tuple[EvaluationContext, Path]:
    """Digits by their pixels, which a probe of thousands of weights learns by heart, and half of the test images as files."""
    data, place = digits(train_images=600), tmp_path_factory.mktemp("digits")
    for number, pixels in enumerate(data.test.pixels[:180]):
        Image.fromarray(pixels[0].numpy()).save(place / f"{number:03}.png")
    context = EvaluationContext(
        PixelEncoder(1, 32), replace(data, memory=data.train), torch.device("cpu"), torch.float32
    )
    return context, place


def test_probabilities_are_calibrated_on_images_held_out_from_the_probe(sure, tmp_path: Path) -> None:
    context, place = sure
    context.folder = tmp_path
    found = Predict(str(place), **{**LINEAR, "weight_decays": [0], "iterations": 300})(context)
    temperature, written = found.values["temperature"], json.loads((tmp_path / "predictions.json").read_text())
    labels = context.data.test.labels[:180]
    p = torch.tensor([[one["probabilities"][name] for name in context.data.classes] for one in written["predictions"]])
    bare = (p.double().log() * temperature).softmax(1)  # at a temperature of 1
    assert temperature > 2 and written["temperature"] == temperature and written["test_images"] == 360
    assert calibration_error(p, labels) < 0.5 * calibration_error(bare, labels)
    assert torch.equal(p.argmax(1), bare.argmax(1))


def test_pictures_unlike_the_test_images_are_counted_and_marked(sure, tmp_path: Path) -> None:
    context, place = sure
    context.folder = None
    like = predict(str(place / "00*.png"))(context)
    assert like.notes == [] and like.values["far"] == 0 and len(like.tables["predictions"]) == 10
    usual = [row["distance_percentile"] for row in predict(str(place))(context).tables["predictions"]]
    assert np.mean(usual) == pytest.approx(50, abs=5) and 0 <= min(usual) < 5 and 95 < max(usual) < 100
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"noise{number}.png")
        shutil.copy(place / f"00{number}.png", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"")
    found = predict(str(tmp_path))(context)
    assert found.values["far"] == 3 and found.values["broken"] == 1
    assert len(found.notes) == 1 and "3 of 6 pictures are farther" in found.notes[0]
    assert "99 % of the 360 test images" in found.notes[0]
    for row in found.tables["predictions"]:
        if "noise" in row["image"]:
            assert row["distance_percentile"] == 100 and row["distance"] > 0.2
        elif "broken" in row["image"]:
            assert row["distance_percentile"] == row["distance"] == ""
        else:
            assert row["distance_percentile"] < 99


def test_grey_runs_and_more_than_a_chunk(photos: Path, classes: Path, tmp_path: Path) -> None:
    data = digits(train_images=100)
    made = EvaluationContext(encoder(1), replace(data, memory=data.train), torch.device("cpu"), torch.float32)
    made.folder = None
    found = predict(str(photos / "*.jpg"))(made)
    assert [Path(row["image"]).name for row in found.tables["predictions"]] == [
        "broken.jpg",
        "cmyk.jpg",
        "photo.jpg",
        "turned.jpg",
    ]
    many = user_images.embed_user_images(user_images.image_paths(f"{classes}/train/*/*.png"), made)
    assert len(many.x) == 40 > 32 and not many.broken
    alone = user_images.embed_user_images(many.paths[35:36], made)
    torch.testing.assert_close(many.x[35:36], alone.x, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("predictions*"))


def test_what_images_may_be(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert user_images.image_paths("photo.jpg") == ["photo.jpg"]
    assert user_images.image_paths(str(photos)) == [f"{photos}/{name}" for name in KINDS]
    assert user_images.image_paths("*.jpg") == ["broken.jpg", "cmyk.jpg", "photo.jpg", "turned.jpg"]
    assert user_images.image_paths(f"{photos}/[ad]*") == [f"{photos}/alpha.png", f"{photos}/deep.tif"]
    assert user_images.image_paths("notes.txt") == [
        "notes.txt"
    ]  # what is named outright is tried, and named if it is broken
    for images, part in (
        (None, "images= names no pictures"),
        ("", "images= names no pictures"),
        ("phto.jpg", r"no such file or folder. Did you mean 'photo.jpg'\?"),
        ("*.heic", "fits no picture"),
    ):
        with pytest.raises(BadInput, match=part):
            user_images.image_paths(images)
    for images in (None, "phto.jpg"):  # before an encoder is loaded
        with pytest.raises(BadInput, match="images="):
            predict(images)
    with pytest.raises(BadInput, match="no such file"):
        Embed("test", "phto.jpg", FORMATS, 0)
    with pytest.raises(BadInput, match="no such file"):
        Neighbours("phto.jpg", 3, 3, 0, 0)


def test_pictures_that_are_no_files(context: EvaluationContext, photos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    shutil.copy(photos / "photo.jpg", tmp_path / "photo.jpg")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(BadInput, match="is no regular file"):
            user_images.image_paths(str(tmp_path / name))
    for images in (str(tmp_path), f"{tmp_path}/*.*"):
        embedded = user_images.embed_user_images(user_images.image_paths(images), context)
        assert [Path(embedded.paths[row]).name for row in embedded.broken] == ["device.png", "pipe.png"]
        assert len(embedded.x) == 1 and {*embedded.broken.values()} == {"is no regular file"}


def test_predict_refuses(context: EvaluationContext, photos: Path) -> None:
    image = str(photos / "photo.jpg")
    context.data = replace(context.data, memory=None, test=None)
    with pytest.raises(BadInput, match="no labelled images"):
        predict(image)(context)
    context.data = replace(context.data, channels=4)
    with pytest.raises(BadInput, match="4 channels, and picture files have 1 or 3"):
        user_images.embed_user_images([image], context)


def test_embeddings(context: EvaluationContext, photos: Path, tmp_path: Path) -> None:
    assert Embed("test", None, FORMATS, 0)(context).values == {"images": 10, "features": 16}
    saved = np.load(tmp_path / "embeddings.npz", allow_pickle=False)
    assert saved["features"].dtype == np.float32 and (saved["features"] == context.test.x.numpy()).all()
    assert saved["labels"].tolist() == context.data.test.labels.tolist() and saved["classes"].tolist() == [
        "china",
        "flower",
    ]
    assert saved["paths"].tolist() == context.data.test.paths
    columns = {"path": context.data.test.paths, "label": saved["labels"], "class": saved["classes"][saved["labels"]]}
    for table in (pandas.read_parquet(tmp_path / "embeddings.parquet"), pandas.read_csv(tmp_path / "embeddings.csv")):
        assert [*table] == [*columns, *(f"feature_{number}" for number in range(16))]
        assert {name: table[name].tolist() for name in columns} == {name: [*rows] for name, rows in columns.items()}
        assert (table.iloc[:, 3:].to_numpy(np.float32) == saved["features"]).all()
    found = Embed("test", str(photos), FORMATS, 0)(context)
    saved = np.load(tmp_path / "embeddings.npz", allow_pickle=False)
    assert [Path(path).name for path in saved["paths"]] == [name for name in KINDS if name != "broken.jpg"]
    assert saved["labels"].tolist() == [-1] * 6 and len(saved["features"]) == 6
    for table in (pandas.read_parquet(tmp_path / "embeddings.parquet"), pandas.read_csv(tmp_path / "embeddings.csv")):
        assert table["path"].tolist() == saved["paths"].tolist()
        assert table["label"].isna().all() and table["class"].isna().all()
    assert Path(found.tables["broken"][0]["image"]).name == "broken.jpg"
    with pytest.raises(BadInput, match="none of them is a sound picture"):
        Embed("test", str(photos / "broken.jpg"), FORMATS, 0)(context)
    context.data = replace(context.data, memory=None, test=None)
    with pytest.raises(BadInput, match="no labelled images, so no test images; use split=train"):
        Embed("test", None, FORMATS, 0)(context)
    for name in ("npz", "parquet", "csv"):
        (tmp_path / f"embeddings.{name}").unlink()
    context.dtype = torch.bfloat16
    found = Embed("train", None, ["csv"], 0)(context)
    assert found.values["images"] == 40 and found.notes == [
        "embeddings were computed in bfloat16 and are stored as float32."
    ]
    assert [path.name for path in tmp_path.glob("embeddings*")] == ["embeddings.csv"]


def test_nearest_rows_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits().train.pixels[:300].flatten(1).float()
    bank, queries = images[:200], images[200:]
    monkeypatch.setattr("twoviews.protocols.knn.CHUNK_BYTES", 4 * 200 * 7)  # 15 chunks
    cosines, rows = nearest_rows(queries, bank, 5, None)
    for query, values, found in zip(queries.numpy(), cosines, rows, strict=True):
        all_ = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in bank.numpy()]
        best = sorted(range(200), key=lambda i: -all_[i])[:5]
        assert found.tolist() == best
        assert values.tolist() == pytest.approx([all_[i] for i in best], abs=1e-5)
    own = torch.arange(200)
    assert not (nearest_rows(bank, bank, 199, own)[1] == own[:, None]).any()
    assert (nearest_rows(bank, bank, 1, None)[1][:, 0] == own).float().mean() > 0.99


def test_neighbours_of_pictures_and_of_samples(
    context: EvaluationContext, classes: Path, photos: Path, tmp_path: Path
) -> None:
    train = context.data.train
    found = Neighbours(train.paths[3], 4, 20, 0, 0)(context)
    rows = found.tables["neighbours"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] and rows[0]["neighbour"] == train.paths[3]
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-4) and rows[0]["class"] == "china"
    found = Neighbours(str(photos), 3, 20, 0, 0)(context)
    broken = [row for row in found.tables["neighbours"] if row["broken"]]
    assert [Path(row["image"]).name for row in broken] == ["broken.jpg"] and len(
        found.tables["neighbours"]
    ) == 6 * 3 + 1
    assert found.values == {"images": 6, "broken": 1}
    assert len({tuple(row) for row in found.tables["neighbours"]}) == 1  # equal keys
    (tmp_path / "neighbours.png").unlink()
    found = Neighbours(None, 5, 4, 0, 0)(context)
    table = found.tables["neighbours"]
    labels = dict(zip(context.data.test.paths, context.data.test.labels.tolist(), strict=True))
    agree = [row["class"] == context.data.classes[labels[row["image"]]] for row in table]
    assert (
        found.values["agreement"] == pytest.approx(100 * sum(agree) / 20) and len({row["image"] for row in table}) == 4
    )
    assert Neighbours(None, 5, 4, 0, 0)(context).tables == found.tables
    assert {row["image"] for row in Neighbours(None, 5, 4, 1, 0)(context).tables["neighbours"]} != {
        row["image"] for row in table
    }
    assert Image.open(tmp_path / "neighbours.png").format == "PNG"
    context.data = replace(context.data, memory=None, test=None)
    alone = Neighbours(None, 500, 3, 0, 0)(context).tables["neighbours"]
    assert len(alone) == 3 * 39 and not any(row["image"] == row["neighbour"] for row in alone)
    (tmp_path / "neighbours.png").unlink()
    assert Neighbours(str(photos / "broken.jpg"), 3, 20, 0, 0)(context).values == {"images": 0, "broken": 1}
    assert not (tmp_path / "neighbours.png").exists()


def test_the_sheet_frames_what_is_of_another_class(tmp_path: Path) -> None:
    def grey(values: list[int], labels: list[int] | None) -> Images:
        pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32).contiguous()
        return Images(pixels, torch.full((len(values), 2), 32), None if labels is None else torch.tensor(labels))

    train = grey([10, 20, 30], [0, 1, 0])
    for labels, framed in (([0, 1], [[False, True, False], [True, False, True]]), (None, [[False] * 3] * 2)):
        own = grey([100, 200], labels)
        rows = [
            neighbours.NeighbourRow(
                f"photo {i}.jpg", i, -1 if labels is None else labels[i], [0, 1, 2], [0.9, 0.8, 0.7]
            )
            for i in (0, 1)
        ]
        neighbours.draw_neighbours(tmp_path / "sheet.png", own, train, rows, ("cat", "кошка"), "title")
        picture = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
        high, start, wide = 96 + 2 * neighbours.LINE_PX + GAP, GAP + 96 + GAP + 3 * GAP, 96 + GAP
        assert picture.shape[0] == neighbours.HEADING_PX + 2 * high + GAP
        found = []
        for row in range(2):
            top = neighbours.HEADING_PX + row * high
            assert (picture[top + 48, GAP + 48] == (100, 200)[row]).all()
            assert [picture[top + 48, start + wide * place + 48, 0] for place in range(3)] == [10, 20, 30]
            found.append([bool((picture[top - 2, start + wide * place + 48] == RED).all()) for place in range(3)])
        assert found == framed


@pytest.mark.parametrize("name", ["predict", "embed", "neighbours", "export"])
def test_their_files_compose_and_build(name: str) -> None:
    images = [f"protocol.predict.images={__file__}"] if name == "predict" else []
    cfg = composed(f"protocol=[{name}]", *images)
    check("train", cfg)
    assert list(cfg.protocol) == [name] and build(cfg.protocol[name]).every_epochs == 0
    if name == "predict":
        numbers = composed("protocol=[linear]").protocol.linear
        assert {key: cfg.protocol.predict[key] for key in LINEAR} == {key: numbers[key] for key in LINEAR}
