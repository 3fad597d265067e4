"""Configurations of many jobs, made quickly, are Hydra's to the last value."""

import os
import random
import time
from collections.abc import Callable

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from twoviews.config.checks import check
from twoviews.config.digest import digest
from twoviews.errors import BadInput
from twoviews.sweeps.composing import Composer, job_specs, stored_config

BASE = ["method=moco", "data=digits"]
JOBS = [
    ["seed=1", "method.temperature=0.1"],
    ["seed=2", "method.temperature=0.1"],
    ["seed=1", "method.temperature=0.2"],
    ["method.temperature=0.2", "seed=3"],
    ["epochs=7", "seed=0"],  # schedule.epochs follows it
    ["epochs=9", "seed=0", "schedule.epochs=5"],
    ["epochs=8", "seed=0", "schedule.epochs=${batch_size}"],
    ["epochs=8", "seed=0", "schedule.epochs=6"],
    ["epochs=8", "seed=0", "schedule.epochs=${epochs}"],
    ["method=simclr", "seed=1"],
    ["seed=1"],
    ["backbone=resnet18_cifar", "backbone.width=8"],
    ["backbone.width=8", "backbone=resnet18_cifar"],  # Hydra chooses files first
    ["backbone.depths=[1,1]", "seed=1"],
    ["backbone.depths=[1,1,1,1]", "seed=1"],
    ["backbone.depths=[2,1]"],
    ["++augmentation.views.both.blur=0.5", "seed=1"],
    ["augmentation.views.both.blur=0.25", "seed=1"],
    ["protocol.knn={k:5,every_epochs:2}", "protocol.knn.k=7"],
    ["protocol.knn.k=7", "protocol.knn={k:5,every_epochs:2}"],
    ["protocol=[knn]", "protocol.knn.k=9"],
    ["tracking.experiment='a name, with a comma'", "tracking.uri=null"],
    ["tracking.experiment='1e-4'"],
    ["runtime.checkpoint_minutes=1e-4", "sweep.name=x"],
    ["experiment=laptop", "method=byol"],
    ["optimizer=lars", "optimizer.lr=1"],
    ["optimizer=lars", "optimizer.lr=1.0"],
    ["~schedule.warmup_start", "seed=1"],
    ["++seed=4"],
    ["seed=4"],
    ["seed=4", "seed=5"],
    ["optimizer.lr=0.1", "++optimizer={lr:0.3}"],
    ["++optimizer={lr:0.3}", "optimizer.lr=0.1"],
    ["optimizer.lr=0.1", "++optimizer={lr:0.3,momentum:0.5}", "optimizer.momentum=0.8"],
    ["optimizer=lars", "++optimizer={lr:0.3}", "optimizer.lr=0.2", "optimizer=sgd"],
    ["seed=9007199254740993"],
    ["seed=9007199254740992"],
]


@pytest.fixture(scope="module")
def hydra_compose() -> Callable[[list[str]], DictConfig]:
    """Hydra's own way, each configuration made once."""
    known: dict[tuple[str, ...], DictConfig] = {}

    def call(overrides: list[str]) -> DictConfig:
        if tuple(overrides) not in known:
            with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
                known[tuple(overrides)] = compose("train", overrides)
        return known[tuple(overrides)]

    return call


def test_every_job_is_what_hydra_composes(hydra_compose) -> None:
    composer = Composer(hydra_compose)
    for number, job in enumerate([*JOBS, *reversed(JOBS)]):
        expected = hydra_compose([*BASE, *job])
        found = composer([*BASE, *job]).config
        assert found == OmegaConf.to_container(expected, resolve=True), (number, job)
        assert repr(found) == repr(OmegaConf.to_container(expected, resolve=True))  # 1 is not 1.0, nor true
        assert digest(found) == digest(expected)


PARTS = [
    *("seed=1", "seed=2", "++seed=3", "epochs=7", "batch_size=32", "schedule.epochs=${epochs}", "schedule.epochs=5"),
    *("optimizer.lr=0.1", "++optimizer.lr=0.2", "optimizer={lr:0.3}", "++optimizer={lr:0.4,momentum:0.5}"),
    *("optimizer.momentum=0.8", "optimizer=lars", "optimizer=sgd", "method=moco", "method.temperature=0.1"),
    *("++method={temperature:0.3}", "protocol=[knn]", "protocol.knn={k:5}", "protocol.knn.k=7", "++protocol.knn.k=9"),
    *(
        "++protocol={knn:{k:11}}",
        "backbone=tiny",
        "backbone.width=8",
        "backbone.depths=[1,1]",
        "~schedule.warmup_start",
    ),
    *(
        "runtime={precision:fp32}",
        "runtime.precision=bf16",
        "tracking=files",
        "tracking.uri=null",
        "data.train_images=64",
    ),
]


def test_random_command_lines_are_what_hydra_composes(hydra_compose) -> None:
    """One composer for all of them, as in a sweep. TWOVIEWS_LINES=400 compares more."""
    source, composer, refused_ = random.Random(0), Composer(hydra_compose), 0
    for _ in range(count := int(os.environ.get("TWOVIEWS_LINES", "40"))):
        line = [*BASE, *source.choices(PARTS, k=source.randint(1, 6))]
        try:
            expected = OmegaConf.to_container(hydra_compose(line), resolve=True)
        except HydraException:
            refused_ += 1
            with pytest.raises(HydraException):
                composer(line)
            continue
        assert repr(composer(line).config) == repr(expected), line
    assert refused_ < count / 2


def test_a_job_is_not_changed_by_the_next(hydra_compose) -> None:
    composer = Composer(hydra_compose)
    jobs = [composer([*BASE, *job]).config for job in JOBS]
    for job, found in zip(JOBS, jobs, strict=True):
        assert found == OmegaConf.to_container(hydra_compose([*BASE, *job]), resolve=True)


@pytest.mark.parametrize("wrong", ["method.temprature=0.1", "epoch=3", "+seed=3", "method.temperature.x=3"])
def test_what_hydra_refuses_is_refused_in_its_words(hydra_compose, wrong: str) -> None:
    composer = Composer(hydra_compose)
    composer([*BASE, "seed=1"])
    with pytest.raises(HydraException) as expected:
        hydra_compose([*BASE, "seed=1", wrong])
    with pytest.raises(HydraException) as found:
        composer([*BASE, "seed=1", wrong])
    assert str(found.value) == str(expected.value)
    assert composer([*BASE, "seed=2"]).config["seed"] == 2


def test_the_frozen_text_reads_back_as_the_configuration(hydra_compose) -> None:
    jobs = [[*BASE, *job] for job in JOBS if "~" not in job[0] and "{" not in str(job)]
    jobs = [job for job in jobs if "seed=5" not in job]
    for one in job_specs(Composer(hydra_compose), jobs, ["seed"]):
        expected = stored_config(OmegaConf.to_container(hydra_compose(list(one.overrides)), resolve=True))  # type: ignore[arg-type]
        assert repr(OmegaConf.to_container(OmegaConf.create(one.config_yaml))) == repr(expected)


def test_a_bad_value_names_its_job(hydra_compose) -> None:
    jobs = [[*BASE, "seed=0", f"method.temperature={t}"] for t in (0.1, 0)]
    with pytest.raises(BadInput, match=r"job method.temperature=0: method.temperature=0 is out of range"):
        job_specs(Composer(hydra_compose), jobs, ["method.temperature"])


def test_five_hundred_jobs_take_seconds(hydra_compose) -> None:
    jobs = [
        [*BASE, f"method.temperature={t / 1000}", f"optimizer.lr={lr / 100}", f"seed={seed}"]
        for t in range(1, 6)
        for lr in range(1, 11)
        for seed in range(10)
    ]
    hydra_compose(BASE)  # what is imported and read once
    start = time.process_time()
    hydra_compose([*jobs[0], "epochs=1"])
    one = time.process_time() - start
    start = time.process_time()
    new = job_specs(Composer(hydra_compose), jobs, ["method.temperature", "optimizer.lr", "seed"])
    spent = time.process_time() - start
    assert len(new) == len({job.digest for job in new}) == 500
    assert spent < 50 * one  # a tenth of what Hydra would take for them
    check("train", OmegaConf.to_container(OmegaConf.create(new[-1].config_yaml)))  # type: ignore[arg-type]
