"""What differs between jobs is an axis, also when a sweep was launched twice on purpose with something else."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_report import figures as figures
from test_report import fill, page

from twoviews.sweep import main as sweep_command
from twoviews.sweeps import job as module
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobSpec, with_varying_parameters
from twoviews.sweeps.results import gather

MOCO = """seed: {seed}
epochs: {epochs}
method:
  _target_: twoviews.methods.moco.MoCo
  temperature: {temperature}
  queue_size: 128
schedule:
  epochs: {epochs}
tracking:
  uri: null
  experiment: sweeps
  mirror: {mirror}
"""
SIMCLR = MOCO.replace("moco.MoCo", "simclr.SimCLR").replace("  queue_size: 128\n", "")
BEFORE: dict[str, Any] = {"seed": 0, "epochs": 2, "temperature": 0.1, "mirror": "false"}


def launched(
    folder: Path, fixed: Mapping[str, Any], *swept: Mapping[str, Any], config: str = MOCO, **values: Any
) -> Sweep:
    """A sweep of `swept` with `fixed` before, whose jobs are all finished; `values` were not typed."""
    sweep = Sweep(folder)
    for one in swept:
        typed = {**fixed, **one}
        content = config.format(**{**BEFORE, **values, **{key.rpartition(".")[2]: each for key, each in typed.items()}})
        method = "moco" if config is MOCO else "simclr"
        more = {"choices": {"method": method, "tracking": "files"}, "code": "code"}
        overrides = [f"{key}={value}" for key, value in typed.items()]
        (job,) = sweep.add([JobSpec(f"{len(sweep.jobs):08x}", one, overrides, content, more)], command=str(fixed))
        fill(job, {"knn": 40.0 + len(sweep.jobs)})
    return sweep


SMALL_VIEWS = """small_views:
  share: {share}
  scale: 0.75
"""


def test_small_views_vary_where_they_are_used(tmp_path: Path) -> None:
    """Also beside jobs of an earlier version, which know nothing of them."""
    launched(tmp_path / "s", {}, {"seed": 0}, {"seed": 1})
    launched(tmp_path / "s", {}, {"seed": 2}, config=MOCO + SMALL_VIEWS.format(share=0))
    assert found(Sweep(tmp_path / "s")) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    launched(tmp_path / "s", {"small_views.share": 0.6}, {"seed": 0}, config=MOCO + SMALL_VIEWS.format(share=0.6))
    assert [job.get("small_views.share") for job in found(Sweep(tmp_path / "s"))] == [None, None, None, 0.6]


def found(sweep: Sweep) -> list[dict[str, Any]]:
    return [dict(job.parameters) for job in with_varying_parameters(sweep.jobs)]


def test_what_was_swept_once_and_fixed_once_varies_for_all(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    launched(tmp_path / "s", {"epochs": 2}, {"method.temperature": 0.1}, {"method.temperature": 0.2})
    sweep = launched(tmp_path / "s", {"epochs": 3}, {"seed": 0}, {"seed": 1})
    assert found(sweep) == [
        {"method.temperature": 0.1, "seed": 0, "epochs": 2},
        {"method.temperature": 0.2, "seed": 0, "epochs": 2},
        {"method.temperature": 0.1, "seed": 0, "epochs": 3},
        {"method.temperature": 0.1, "seed": 1, "epochs": 3},
    ]
    counts = sorted(len(config.jobs) for config in gather(sweep).configs)
    assert counts == [1, 1, 2], "runs of two and of three epochs have no common mean"
    text = page(sweep)
    assert "**temperature=0.1, epochs=3**: kNN **43.50 ± 6.35** over 2 seeds" in text and "null" not in text
    with (sweep.folder / "report.csv").open() as file:
        assert [row["epochs"] for row in csv.DictReader(file)] == ["2", "2", "3", "3"]
    assert sweep_command(["status", str(sweep.folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "FINISHED" in line and "│" in line]
    assert sorted(row[3:8:2] for row in rows) == [
        ["0.1", "0", "2"],
        ["0.1", "0", "3"],
        ["0.1", "1", "3"],
        ["0.2", "0", "2"],
    ]
    assert sweep_command(["logs", str(sweep.folder), "epochs=3", "seed=1"]) == 0, "jobs are named as status shows them"
    capsys.readouterr()
    assert sweep_command(["logs", str(sweep.folder), "seed=0"]) == 0
    assert capsys.readouterr().out.count("FINISHED") == 3, "what is named is shown, finished or not"
    assert sweep_command(["logs", str(sweep.folder), "temperature=0.2"]) == 0, "the columns of status have short names"
    assert capsys.readouterr().out.count("FINISHED") == 1


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "default"])
def test_another_method_varies_and_what_follows_from_it_does_not(tmp_path: Path, figures, typed: bool) -> None:
    launched(tmp_path / "s", {"method": "moco"} if typed else {}, {"seed": 0}, {"seed": 1})
    sweep = launched(tmp_path / "s", {"method": "simclr"}, {"seed": 0}, {"seed": 1}, config=SIMCLR)
    assert found(sweep) == [{"seed": seed, "method": method} for method in ("moco", "simclr") for seed in (0, 1)]
    page(sweep)
    assert "axis_method.png" in figures


def test_what_a_method_does_not_have_is_no_value_of_it(tmp_path: Path, figures) -> None:
    launched(tmp_path / "s", {}, *({"method.queue_size": size} for size in (128, 256)))
    sweep = launched(tmp_path / "s", {"method": "simclr"}, {"seed": 0}, config=SIMCLR)
    assert found(sweep)[2] == {"seed": 0, "method": "simclr"} and found(sweep)[0]["method.queue_size"] == 128
    text = page(sweep)
    assert "| - | simclr | 1 of 1 |" in text and "null" not in text
    assert [one.get_text() for one in figures["axis_queue_size.png"].axes[0].get_xticklabels()] == ["128", "256"]


def test_what_was_fixed_differently_varies_even_where_a_swept_value_would_do(tmp_path: Path) -> None:
    launched(tmp_path / "s", {"epochs": 2}, {"method.temperature": 0.1})
    sweep = launched(tmp_path / "s", {"epochs": 3}, {"method.temperature": 0.2})
    assert [one["epochs"] for one in found(sweep)] == [2, 3]


def test_a_seed_that_was_fixed_is_still_a_seed(tmp_path: Path) -> None:
    launched(tmp_path / "s", {"seed": 0}, {"method.temperature": 0.1}, {"method.temperature": 0.2})
    sweep = launched(tmp_path / "s", {"seed": 1}, {"method.temperature": 0.1}, {"method.temperature": 0.2})
    assert [list(config.values("knn/top1").index) for config in gather(sweep).configs] == [["0", "1"]] * 2


def test_a_changed_default_varies_though_nobody_typed_it(tmp_path: Path) -> None:
    launched(tmp_path / "s", {"runtime": "default"}, {"seed": 0}, {"seed": 1})
    sweep = launched(tmp_path / "s", {}, {"seed": 0}, {"seed": 1}, epochs=5)
    assert [one["epochs"] for one in found(sweep)] == [2, 2, 5, 5]
    assert all(one.keys() == {"seed", "epochs"} for one in found(sweep)), "schedule.epochs follows from it"


def test_where_results_are_sent_does_not_vary(tmp_path: Path) -> None:
    launched(tmp_path / "s", {"tracking": "files", "sweep.wait": True}, {"seed": 0})
    sweep = launched(tmp_path / "s", {}, {"seed": 1}, mirror="true")
    assert found(sweep) == [{"seed": 0}, {"seed": 1}]


def test_of_jobs_launched_alike_no_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = launched(tmp_path / "s", {"epochs": 2}, *({"seed": seed} for seed in range(5)))
    monkeypatch.setattr(module, "_values", lambda *_: 1 / 0)
    assert found(sweep) == [{"seed": seed} for seed in range(5)]
    launched(tmp_path / "s", {"epochs": 3}, {"seed": 0})
    with pytest.raises(ZeroDivisionError):
        found(sweep)


def test_jobs_from_before_choices_were_recorded_share_configs_with_the_new_ones(tmp_path: Path) -> None:
    sweep = launched(tmp_path / "s", {}, {"seed": 0}, {"seed": 1})
    for job in sweep.jobs:
        old = {key: value for key, value in job.description.items() if key != "choices"} | {"code": "old"}
        (job.folder / "point.json").write_text(json.dumps(old))
    sweep = launched(tmp_path / "s", {}, {"seed": 2}, {"seed": 3})
    assert [len(config.jobs) for config in gather(sweep).configs] == [4]


def test_a_number_is_the_same_however_it_was_written(tmp_path: Path) -> None:
    launched(tmp_path / "s", {}, {"method.temperature": 1}, {"method.temperature": 2})
    sweep = launched(tmp_path / "s", {"runtime": "default"}, {"seed": 3}, temperature=1.0)
    assert sorted(len(config.jobs) for config in gather(sweep).configs) == [1, 2]
