"""What benchmarks/speedrun.py reads from run folders: the clock, the judge, and the rules that it can check."""

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import speedrun  # noqa: E402
import table  # noqa: E402

LINES = [
    {"step": 0, "epoch": 0, "time": 100.0, "baseline/untrained_knn_top1": 33.0, "baseline/pixels_knn_top1": 40.0},
    {"step": 10, "epoch": 0.5, "time": 130.0, "train/loss": 5.0},
    {"step": 10, "epoch": 0.5, "time": 140.0, "knn/top1": 99.0},
    {"step": 20, "epoch": 1, "time": 160.5, "train/loss": 4.0},
    {"step": 20, "epoch": 1, "time": 190.0, "knn/top1": 51.0},
]
CONFIG = """
backbone: {}
data: {}
tracking: {uri: null, experiment: speedrun, mirror: false}
method: {_target_: twoviews.methods.moco.MoCo}
protocol: {knn: {k: 200, temperature: 0.1}}
"""


DATA = {"name": "cifar10", "digest": ""}


def run(
    folder: Path, config: str = CONFIG, state: str = "finished", train: int = 50_000, classes: int = 10
) -> speedrun.Run:
    one = speedrun.Run(folder)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    one.write("result.json", {"state": state})
    one.write(
        "data.json", {**DATA, "images": {"train": train, "memory": 50_000, "test": 10_000}, "classes": [""] * classes}
    )
    return one


def test_clock_and_judgement(tmp_path: Path) -> None:
    run(tmp_path)
    assert speedrun.result(tmp_path) == {"knn_top1": 51.0, "seconds": 60.5, "steps": 20, "epochs": 1}


def test_rules(tmp_path: Path) -> None:
    assert speedrun.broken_rules(run(tmp_path / "fair")) == []
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"train": 60_000}, "the images are"),
        ({"classes": 100}, "of 100 classes"),
        ({"state": "interrupted"}, "has not finished"),
        ({"config": CONFIG.replace("moco.MoCo", "supervised.Supervised")}, "learns from labels"),
        ({"config": CONFIG.replace("200", "20")}, "kNN is measured with"),
    ]
    for number, (given, part) in enumerate(wrong):
        (broken,) = speedrun.broken_rules(run(tmp_path / str(number), **given))
        assert part in broken


@pytest.mark.parametrize(
    ("accuracies", "reached"),
    [((49.0, 50.0, 51.0), False), ((50.1, 50.2, 50.3), True), ((50.0, 51.0, 52.0), False), ((49.7, 49.8, 49.9), False)],
)
def test_a_test_over_seeds_decides(accuracies: tuple[float, ...], reached: bool) -> None:
    found = speedrun.summary(50, [{"knn_top1": one, "seconds": 60.0 + one} for one in accuracies])
    assert found["reached"] is reached
    t = (statistics.mean(accuracies) - 50) / (statistics.stdev(accuracies) / 3**0.5)
    # Of Student's t with two degrees of freedom.
    assert found["p_value"] == pytest.approx((1 - t / (2 + t * t) ** 0.5) / 2)
    assert found["knn_mean"] == pytest.approx(sum(accuracies) / 3)
    assert found["seconds_deviation"] == pytest.approx(found["knn_deviation"])


def test_the_ladder_names_every_rung_and_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert [line.split("|")[2].strip() for line in table.ladder().splitlines()[2:]] == ["open"] * 4
    rows = [
        {"seed": seed, "knn_top1": 82.0 + seed, "seconds": 99.0, "whole_command_s": 1, "whole_command_cpu_s": 0.5}
        for seed in speedrun.SEEDS
    ]
    facts = {"rows": rows, **speedrun.summary(80, rows), "hardware": "a core, 1 thread(s)", "commit": "0123456789"}
    about = {"changed": False, "date": "2026-01-02", "command": "python benchmarks/speedrun.py 80"}
    (tmp_path / "speedrun_80.json").write_text(json.dumps({**facts, **about}))
    (line,) = [line for line in table.ladder().splitlines() if line.startswith("| 80 %")]
    for part in ("99.0 ± 0.0", "83.00 ± 1.00: 82.00, 83.00, 84.00", "got 50 %", "0123456", "`speedrun.py 80`"):
        assert part in line
    assert table.ladder().count("open") == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_uses_what_is_there(name):
    importlib.import_module(name)
