"""The table at the end of a run: values of every protocol with their units, and advice that names what kNN does not beat."""

import re
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
from omegaconf import OmegaConf

from twoviews.assembly import Parts
from twoviews.console import Console
from twoviews.protocols.units import with_unit
from twoviews.run_summary import _length_lines, show_result

RESULT = {
    "state": "finished",
    "epoch": 1.0,
    "seconds": 5,
    "knn/top1": 50.0,
    "baseline/untrained_knn_top1": 40.0,
    "baseline/pixels_knn_top1": 60.0,
    "health/spread": 0.5,
    "health/rankme": 49.126,
    "few_labels/top1_1pct": 13.4444,
}


def shown(capfd: pytest.CaptureFixture, tmp_path: Path, **changed: float) -> str:
    show_result(tmp_path, {**RESULT, **changed}, ["knn", "health", "few_labels", "knn_grid"], Console())
    return capfd.readouterr().out


def test_every_protocol_has_rows(capfd, tmp_path: Path) -> None:
    out = shown(capfd, tmp_path, **{f"knn_grid/k{k}_t1_top1": 50.0 for k in range(20)})
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    assert rows["kNN"] == "50.00 %" and rows["linear"] == "-"
    assert (rows["health/spread"], rows["health/rankme"]) == ("0.5", "49.13 dimensions")
    assert rows["few_labels/top1_1pct"] == "13.44 %"
    assert rows["knn_grid"] == "20 values, in result.json"
    assert "finished after 1 epoch\n" in out


def test_without_accuracy_there_is_the_spread(capfd, tmp_path: Path) -> None:
    """Of images without labels, about whose lack one sentence is enough."""
    assert "│ spread " not in shown(capfd, tmp_path, **{"train/spread": 0.79678})
    show_result(tmp_path, {"state": "finished", "epoch": 1.0, "seconds": 5, "train/spread": 0.79678}, [], Console())
    assert re.search(r"│ spread +│ 0.7968 ", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("knn", "said"),
    [
        (50.0, "kNN (50.00 %) does not beat that of raw pixels (60.00 %);"),
        (30.0, "kNN (30.00 %) does not beat that of the untrained encoder (40.00 %) and raw pixels (60.00 %);"),
        (70.0, ""),
    ],
)
def test_advice_names_the_baselines_that_are_not_beaten(capfd, tmp_path: Path, knn: float, said: str) -> None:
    out = shown(capfd, tmp_path, **{"knn/top1": knn})
    assert said in out and ("advice: " in out) == bool(said)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("linear/top1", 88.0556, "88.06 %"),
        ("knn/ece", 3.0, "3.00 %"),
        ("tent/gain_low", -1.5, "-1.50 %"),
        ("few_labels/finetune_top1_10pct_std", 1.25, "1.25 %"),
        ("knn_grid/k5_t0.1_top5", 99.0, "99.00 %"),
        ("predict/images", 1.0, "1 image"),
        ("predict/temperature", 1.23456, "1.235"),
        ("duplicates/pairs", 1.0, "1 pair"),
        ("duplicates/train_test", 1200.0, "1,200 pairs"),
        ("duplicates/test_duplicated", 1.0, "1.00 % of the test images"),
        ("health/uniformity", -2.5, "-2.5 nats"),
        ("finetune/lr", 0.05, "0.05"),
        ("health/uniformity", float("nan"), "nan nats"),
    ],
)
def test_units(name: str, value: float, text: str) -> None:
    assert with_unit(name, value) == text


def test_intervals_follow_the_unit() -> None:
    assert with_unit("knn/top1", 50.0, (45.0, 55.125)) == "50.00 %  [45.00, 55.12]"


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "advice"),
    [
        (1437, 512, 1, ["use more epochs= (now 1) or a smaller batch_size= (now 512)."]),
        (60, 32, 1, ["use more epochs= (now 1)."]),  # 3 steps of 16
        (60, 8, 1, ["use more epochs= (now 1)."]),
        (1437, 64, 1, []),
    ],
)
def test_a_smaller_batch_is_advised_where_it_helps(images: int, batch: int, epochs: int, advice: list[str]) -> None:
    parts = Mock(spec=Parts, data=Mock(train=range(images)), optimizer=Mock(param_groups=[{"lr": 0.1}]))
    parts.loader = MagicMock(left_over=images % batch)
    parts.loader.__len__.return_value = images // batch
    cfg = OmegaConf.create({"batch_size": batch, "epochs": epochs, "optimizer": {"lr": 0.1, "lr_scaling": "none"}})
    assert [line.partition("hundred; ")[2] for line in [*_length_lines(cfg, parts)][2:]] == advice
