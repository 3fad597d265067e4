import inspect
import io
import os
import shutil
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from twoviews.data import contents, sources
from twoviews.data.decoding import Decoded
from twoviews.errors import BadInput

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def picture(path, seed=0, size=(16, 16), colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values if colour is None else np.full_like(values, colour)).save(path)


def pictures(root, names, count=3, **options):
    for name in names:
        for i in range(count):
            picture(root / name / f"{i}.png", seed=hash((name, i)) % 1000, **options)


def folder(root, cache, **options):
    return sources.folder(**{"root": root and str(root), "cache": cache, "workers": 0, **options})


def _composed(path):
    """The file as the group `data` of a config; one that sets other groups too says so itself."""
    loaded = OmegaConf.load(path)
    return loaded if "data" in loaded else OmegaConf.create({"data": loaded})


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_files_have_exactly_the_keys_of_the_signature(path):
    made = OmegaConf.to_container(_composed(path), resolve=True)["data"]
    function = getattr(sources, made.pop("_target_").removeprefix("twoviews.data.sources."))
    parameters = inspect.signature(function).parameters
    assert set(made) == set(parameters)
    for name, parameter in parameters.items():
        assert parameter.default in (inspect.Parameter.empty, made[name])
    if made.get("classes"):
        assert len(set(made["classes"])) == {"cifar10": 10, "cifar100": 100, "stl10": 10}[path.stem]


def test_digits_are_to_be_learnt_not_looked_up():
    data = sources.digits()
    assert (len(data.train), len(data.test), data.channels, data.size) == (1437, 360, 1, 32)
    assert data.memory is data.train
    assert data.digest == sources.digits().digest
    bank, queries = ((each.pixels.flatten(1) / 255 - data.mean[0]) / data.std[0] for each in (data.memory, data.test))
    similar, nearest = (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(bank).T).topk(20)
    votes = torch.zeros(360, 10).scatter_add_(1, data.memory.labels[nearest], (similar / 0.1).exp())
    assert (votes.argmax(1) == data.test.labels).float().mean().item() == pytest.approx(0.6, abs=0.05)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), sources.digits()
    ink = torch.cat([split.pixels.flatten(1).long().sum(1) for split in (ours.train, ours.test)])
    expected = torch.from_numpy(theirs.images * 255 / 16).round().long().sum((1, 2)) * 4
    assert torch.equal(ink.sort().values, expected.sort().values)
    labels = torch.cat([ours.train.labels, ours.test.labels])
    assert torch.equal(labels.bincount(), torch.from_numpy(theirs.target).bincount())


def test_fewer_training_images_keep_the_classes_in_balance_and_the_rest_whole():
    data = sources.digits(train_images=100)
    assert len(data.train) == 100
    assert set(torch.bincount(data.train.labels).tolist()) <= {9, 10, 11}
    assert (len(data.memory), len(data.test)) == (1437, 360)
    assert data.digest != sources.digits().digest
    assert data.mean == sources.digits().mean
    assert any("100 of 1437" in note for note in data.notes)
    with pytest.raises(BadInput, match=r"train_images=1438 .* at most 1437"):
        sources.digits(train_images=1438)


def test_one_tree_with_train_and_test(tmp_path, cache):
    root = tmp_path / "set"
    pictures(root / "train", ["cat", "dog/deep/er"])
    pictures(root / "test", ["cat", "dog"], count=2)
    (root / "train" / "cat" / "list.txt").write_text("x")
    data = folder(root, cache)
    assert (len(data.train), len(data.test), data.size, data.channels, data.classes) == (6, 4, 16, 3, ("cat", "dog"))
    assert data.memory is data.train
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert any(note.endswith("are not taken for pictures: 1 .txt.") for note in data.notes)
    assert any("16 x 16" in note for note in data.notes)
    first = np.asarray(Image.open(root / "train" / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(data.train.pixels[0], first)
    assert np.allclose(data.mean, data.train.pixels.double().mean((0, 2, 3)) / 255)


def test_unlabelled_training_images_with_labelled_memory_and_test(tmp_path, cache):
    root = tmp_path / "set"
    for i in range(5):
        picture(root / "train_unl" / f"{i}.png", i)
    pictures(root / "train", ["a", "b"])
    pictures(root / "val", ["a", "b"], count=1)
    data = folder(root, cache, train="train_unl", memory="train")
    assert (len(data.train), len(data.memory), len(data.test)) == (5, 6, 2)
    assert data.train.labels is None
    assert data.test.labels.tolist() == [0, 1]
    assert any("unlabelled" in note for note in data.notes)
    mixed = folder(root, cache, train=".", memory="train", test=str(root / "val"), labels=False)
    assert len(mixed.train) == 13
    assert mixed.train.labels is None


def test_a_folder_of_pictures_alone_has_no_labels(tmp_path, cache):
    for i in range(4):
        picture(tmp_path / "set" / f"{i}.png", i)
    data = folder(tmp_path / "set", cache, train_images=3)
    assert (len(data.train), data.train.labels, data.memory, data.test, data.classes) == (3, None, None, None, ())


def test_the_lack_of_a_test_folder_is_said(tmp_path, cache):
    pictures(tmp_path / "set", ["a", "b"])
    data = folder(tmp_path / "set", cache)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.memory, data.test, data.classes) == (None, None, ("a", "b"))
    assert "There is no labelled test folder (test= names one)." in data.notes


def test_folders_that_do_not_fit_are_named(tmp_path, cache):
    root = tmp_path / "set"
    pictures(root / "train", ["cat", "dog"])
    pictures(root / "test", ["cat", "dgo"])
    with pytest.raises(BadInput, match=r"test lacks 1 class of .*train: dog"):
        folder(root, cache)
    picture(root / "train" / "loose.png")
    with pytest.raises(BadInput, match=r"has 1 picture directly in it, beside .*labels=false"):
        folder(root, cache)
    with pytest.raises(BadInput, match=r"train=trian is no folder below .* Did you mean 'train'"):
        folder(root, cache, train="trian")
    with pytest.raises(BadInput, match=r"root=.*sett is no folder\. Did you mean 'set'"):
        folder(tmp_path / "sett", cache)
    with pytest.raises(BadInput, match=r"root=/path"):
        folder(None, cache)
    (root / "train").rename(root / "training")
    with pytest.raises(BadInput, match=r"train="):
        folder(root, cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no picture"):
        folder(tmp_path / "empty", cache)


def test_broken_files_stop_the_run_by_name_and_may_be_allowed(tmp_path, cache):
    root = tmp_path / "set"
    pictures(root / "train", ["a", "b"], count=4, size=(64, 64))
    pictures(root / "test", ["a", "b"], count=1, size=(64, 64))
    truncated = root / "train" / "a" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (root / "train" / "b" / "2.png").write_bytes(b"")
    jpeg = io.BytesIO()
    Image.open(root / "train" / "a" / "0.png").save(jpeg, "JPEG")
    (root / "train" / "b" / "9.jpg").write_bytes(jpeg.getvalue()[:-600])
    with pytest.raises(BadInput, match=r"3 broken files.*max_broken=0.*a/1\.png.*b/2\.png.*b/9\.jpg.*max_broken=3"):
        folder(root, cache)
    data = folder(root, cache, max_broken=3, workers=2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert any("3 broken files skipped" in note and "1.png" in note for note in data.notes)
    whole = np.asarray(Image.open(root / "train" / "a" / "2.png")).transpose(2, 0, 1)
    assert np.array_equal(data.train.pixels[1], whole)
    for path in (truncated, root / "train" / "b" / "2.png", root / "train" / "b" / "9.jpg"):
        path.unlink()
    assert len(folder(root, cache).train) == 6


def test_what_is_no_file_is_a_broken_one(tmp_path, cache):
    place = tmp_path / "set" / "a"
    pictures(tmp_path / "set", ["a"], count=4)
    (place / "x.png").symlink_to("nowhere.png")
    (place / "y.png").symlink_to("y.png")
    os.mkfifo(place / "z.png")
    (place / "za.png").symlink_to("z.png")
    (place / "zb.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(place / "zc.png"))
        names = ["x", "y", "z", "za", "zb", "zc"]
        with pytest.raises(BadInput, match=r"6 broken files.*" + ".*".join(rf"/{name}\.png" for name in names[:3])):
            folder(tmp_path / "set", cache)
        allowed = folder(tmp_path / "set", cache, max_broken=6)
    assert len(allowed.train) == 4 and "z.png (is no regular file)" in " ".join(allowed.notes)


@pytest.mark.parametrize("name", ["images.npz", "labels.npy", "train.npz", "test.npz"])
def test_arrays_that_are_no_files_are_refused(tmp_path, cache, name):
    place = tmp_path / "set"
    place.mkdir()
    values = {"images": numbers((20, 8, 8, 3)), "labels": np.arange(20) % 2}
    for one in ("images.npz", "train.npz", "test.npz"):
        np.savez(place / one, **values)
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / "pipe")
    (place / name).symlink_to("pipe")
    root = place if name in ("train.npz", "test.npz") else place / "images.npz"
    labels = str(place / name) if name == "labels.npy" else None
    with pytest.raises(BadInput, match=rf"{name} is no regular file"):
        array(root, cache, labels=labels)


@pytest.mark.parametrize("free", [0, 2**40])
def test_images_come_without_shared_memory_where_there_is_none(tmp_path, monkeypatch, capfd, free):
    paths = []
    for number in range(70):
        picture(tmp_path / f"{number}.png", seed=number)
        paths.append(str(tmp_path / f"{number}.png"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    files, alone = (Decoded(paths, size=16, channels=3, workers=workers) for workers in (2, 0))
    parts = torch.arange(70).split(40)
    for found, expected in zip(files.batches(parts), alone.batches(parts), strict=True):
        assert torch.equal(found, expected) and found.is_shared() == (free > 0 and len(found) <= 32)
    assert ("images come from them by pipes" in capfd.readouterr().err) == (free == 0)


def test_a_file_without_permission_is_not_a_broken_one(tmp_path, cache, monkeypatch):
    pictures(tmp_path / "set", ["a", "b"])

    def refuse(path, size, channels):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("twoviews.data.decoding.decode", refuse)
    with pytest.raises(BadInput, match=r"0\.png cannot be read: Permission denied"):
        folder(tmp_path / "set", cache, max_broken=99)
    assert not [path for path in Path(cache).iterdir() if path.is_dir()]


def test_large_photographs_are_decoded_on_demand_like_the_store_would(tmp_path, cache):
    root = tmp_path / "set"
    pictures(root / "train", ["a", "b"], size=(300, 240))
    pictures(root / "test", ["a", "b"], count=1, size=(500, 400))
    (root / "train" / "a" / "broken.png").write_bytes(b"x")
    data = folder(root, cache, max_broken=1, workers=1)
    assert data.size == 224
    assert isinstance(data.train.pixels, Decoded)
    assert not list(Path(cache).glob("*/pixels.npy"))
    assert data.train.sizes.tolist() == [[300, 240]] * 6
    assert data.test.sizes.tolist() == [[500, 400]] * 2
    batches = list(data.train.batches(4))
    assert [len(pixels) for pixels, _, _ in batches] == [4, 2]
    pixels = torch.cat([pixels for pixels, _, _ in batches])
    assert np.allclose(data.mean, pixels.double().mean((0, 2, 3)) / 255)
    again = folder(root, cache, max_broken=1, workers=0, train_images=4)
    few = torch.cat([pixels for pixels, _, _ in again.train.batches(4)])
    assert len(few) == 4
    assert all((row == pixels).flatten(1).all(1).any() for row in few)


def array(path, cache, **options):
    return sources.array(**{"root": path and str(path), "cache": cache, **options})


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_digits_as_an_array(tmp_path, cache):
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(tmp_path / "digits.npz", images=digits.images, labels=digits.target)
    data = array(tmp_path / "digits.npz", cache)
    assert (len(data.train), len(data.test), data.channels, data.size) == (1438, 359, 1, 8)
    assert data.classes == tuple("0123456789")
    assert any("0 to 16 of the training images (float64) become 0 to 255" in note for note in data.notes)
    assert any("359 of 1797" in note for note in data.notes)
    assert not any("Labels" in note for note in data.notes)
    assert data.train.pixels.max() == 255
    assert array(tmp_path / "digits.npz", cache).notes == data.notes


def test_five_float_channels_each_keep_their_range(tmp_path, cache):
    images = numbers((40, 9, 9, 5)) * np.array([1, 10, 100, 1000, 10000])
    np.savez(tmp_path / "cube.npz", x=images.astype(np.float32), y=np.arange(40) % 4 + 1)
    data = array(tmp_path / "cube.npz", cache)
    assert (data.channels, data.size, len(data.train), len(data.test)) == (5, 9, 32, 8)
    assert data.classes == ("1", "2", "3", "4")
    assert set(data.train.labels.tolist()) == {0, 1, 2, 3}
    assert data.train.pixels.amax((0, 2, 3)).tolist() == [255] * 5
    assert data.train.pixels.amin((0, 2, 3)).tolist() == [0] * 5
    assert any("by channel" in note for note in data.notes)
    assert any("1 to 4, are numbered 0 to 3" in note for note in data.notes)


def test_colours_keep_their_balance_and_test_values_are_clipped_aloud(tmp_path, cache):
    train, test = np.zeros((4, 8, 8, 3)), np.full((2, 8, 8, 3), 0.5)
    train[0, ..., 0], test[0, 0, 0, 0], test[0, 0, 0, 1] = 1, 300, -4
    np.savez(tmp_path / "a.npz", images=train, labels=[0, 1, 0, 1], test_images=test, test_labels=[0, 1])
    data = array(tmp_path / "a.npz", cache)
    assert data.train.pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert data.test.pixels[0, :, 0, 0].tolist() == [255, 0, 128]
    assert any(note.endswith("are set to its ends (2 of them).") for note in data.notes)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array(["b", "a", "c", "a"] * 5), ("a", "b", "c")),
        (np.array([b"b", b"a"] * 10), ("a", "b")),
        (np.array([-2, 7, 0, 7] * 5), ("-2", "0", "7")),
        (np.array([-1, 1] * 10), ("-1", "1")),
        (np.array([1.0, 2.0] * 10), ("1", "2")),
        (np.array([[3], [5]] * 10), ("3", "5")),
        (np.array([True, False] * 10), ("0", "1")),
    ],
)
def test_labels_of_any_kind_are_numbered(tmp_path, cache, labels, classes):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    data = array(tmp_path / "a.npz", cache)
    assert data.classes == classes
    by_pixels = {pixels.tobytes(): str(label) for pixels, label in zip(images, labels.reshape(-1), strict=True)}
    for split in (data.train, data.test):
        for pixels, label in zip(split.pixels.numpy(), split.labels.tolist(), strict=True):
            given = by_pixels[pixels.tobytes()]
            assert classes[label] in (given, given.removesuffix(".0"), given[2:-1], str(int(given == "True")))


def test_labels_that_say_nothing_count_as_none(tmp_path, cache):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / "one.npz", images=images, labels=np.zeros(10, int), test_images=images, test_labels=np.zeros(10)
    )
    np.savez(tmp_path / "half.npz", images=images, labels=np.arange(10) % 2, test_images=images)
    one, half = array(tmp_path / "one.npz", cache), array(tmp_path / "half.npz", cache)
    for data in (one, half):
        assert (len(data.train), data.memory, data.test) == (10, None, None)
        assert any("left out: not all images have labels" in note for note in data.notes)
    assert one.train.labels is None
    assert any("All labels are 0" in note for note in one.notes)
    assert half.train.labels.tolist() == [0, 1] * 5


def test_integers_of_16_bits_and_images_that_are_not_square(tmp_path, cache):
    images = np.random.default_rng(0).integers(100, 4000, (6, 10, 20), dtype=np.uint16)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(6) % 2)
    data = array(tmp_path / "a.npy", cache)
    assert (data.size, data.train.labels, data.memory, data.classes) == (10, None, None, ())
    assert data.train.sizes.tolist() == [[10, 20]] * 6
    assert any("10 x 20 px are resized to 10 x 10" in note for note in data.notes)
    labelled = array(tmp_path / "a.npy", cache, labels=str(tmp_path / "labels.npy"))
    assert (len(labelled.train), len(labelled.test)) == (5, 1)


def test_a_folder_with_train_and_test_files(tmp_path, cache):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=["x", "y"] * 3)
    np.savez(tmp_path / "test.npz", images=images[:2], labels=["y", "y"])
    data = array(tmp_path, cache)
    assert (len(data.train), data.test.labels.tolist()) == (6, [1, 1])
    assert torch.equal(data.train.pixels, torch.from_numpy(images).permute(0, 3, 1, 2))
    np.savez(tmp_path / "test.npz", images=images[:2], labels=["y", "z"])
    with pytest.raises(BadInput, match=r"1 labels of the test images .*: z"):
        array(tmp_path, cache)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, r"looks like \[N, C, H, W\]"),
        ({"images": np.array([[None]])}, "Python objects"),
        ({"images": np.full((4, 8, 8), np.nan)}, "Image 0 .* NaN"),
        ({"images": np.where(np.arange(4)[:, None, None] == 2, np.inf, np.ones((4, 8, 8)))}, "Image 2 .* NaN"),
        ({"images": np.ones((4, 8, 8))}, "All values of the training images are 1"),
        ({"images": np.zeros((4, 8, 8), complex)}, "complex128: save them as uint8"),
        ({"images": np.zeros((4, 8), np.uint8)}, r"shape \(4, 8\)"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"shape \(0, 8, 8\)"),
        ({"pictures": np.zeros((4, 8, 8), np.uint8)}, "holds 'pictures' and no array 'images'"),
        ({"images": np.zeros((4, 8, 8)), "X": np.zeros((4, 8, 8))}, "both 'images' and 'X'"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(3)}, r"4 images and labels of shape \(3,\)"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.eye(4)}, r"labels of shape \(4, 4\)"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) / 2}, "whole numbers or strings"),
        (
            {"images": np.zeros((4, 8, 8), np.uint8), "test_images": np.zeros((4, 9, 9), np.uint8)},
            "do not fit training images",
        ),
    ],
)
def test_arrays_that_are_something_else_are_refused(tmp_path, cache, content, sentence):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(BadInput, match=sentence):
        array(tmp_path / "a.npz", cache)


def test_array_files_that_are_not_there_or_not_sound(tmp_path, cache):
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    (tmp_path / "a.csv").write_text("1,2")
    for path, sentence in [
        ("a.npz", "a.npz"),
        ("a.csv", "no .npz or .npy"),
        ("b.npz", "not there. Did you mean 'a.npz'"),
        (".", "no train.npz"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            array(tmp_path / path, cache)
    with pytest.raises(BadInput, match=r"root=/path"):
        array(None, cache)
    with pytest.raises(BadInput, match=r"labels=nowhere\.npy"):
        np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
        array(tmp_path / "x.npy", cache, labels="nowhere.npy")


def known(name, root, cache):
    made = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    return getattr(sources, name)(
        root=str(root), cache=cache, **{key: made[key] for key in ("mean", "std", "classes", "train_images")}
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_without_a_network_the_sentence_names_the_file_and_digits(tmp_path, cache, monkeypatch, name):
    from torchvision.datasets import utils

    def away(*arguments):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(utils, "download_url", away)
    with pytest.raises(
        BadInput, match=r"could not be downloaded.*http.*md5 [0-9a-f]{32}\) at .*downloads.*data=digits"
    ):
        known(name, tmp_path / "downloads", cache)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_damaged_archive_is_named_and_left_alone(tmp_path, cache):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(BadInput, match=r"cifar-10-python\.tar\.gz is damaged .*c58f30108f718f92721af3b95e74349a"):
        known("cifar10", tmp_path, cache)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"half of it"


def test_an_archive_laid_in_place_is_unpacked_and_used(tmp_path, cache, monkeypatch):
    """An archive in CIFAR's format but with images and checksums of our own: torchvision reads and verifies it."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    values = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {
        name: pickle.dumps({"data": values[10 * i : 10 * i + 10], "labels": list(range(10))})
        for i, name in enumerate(names)
    }
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files["batches.meta"] = pickle.dumps({"label_names": classes})
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    whole = hashlib.md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", whole)
    data = known("cifar10", tmp_path, cache)
    assert (len(data.train), len(data.test), data.classes) == (50, 10, tuple(classes))
    assert data.memory is data.train
    assert np.array_equal(data.train.pixels.numpy().reshape(50, 3072), values[:50])
    assert np.array_equal(data.test.pixels.numpy().reshape(10, 3072), values[50:])
    assert data.mean == (0.4914, 0.4822, 0.4465)


def grey(root, value):
    """One picture a class and a split; all such folders have the same names, sizes and times, as from one archive."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            for i in range(2):
                path = root / split / name / f"{i}.bmp"
                picture(path, colour=value)
                os.utime(path, (10**9, 10**9))


def shown(root, cache):
    """The grey of its pictures, as the data set has it."""
    return {int(value) for value in folder(root, cache).train.pixels.unique()}


def test_folders_that_look_alike_have_stores_of_their_own(tmp_path, cache):
    for value in (1, 2):
        grey(tmp_path / f"fold{value}" / "images", value)
        assert shown(tmp_path / f"fold{value}" / "images", cache) == {value}


def test_a_folder_that_is_replaced_has_another_store(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_S", -1.0)  # all of it counts as settled, and is known again
    for value in (1, 2):
        grey(tmp_path / f"new{value}", value)
    for value in (1, 2, 1):
        (tmp_path / f"new{value}").rename(tmp_path / "set")
        assert shown(tmp_path / "set", cache) == {value}
        (tmp_path / "set").rename(tmp_path / f"new{value}")


def test_files_that_change_within_their_times_have_another_store(tmp_path, cache, monkeypatch):
    grey(tmp_path / "set", 1)
    frozen = os.stat
    stamps = {}

    def coarse(path, **options):  # a file system that notes no times finer than this test takes
        return (
            stamps.setdefault(str(path), frozen(path, **options))
            if str(path).endswith(".bmp")
            else frozen(path, **options)
        )

    monkeypatch.setattr(os, "stat", coarse)
    assert shown(tmp_path / "set", cache) == {1}
    grey(tmp_path / "set", 2)
    assert shown(tmp_path / "set", cache) == {2}


def test_copies_share_a_store_and_are_read_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_S", -1.0)
    grey(tmp_path / "one" / "set", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    read = []
    monkeypatch.setattr(contents, "_digest", lambda path, digest=contents._digest: read.append(path) or digest(path))
    for _ in range(2):
        for place in ("one", "other"):
            assert shown(tmp_path / place / "set", cache) == {1}
    assert len(read) == len(set(read)) == 16
    assert len([path for path in Path(cache).iterdir() if path.name.startswith("set-") and path.is_dir()]) == 1


def test_arrays_of_the_same_name_size_and_time_have_stores_of_their_own(tmp_path, cache):
    for value in (1, 2):
        path = tmp_path / str(value) / "images.npy"
        path.parent.mkdir()
        np.save(path, np.full((4, 8, 8, 3), value, np.uint8))
        os.utime(path, (10**9, 10**9))
        assert int(array(path, cache).train.pixels.max()) == value


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.float32])
@pytest.mark.parametrize("tested", [False, True])
def test_label_minus_one_is_none(tmp_path, cache, kind, tested):
    """As in STL-10: such images are trained on, and are in neither memory nor test."""
    labels = np.where(np.arange(60) % 3 == 0, -1, np.arange(60) % 3 + 4).astype(kind)
    images = np.arange(60, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    more = {"test_images": images[:6], "test_labels": labels[:6]} if tested else {}
    np.savez(tmp_path / "a.npz", images=images, labels=labels, **more)
    data = array(tmp_path / "a.npz", cache)
    assert data.classes == ("5", "6") and data.train.labels is None
    assert len(data.train) == (60 if tested else 52) and len(data.memory) == (40 if tested else 32)
    assert len(data.test) == (4 if tested else 8)
    for split in (data.memory, data.test):
        rows = split.pixels[:, 0, 0, 0].numpy()
        assert (split.labels.numpy() == rows % 3 - 1).all() and (rows % 3 > 0).all()
    assert {*data.train.pixels[:, 0, 0, 0].tolist()} >= {row for row in range(60) if row % 3 == 0}
    assert any("20 of 60 images have the label -1" in note for note in data.notes)
    assert any("leaves out 2 test images" in note for note in data.notes) == tested


@pytest.mark.parametrize(
    "shape", [(13, 32, 32), (13, 32, 24), (40, 32, 32), (2, 20, 28), (3, 8, 9), (1, 9, 8), (40, 20, 28), (9, 9, 9)]
)
def test_channels_first_are_refused(tmp_path, cache, shape):
    np.save(tmp_path / "a.npy", np.zeros((4, *shape), np.uint8))
    with pytest.raises(BadInput, match=r"looks like \[N, C, H, W\].*moveaxis"):
        array(tmp_path / "a.npy", cache)


@pytest.mark.parametrize("shape", [(32, 32, 13), (32, 24, 13), (32, 32, 40), (20, 28, 2), (8, 9, 3), (28, 28, 1)])
def test_channels_last_are_taken(tmp_path, cache, shape):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, (4, *shape), dtype=np.uint8))
    assert array(tmp_path / "a.npy", cache).channels == shape[-1]


def test_arrays_that_are_not_used_are_named_and_may_be_anything(tmp_path, cache):
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    names = np.array([f"{i}.png" for i in range(20)], dtype=object)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2, val_images=images, filenames=names)
    data = array(tmp_path / "a.npz", cache)
    assert "a.npz holds arrays that are not used: 'val_images', 'filenames'." in data.notes
    np.savez(tmp_path / "b.npz", images=images, labels=names)
    with pytest.raises(BadInput, match="Python objects"):
        array(tmp_path / "b.npz", cache)


def test_the_only_image_of_a_class_is_not_held_out(tmp_path, cache):
    labels = np.repeat(np.arange(28), [20] * 3 + [1] * 25)
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    data = array(tmp_path / "a.npz", cache)
    assert len(data.test) == 12 and len(data.train) == 73 and len(data.classes) == 28
    assert torch.bincount(data.train.labels, minlength=28).min() == 1
    assert any("25 classes have a single image, which stays" in note for note in data.notes)
    np.savez(tmp_path / "b.npz", images=images[:9], labels=np.arange(9))
    assert array(tmp_path / "b.npz", cache).test is None


def test_class_names_are_the_same_in_either_form_of_unicode(tmp_path, cache):
    pictures(tmp_path / "set" / "train", ["Gr\u00f6\u00dfe", "b"])
    pictures(tmp_path / "set" / "test", ["Gro\u0308\u00dfe", "b"])
    data = folder(tmp_path / "set", cache)
    assert data.classes == ("Gr\u00f6\u00dfe", "b") and data.test.labels.tolist() == [0] * 3 + [1] * 3


def test_what_to_do_about_classes_that_differ(tmp_path, cache):
    pictures(tmp_path / "set" / "train", ["Cat", "dog"])
    pictures(tmp_path / "set" / "test", ["cat", "dog"])
    with pytest.raises(
        BadInput, match=r"Cat\. Did you mean 'cat'\? Add pictures of them there, move their folders away"
    ):
        folder(tmp_path / "set", cache)


def warnings(data):
    return [note for note in data.notes if note.startswith("warning: ")]


def test_test_and_training_images_that_look_swapped_are_named(tmp_path, cache):
    root = tmp_path / "set"
    pictures(root / "train", ["cat", "dog"], count=2)
    pictures(root / "test", ["cat", "dog"], count=5)
    (warning,) = warnings(folder(root, cache))
    assert f"{root / 'test'} has 10 test pictures and {root / 'train'} 4 to train on (classes: cat, dog)" in warning
    assert f"train={root / 'test'} test={root / 'train'}" in warning
    mended = folder(root, cache, train=str(root / "test"), test=str(root / "train"))
    assert warnings(mended) == [] and (len(mended.train), len(mended.test)) == (10, 4)
    assert (
        warnings(folder(root, cache, train="test", test="train", train_images=2)) == []
    )  # of what there is, not of those used
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    parts = {"images": images[:12], "labels": labels[:12], "test_images": images[12:], "test_labels": labels[12:]}
    np.savez(tmp_path / "a.npz", **parts)
    (warning,) = warnings(array(tmp_path / "a.npz", cache))
    assert "48 test images and 12 to train on: are test_images of a.npz" in warning and "swapped?" in warning
    (tmp_path / "both").mkdir()
    np.savez(tmp_path / "both" / "train.npz", images=images[:12], labels=labels[:12])
    np.savez(tmp_path / "both" / "test.npz", images=images[12:], labels=labels[12:])
    assert len(warnings(array(tmp_path / "both", cache))) == 1


@pytest.mark.parametrize("parts", [("train", "test"), ("Training", "Testing")])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_root_that_is_too_high_is_said_with_the_right_one(tmp_path, cache, parts, level):
    home = tmp_path.joinpath(*("home", "x", "cifar")[: level + 1])
    for part in parts:
        pictures(home / part, ["cat", "dog"])
    root = tmp_path / "home"
    if level == 0 and parts[0] == "train":
        assert warnings(folder(root, cache)) == []
        return
    (warning,) = warnings(folder(root, cache))
    if level == 0:
        assert "Testing, Training of" in warning and "train=Training test=Testing" in warning
    else:
        assert f"{home} has the folders {', '.join(sorted(parts))}" in warning and f"root={home} " in warning
        assert warning.endswith("Folders taken as classes now: x.")


def test_several_data_sets_below_the_root_are_named(tmp_path, cache):
    for name in ("cifar", "digits"):
        for part in ("train", "test"):
            pictures(tmp_path / "home" / name / part, ["cat", "dog"])
    data = folder(tmp_path / "home", cache)
    (warning,) = warnings(data)
    assert data.classes == ("cifar", "digits") and "taken as classes now: cifar, digits." in warning
    assert "and so has digits" in warning


@pytest.mark.parametrize("root", ["train", "test", "train/cat", "train/cat/wild"])
def test_a_root_that_is_too_low_is_said_with_the_right_one(tmp_path, cache, root):
    home = tmp_path / "cifar"
    for part in ("train", "test"):
        pictures(home / part, ["cat/wild", "cat/tame", "dog"])
    found = warnings(folder(home / root, cache))
    if root == "train/cat/wild":  # three levels off
        assert found == []
        return
    (warning,) = found
    assert f"{home} has the folders test, train" in warning and f"root={home} " in warning
    classes = {"train": "cat, dog", "test": "cat, dog", "train/cat": "tame, wild"}[root]
    assert warning.endswith(f"Folders taken as classes now: {classes}.")


def test_a_class_of_the_name_of_a_part_is_not_taken_for_it_in_silence(tmp_path, cache):
    """The train that is a vehicle."""
    pictures(tmp_path / "vehicles", ["train", "bus", "car"])
    data = folder(tmp_path / "vehicles", cache)
    assert any(note.startswith(f"Not used of {tmp_path / 'vehicles'}: bus, car") for note in data.notes)
    assert folder(tmp_path / "vehicles", cache, train=".").classes == ("bus", "car", "train")
    pictures(tmp_path / "usual" / "train", ["a", "b"])
    pictures(tmp_path / "usual" / "test", ["a", "b"])
    assert not any("Not used" in note for note in folder(tmp_path / "usual", cache).notes)


def test_a_single_class_is_named_with_what_it_holds(tmp_path, cache):
    for part in ("train", "test"):
        pictures(tmp_path / "set" / part / "images" / "png", ["cat", "dog"])
    with pytest.raises(
        BadInput, match=r"it has one class folder, images, and .*test/images/png has the folders cat, dog"
    ):
        folder(tmp_path / "set", cache)
    paths = {part: f"{part}/images/png" for part in ("train", "test")}
    assert folder(tmp_path / "set", cache, **paths).classes == ("cat", "dog")
    data = folder(tmp_path / "set" / "train", cache)
    assert any("one class folder, images, and" in note and "unlabelled pictures" in note for note in data.notes)
    pictures(tmp_path / "alone", ["cat"])
    assert any(
        "alone has one class folder, cat: it counts as 3" in note for note in folder(tmp_path / "alone", cache).notes
    )
