"""evaluate.py as a user meets it: any encoder, any protocol, what it leaves behind, several runs in one call."""

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT, SMALL_MOCO, refused, start
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits, load_sample_images
from test_configs import composed

from twoviews.checkpoints import load_checkpoint
from twoviews.encoders.opening import open_encoder
from twoviews.tracking.metrics import read


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        # In fp32, as evaluate.py measures: then the numbers of both are the same.
        options = [
            *SMALL_MOCO,
            "runtime.precision=fp32",
            f"seed={seed}",
            "epochs=1",
            f"hydra.run.dir={folder / str(seed)}",
        ]
        run = [str(ROOT / "train.py"), *options]
        assert start(run, folder / f"log{seed}").wait(300) == 0
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluation(run: Path, protocols: str) -> Path:
    """The folder of the only evaluation of a run by these protocols."""
    (found,) = (run / "evaluation").glob(f"{protocols}-????????")
    return found


def test_numbers_tables_and_pictures_beside_the_run(runs: Path, command) -> None:
    run = runs / "0"
    done = command("evaluate", f"run={run}", "protocol=[knn_small,linear,health]")
    assert done.code == 0, done.err
    found = json.loads((run / "evaluation.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert found["knn/top1"] == result["knn/top1"] and found["linear/top1"] == result["linear/top1"]
    low, high = found["intervals"]["knn/top1"]
    assert low < found["knn/top1"] < high
    assert found["protocol"]["health"]["flip"] == 0  # as the digits' views have it
    assert found["protocol"]["knn"]["k"] == 20 and found["data"]["test"] == 360
    folder = evaluation(run, "knn+linear+health")
    assert json.loads((folder / "evaluation.json").read_text()) == found
    files = {path.name for path in folder.iterdir()}
    for name in ("knn", "linear"):
        assert files >= {f"{name}_confusion.png", f"{name}_classes.png", f"{name}_classes.csv"}
    assert not (run / "evaluation" / "knn_curve.png").exists()  # measured once, after the only epoch
    assert "MoCo on digits, 1 epoch: kNN bank" in done.out
    assert (
        " dimensions" in done.out
        and "kNN of raw pixels" in done.out
        and done.out.count("of the features; train/spread is of the projections") == 1
    )
    rows = table(folder / "knn_classes.csv")
    hits = sum(int(row["images"]) * float(row["accuracy"]) for row in rows) / 360
    assert hits == pytest.approx(found["knn/top1"])
    measured = {name: value for line in read(run) for name, value in line.items() if name.startswith("evaluation/")}
    assert measured == {f"evaluation/{name}": value for name, value in found.items() if "/" in name}


def test_what_a_protocol_measured_outlasts_an_interruption_of_the_next_one(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "0", run, ignore=shutil.ignore_patterns("evaluation*"))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"evaluation/' not in line))  # of other tests
    slow = ("protocol=[knn_small,finetune]", "protocol.finetune.epochs=1000")
    evaluating = start([str(ROOT / "evaluate.py"), f"run={run}", *slow], tmp_path)
    try:
        deadline = time.monotonic() + 120
        while "knn/top1" not in (tmp_path / "stdout.txt").read_text():
            assert evaluating.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr.txt").read_text()
            time.sleep(0.1)
        found = json.loads((run / "evaluation.json").read_text())
        assert found["knn/top1"] > 10 and found["protocol"]["finetune"]["epochs"] == 1000
        assert list(read(run))[-1]["evaluation/knn/top1"] == found["knn/top1"]
        evaluating.send_signal(signal.SIGINT)
        assert evaluating.wait(60) == 128 + signal.SIGINT
    finally:
        evaluating.kill()  # a thousand epochs would go on for an hour
    assert "numbers of protocols that had finished are stored" in (tmp_path / "stderr.txt").read_text()
    out = (tmp_path / "stdout.txt").read_text()
    folder = evaluation(run, "knn+finetune").relative_to(tmp_path)  # the working directory
    assert f"written to {folder}: evaluation.json, knn_classes.csv, " in out and "tracking sync" in out


def test_several_runs_in_one_table(runs: Path, command) -> None:
    done = command("evaluate", f"run={runs}", "protocol=knn_small")
    assert done.code == 0, done.err
    (folder,) = Path("outputs").glob("comparison-????????")
    rows = table(folder / "comparison.csv")
    assert {row["run"] for row in rows} == {"0", "1"}
    for row in rows:
        found = json.loads((runs / row["run"] / "evaluation.json").read_text())
        assert float(row["knn/top1"]) == found["knn/top1"]
    assert [row["run.seed"] for row in rows] == [row["run"] for row in rows]
    page = (folder / "comparison.md").read_text()
    assert page.startswith("| seed | kNN, % |") and "| raw pixels | " in page and "- seed=1: `1`" in page
    assert "\\midrule" in (folder / "comparison.tex").read_text() and (folder / "comparison.png").exists()


def test_runs_that_cannot_be_evaluated_are_named_before_the_first_is(runs: Path, command) -> None:
    for split in ("train", "test"):
        for name in ("one", "two"):
            Path(f"photos/{split}/{name}").mkdir(parents=True)
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(f"photos/{split}/{name}/0.png")
    shutil.copytree(runs / "0", "bare")
    config = OmegaConf.load("bare/config.yaml")
    config.data = composed("data=folder", "data.root=photos/train", "data.channels=1", "data.cache=cache").data
    OmegaConf.save(config, "bare/config.yaml")
    data = json.loads(Path("bare/data.json").read_text())
    Path("bare/data.json").write_text(json.dumps({**data, "images": {"train": 2}}))
    both = f"run=[{runs / '0'},bare,no-such-run]"
    done = command("evaluate", both, "protocol=[map,knn_small]")
    first, second = (line for line in done.err.splitlines() if line.startswith("error: "))
    assert "bare: train has no labelled training and test images" in first and "no-such-run" in second
    assert done.code == 2 and not done.out
    open_encoder("bare").check_images(None, labelled=False)
    config.data.root = "photos"  # as if labelled images had come after the training
    OmegaConf.save(config, "bare/config.yaml")
    open_encoder("bare").check_images(None, labelled=True)
    config.data.root = "gone"
    OmegaConf.save(config, "bare/config.yaml")
    Path("bare/data.json").write_text(json.dumps(data))  # which had test images
    done = command("evaluate", f"run=[{runs / '0'},bare]", "protocol=knn_small")
    assert done.code == 2 and not done.out and "gone is no folder" in done.err


def test_the_split_that_is_recorded_is_the_one_that_was_taken(runs: Path, command) -> None:
    Path("photos").mkdir()
    for number, pixels in enumerate(load_digits().images[:8]):
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((40, 40)).save(f"photos/{number}.png")
    photos = ("data=folder", "data.root=photos", "data.channels=1", "data.cache=cache")
    done = command("evaluate", f"run={runs / '0'}", "protocol=map", *photos)
    assert done.code == 0 and "photos has no test images" in done.out and "map.split train" in done.out, done.err
    found = json.loads((evaluation(runs / "0", "map") / "evaluation.json").read_text())
    assert found["protocol"]["map"]["split"] == "train" and found["data"]["test"] == 0


def test_classes_of_own_pictures(runs: Path, command) -> None:
    Path("photos").mkdir()
    for number, pixels in enumerate(load_digits().images[:3]):
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((40, 40)).save(f"photos/{number}.png")
    Path("photos/broken.png").write_bytes(b"no picture")
    done = command("evaluate", f"run={runs / '0'}", "protocol=predict", "images=photos")
    assert done.code == 0, done.err
    rows = table(evaluation(runs / "0", "predict") / "predictions.csv")
    assert len(rows) == 4 and [bool(row["broken"]) for row in rows] == [False, False, False, True]
    assert all(row["class"] in "0123456789" for row in rows)
    assert {float(row["probability_percent"]) > 10 for row in rows[:3]} == {True}  # of ten classes the largest
    assert "4 images" in done.out and "1 image " in done.out  # 1 is broken
    refused(command("evaluate", f"run={runs / '0'}", "protocol=predict", "images=photo"), "photos")
    refused(command("evaluate", "run=no-such-run", "protocol=predict"), "images= names no pictures")


def test_a_fine_tuned_encoder_is_evaluated_predicts_and_is_exported(runs: Path, command) -> None:
    shutil.copytree(runs / "0", "run", ignore=shutil.ignore_patterns("evaluation*"))
    refused(command("evaluate", "run=run:finetune"), "python evaluate.py run=run protocol=finetune")
    few = ("protocol.finetune.epochs=1", "protocol.finetune.lr=[0.05,0.1]", "protocol.finetune.batch_size=128")
    done = command("evaluate", "run=run", "protocol=[linear,finetune]", *few)
    assert done.code == 0, done.err
    folder = evaluation(Path("run"), "linear+finetune")
    assert {"classifier.safetensors", "classifier.json", "linear_head.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["protocol"]["finetune"]["flip"] == 0  # as the digits' views have it
    Image.fromarray((load_digits().images[0] * 15).astype(np.uint8)).resize((40, 40)).save("photo.png")
    protocols = (
        "protocol=[knn_small,predict,export,duplicates]",
        "images=photo.png",
        "protocol.duplicates.threshold=0.99",
    )
    done = command("evaluate", "run=run:finetune", *protocols)
    assert done.code == 0, done.out + done.err
    (tuned,) = Path("outputs").glob("evaluation-*/evaluation/*")
    (row,) = table(tuned / "predictions.csv")
    assert (
        row["class"] in "0123456789"
        and json.loads((tuned / "predictions.json").read_text())["classifier"] == "fine-tuned"
    )
    assert (tuned / "export" / "classifier.safetensors").exists()
    rows = table(tuned / "duplicates.csv")
    assert rows and all(float(row["cosine"]) >= 0.99 for row in rows) and (tuned / "duplicates.png").exists()
    assert json.loads(Path("run/evaluation.json").read_text()) == measured  # the run's own numbers stay
    refused(command("evaluate", "run=run:finetune", "feature=projection"), "feature=projection")
    refused(command("evaluate", f"run={folder / 'linear_head.safetensors'}"), "name the run")


def test_names_that_are_no_utf8(runs: Path, command) -> None:
    pixels = load_digits()
    for part, first, count in ((b"train", 0, 12), (b"test", 100, 4)):
        for label, name in enumerate((b"a", b"M\xfcnze")):
            folder = os.fsdecode(b"ph\xf6tos/" + part + b"/" + name)
            os.makedirs(folder)  # noqa: PTH103
            for number in range(count):
                image = Image.fromarray((pixels.images[first + 20 * label + number] * 15).astype(np.uint8))
                image.resize((32, 32)).save(f"{folder}/{os.fsdecode(b'K' + bytes([0xE4]))}{number}.png")
    images = ("data=folder", "data.channels=1", "data.cache=c", "data.workers=0", os.fsdecode(b'data.root="ph\xf6tos"'))
    protocols = "protocol=[knn_small,linear,predict,embed,neighbours,map]"
    done = command("evaluate", f"run={runs / '1'}", *images, protocols, os.fsdecode(b'images="ph\xf6tos/test"'))
    assert done.code == 0, done.out + done.err
    folder = evaluation(runs / "1", "knn+linear+predict+embed+neighbours+map")
    written = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))["predictions"]
    assert len(written) == 8 and all(Path(one["image"]).is_file() for one in written)
    assert set(written[0]["probabilities"]) == {"a", "M\\udcfcnze"}
    assert {row["class"] for row in table(folder / "knn_classes.csv")} == {"a", "M\\udcfcnze"}
    spelt = {path.encode(errors="backslashreplace").decode() for path in np.load(folder / "embeddings.npz")["paths"]}
    assert len(spelt) == 8 and "ph\\udcf6tos" in min(spelt)
    assert {row["path"] for row in table(folder / "embeddings.csv")} == spelt
    assert {*pyarrow.parquet.read_table(folder / "embeddings.parquet")["path"].to_pylist()} == spelt
    for name in ("knn_confusion.png", "knn_classes.png", "neighbours.png", "map.png"):
        assert Image.open(folder / name).format == "PNG"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (float("nan"), "conv2.weight holds NaN or infinite numbers"),
        (float("inf"), "conv2.weight holds NaN or infinite numbers"),
        (3e38, "are not finite: use weights of before"),  # of the features
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_whatever_uses_them(
    runs: Path, command, value: float, sentence: str
) -> None:
    shutil.copytree(runs / "0", "broken", ignore=shutil.ignore_patterns("evaluation*", "*.pt"))
    weights = load_file("broken/encoder.safetensors")
    next(weight for name, weight in weights.items() if name.endswith("conv2.weight"))[:] = value
    save_file(weights, "broken/encoder.safetensors")
    image = runs / "0" / "views.png"
    for protocol in ("[knn_small,linear]", "health", "predict", "embed", "neighbours", "map"):
        more = [f"images={image}"] if protocol == "predict" else []
        refused(command("evaluate", "run=broken", f"protocol={protocol}", *more), sentence)
    refused(command("cluster", "run=broken", "clusters=[3]"), sentence)
    assert not list(Path("broken").rglob("embeddings.npz"))


def test_a_network_of_torchvision_on_images_of_the_command_line(command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # of the table of duplicates
    photos = [Image.fromarray(one) for one in load_sample_images().images]
    for split in ("train", "test"):
        for label, photo in enumerate(photos):
            folder = Path(f"images/{split}/{label}")
            folder.mkdir(parents=True)
            for number in range(12):
                left = 20 * number + (10 if split == "test" else 0)
                photo.crop((left, 50, left + 200, 250)).resize((64, 64)).save(folder / f"{number}.png")
    images = ("data=folder", "data.root=images", "data.cache=c", "data.workers=0", "data.size=64")
    protocols = ("protocol=[knn_small,duplicates]", "protocol.duplicates.threshold=0.5")
    done = command("evaluate", "run=torchvision:resnet18", *images, *protocols, "runtime.device=cpu")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())  # a title is as wide as its table
    assert re.search(r"duplicates, paths below .*/images \(the first 10 of [\d,]+; all are in duplicates\.csv\)", said)
    cells = [line for line in done.out.splitlines() if line.startswith("│ ") and ".png" in line]
    assert len(cells) == 10 and all(re.search(r"│ (train|test)/[01]/\d+\.png ", line) for line in cells)
    (pairs,) = Path("outputs").glob("evaluation-*/evaluation/*/duplicates.csv")
    assert all(Path(row["image"]).is_file() for row in table(pairs)) and len(table(pairs)) > 10
    found = json.loads(next(Path("outputs").glob("evaluation-*/evaluation.json")).read_text())
    assert found["data"]["test"] == 24 and found["knn/top1"] > 50
    assert "images are normalised with mean=[" in done.out and "those of images; mean= and std= set others" in done.out
    other = ("run=timm:vit_tiny_patch16_224", "mean=[0.5,0.5,0.5]", "std=[0.1,0.2,0.3]")
    small = ("data=folder", "data.root=images", "data.cache=c", "data.workers=0", "data.size=35")
    done = command("evaluate", *other, *small, "protocol=knn_small", "runtime.device=cpu")
    assert done.code == 0, done.err
    assert "mean=[0.5,0.5,0.5] and std=[0.1,0.2,0.3], of the command" in done.out
    assert "3 row(s) and 3 column(s) of pixels are not seen by vit_tiny_patch16_224" in done.out
    found = json.loads(next(Path("outputs").glob("evaluation-timm-*/evaluation.json")).read_text())
    assert (found["mean"], found["std"]) == ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    refused(command("evaluate", *other[:1], *small, "mean=[120,120,120]", "std=[0.1,0.2,0.3]"), "mean=", "at most 1")
    refused(command("evaluate", *other[:1], *small, "mean=[0.5,0.5,0.5]", "std=[0,1,1]"), "std=", "above 0")
    refused(command("evaluate", "run=torchvision:resnet18"), "data=")
    refused(command("evaluate", "run=torchvision:resnet81", *images), "resnet18")
    refused(command("evaluate", "run=x", "data=digits"), "recipe of train.py")


def test_the_projection_is_judged_beside_the_features(runs: Path, command) -> None:
    run = runs / "1"
    assert command("evaluate", f"run={run}", "protocol=[knn_small,embed,map]").code == 0
    before = (run / "evaluation.json").read_bytes()
    done = command("evaluate", f"run={run}", "protocol=[knn_small,embed,map]", "feature=projection")
    assert done.code == 0, done.err
    of_features = evaluation(run, "knn+embed+map")
    of_projection = run / "evaluation" / "projection" / of_features.name
    x, z = (np.load(folder / "embeddings.npz")["features"] for folder in (of_features, of_projection))
    layer = load_checkpoint(run / "last.pt")["method"]  # MoCo's projector is one linear layer
    weight, bias = (layer[f"projector.0.{name}"].numpy() for name in ("weight", "bias"))
    np.testing.assert_allclose(z, x @ weight.T + bias, rtol=1e-3, atol=1e-4)
    found = json.loads((of_projection / "evaluation.json").read_text())
    assert found["embed/features"] == 16 and 0 < found["knn/top1"] <= 100
    assert (run / "evaluation.json").read_bytes() == before
    measured = {name: value for line in read(run) for name, value in line.items()}
    assert measured["evaluation/projection/knn/top1"] == found["knn/top1"]
    for folder in (of_features, of_projection):
        assert Image.open(folder / "map.png").size[0] > 500


def test_an_evaluation_with_other_settings_leaves_the_earlier_one(runs: Path, command) -> None:
    run, found = runs / "0", {}
    for k in (1, 30, 1, 20_000):
        done = command("evaluate", f"run={run}", "protocol=knn", f"protocol.knn.k={k}")
        assert done.code == 0, done.err
        assert ("more than the 1,437 images of the bank" in done.out) == (k == 20_000)
        found[k] = json.loads((run / "evaluation.json").read_text())
    kept = [json.loads(path.read_text()) for path in (run / "evaluation").glob("knn-????????/evaluation.json")]
    by_k = {one["protocol"]["knn"]["k"]: one for one in kept}
    assert {k: by_k[k] for k in found} == found and len(by_k) == len(kept)
