"""Trainings on few images: batch and queue are reduced where the command does not set them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

SETTINGS = ["data=folder", "data.root=photos", "data.cache=cache", "data.workers=0", "epochs=1", "tracking=files"]
SETTINGS += ["backbone=tiny", "backbone.width=4", "backbone.depths=[1,1]"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """60 pictures of two classes to train on and 8 to test on, below the working directory."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 4)):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(noise.normal(size=(24, 24, 3)) * 30 + colour, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_batch_and_queue_are_reduced_and_said(command, photos: Path) -> None:
    done = command("train", *SETTINGS, "hydra.run.dir=run")
    assert done.code == 0, done.err
    said = "for 60 training images: batch_size=16 in place of 512 and method.queue_size=16 in place of 4096"
    assert said in done.out and "length    1 epoch of 3 steps of 16" in done.out
    few = "3 optimizer steps in all: an encoder learns next to nothing below some hundred; use more epochs= (now 1)."
    assert few in done.out, "a batch below 16 is no remedy"
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["batch_size"], config["method"]["queue_size"]) == (16, 16)
    assert config["reduced_from"] == {"batch_size": 512, "method.queue_size": 4096}
    assert "this run is finished" in command("train", *SETTINGS, "hydra.run.dir=run").out
    recorded = ["--config-path=" + str(Path("run").resolve()), "--config-name=config", "hydra.run.dir=run"]
    assert "this run is finished" in command("train", *recorded).out
    assert command("evaluate", "run=run", "protocol=knn", "feature=projection").code == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [("batch_size=512", "larger than the 60"), ("method.queue_size=512", "larger than the 60")],
)
def test_what_the_command_sets_is_refused(command, photos: Path, override: str, message: str) -> None:
    done = command("train", *SETTINGS, override)
    assert done.code == 2 and override in done.err and message in done.err
    assert f"{override.partition('=')[0]}=16 in place" not in done.out


@pytest.mark.parametrize(
    ("overrides", "batch", "queue"),
    [
        (["batch_size=32"], 32, 32),
        (["method.queue_size=40"], 16, 40),
        (["method.symmetric=true"], 16, 32),
        (["method.bn_splits=1"], 8, 24),
        (["runtime.accumulate=2"], 32, 32),
        (["method=pcl", "method.warmup_epochs=0"], 16, 16),
        (["method=simclr"], 8, None),
        (["experiment=laptop", "epochs=1"], 16, 16),
    ],
)
def test_values_fit_each_other(command, photos: Path, overrides: list[str], batch: int, queue: int | None) -> None:
    done = command("train", *SETTINGS, *overrides, "protocol=[]", "hydra.run.dir=run")
    assert done.code == 0, done.err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["batch_size"], config["method"].get("queue_size")) == (batch, queue)


def test_jobs_of_a_sweep_follow_the_command_that_launched_them(command, photos: Path) -> None:
    done = command("train", "-m", *SETTINGS, "protocol=[]", "batch_size=16,512", "sweep.name=small")
    assert done.code == 1
    jobs = {
        json.loads(path.read_text())["axes"]["batch_size"]: path.parent for path in Path("multirun").rglob("point.json")
    }
    assert yaml.safe_load((jobs[16] / "config.yaml").read_text())["method"]["queue_size"] == 16
    assert json.loads((jobs[16] / "result.json").read_text())["state"] == "finished"
    assert "batch_size=512 is larger than the 60 training images" in (jobs[512] / "log.txt").read_text()


def test_a_warning_about_the_folders_comes_before_an_error(command, photos: Path) -> None:
    photos.rename(photos.with_name("inner"))
    photos.mkdir()
    photos.with_name("inner").rename(photos / "inner")
    (photos / "other").mkdir()
    Image.new("RGB", (24, 24)).save(photos / "other" / "a.png")
    done = command("train", *SETTINGS, "batch_size=512")
    assert done.code == 2 and "batch_size=512" in done.err
    assert "looks as if it lay above a data set" in done.out
