"""The table of several runs: nothing dropped, nothing made up."""

import csv
import io
from pathlib import Path

from twoviews.console import Console
from twoviews.evaluation.comparison import Comparison, compare, differences, labels
from twoviews.evaluation.record import Evaluation
from twoviews.tables import as_csv, as_latex
from twoviews.tracking.client import open_experiment
from twoviews.tracking.uris import trust

RUNS = {
    "simclr": Evaluation(
        {"health/rankme": 60.0, "knn/top1": 80.25, "knn/top5": 99.0},
        {"knn/top1": (79.5, 81.0)},
        {"knn.k": 200, "knn.temperature": 0.1},
    ),
    "untrained|resnet18": Evaluation({"knn/top1": 34.0}, {}, {"knn.k": 200, "knn.temperature": 0.07}),
    "moco": Evaluation({"knn/top1": 82.5, "linear/top1": 88.0, "linear/weight_decay": 1e-4}, {}, {"knn.k": 200}),
    "unlabelled": Evaluation({"health/rankme": 12.0}, {}, {}),
}


def test_order_and_headline():
    comparison = Comparison(RUNS)
    assert comparison.headlines == ["knn/top1", "linear/top1"]
    assert comparison.order == ["moco", "simclr", "untrained|resnet18", "unlabelled"]
    assert Comparison({"a": Evaluation({"health/rankme": 3.0})}).headlines == ["health/rankme"]
    assert Comparison({}).headlines == [] and Comparison({}).table() == []
    same = {name: Evaluation({"knn/top1": 50.0}) for name in ("c", "a", "b")}
    assert Comparison({"nan": Evaluation({"knn/top1": float("nan")}), **same}).order == ["c", "a", "b", "nan"]


def test_other_images_are_said_and_have_no_baselines_in_common() -> None:
    def evaluated(data: str, digest: str) -> Evaluation:
        settings = {"data": data, "digest": digest}
        return Evaluation({"knn/top1": 50.0}, settings=settings, baselines={"baseline/pixels_knn_top1": 40.0})

    two = Comparison({"a": evaluated("digits", "1"), "b": evaluated("photos", "2")})
    assert two.warning == (
        "These runs were evaluated on different images (digits, photos): their values cannot be compared."
    )
    assert two.warning in two.page() and len(two.short_table()) == 2
    same = Comparison({"a": evaluated("digits", "1"), "b": evaluated("digits", "2")})  # as of other data.train_images
    assert not same.warning and len(same.short_table()) == 3


def test_csv_has_every_number_and_empty_cells_for_the_others():
    rows = list(csv.DictReader(io.StringIO(as_csv(Comparison(RUNS).table()))))
    assert [row["run"] for row in rows] == Comparison(RUNS).order
    expected = set()
    for row in rows:
        one = RUNS[row["run"]]
        bounds = {
            f"{name} {end}": both[n] for name, both in one.intervals.items() for n, end in enumerate(("low", "high"))
        }
        known = {**one.values, **bounds, **one.settings}
        expected |= known.keys()
        assert {name: float(cell) for name, cell in row.items() if cell and name != "run"} == known
    assert set(rows[0]) == expected | {"run"}


def test_markdown():
    lines = Comparison(RUNS).page().splitlines()
    assert lines[0] == "| run | kNN, % | linear, % | knn.k | knn.temperature |"
    assert lines[2:5] == [
        "| moco | 82.50 | 88.00 | 200 |  |",
        "| simclr | 80.25 [79.50, 81.00] |  | 200 | 0.1 |",
        "| untrained\\|resnet18 | 34.00 |  | 200 | 0.07 |",
    ]
    two = {name: RUNS[name] for name in ("simclr", "untrained|resnet18")}
    assert "The same for all: knn.k = 200." in Comparison(two).page().splitlines()
    assert "knn.k" not in Comparison(two).page().splitlines()[0]


def config(target: str = "moco.MoCo", seed: int = 0, lr: float = 0.1, blur: float = 0.0, **method: float) -> dict:
    return {
        "seed": seed,
        "epochs": 4,
        "method": {"_target_": f"twoviews.methods.{target}", **method},
        "optimizer": {"lr": lr},
        "augmentation": {"views": {"both": {"blur": blur}}},
        "schedule": {"epochs": 4},
        "protocol": {"knn": {"k": seed}},
        "tracking": {"uri": f"{seed}"},
    }


def test_runs_are_called_by_what_differs_in_them():
    two = {"a": config(seed=0, temperature=0.1), "b": config(seed=1, temperature=0.2)}
    titles = {"a": "a", "b": "b", "timm:x": "timm:x"}
    assert labels(differences(two)[0], titles) == {
        "a": "temperature=0.1, seed=0",
        "b": "temperature=0.2, seed=1",
        "timm:x": "timm:x",
    }
    # What a method brings along is no difference of its own; other keys of a class that both have are.
    methods = {
        "a": config(temperature=0.1),
        "b": config("simclr.SimCLR", blur=0.5),
        "c": config("simclr.SimCLR", seed=1, blur=0.5),
    }
    found, following = differences(methods)
    assert found == {
        "a": {"method": "MoCo", "seed": "0"},
        "b": {"method": "SimCLR", "seed": "0"},
        "c": {"method": "SimCLR", "seed": "1"},
    }
    assert following == ["augmentation.views.both.blur"]
    rates = {"a": config(lr=0.1), "b": config(lr=0.2), "c": {**config(lr=0.2), "epochs": 8, "schedule": {"epochs": 8}}}
    found, following = differences(rates)
    assert found["c"] == {"epochs": "8", "lr": "0.2"} and following == ["schedule.epochs"]
    same = {"a": config(), "b": config()}
    assert labels(differences(same)[0], {"a": "MoCo on digits", "b": "MoCo on digits"}) == {
        "a": "MoCo on digits (a)",
        "b": "MoCo on digits (b)",
    }


def test_the_table_of_a_paper_has_what_differs_and_baselines():
    baselines = (
        {"baseline/untrained_knn_top1": 41.94, "baseline/pixels_knn_top1": 60.28},
        {"baseline/untrained_knn_top1": 46.11},
    )
    runs = {
        name: Evaluation(
            {"knn/top1": 50.0 + number, "knn/f1": 3.0, "linear/top1": 60.0},
            {"knn/top1": (48.0, 53.0)},
            title="MoCo on digits, 4 epochs",
            config=config(seed=number),
            baselines=baselines[number],
        )
        for number, name in enumerate(("moco-digits-1a", "moco-digits-2b"))
    }
    comparison = Comparison(runs)
    rows = comparison.short_table()
    assert rows == [
        {"seed": "1", "kNN, %": "51.00 [48.00, 53.00]", "linear, %": "60.00"},
        {"seed": "0", "kNN, %": "50.00 [48.00, 53.00]", "linear, %": "60.00"},
        {"seed": "untrained encoder", "kNN, %": "41.94 to 46.11", "linear, %": ""},
        {"seed": "raw pixels", "kNN, %": "60.28", "linear, %": ""},
    ]
    latex = as_latex(rows, ["kNN, %"])
    assert "\\begin{tabular}{lrl}" in latex and "kNN, \\%" in latex and "\\toprule" in latex
    assert "- seed=1: `moco-digits-2b`" in comparison.page()
    assert [row["run.seed"] for row in comparison.table()] == ["1", "0"]
    assert comparison.table()[1]["baseline/pixels_knn_top1"] == 60.28


def test_a_comparison_is_one_run_of_mlflow_however_often_it_is_made(tmp_path: Path) -> None:
    trust(store := f"sqlite:///{tmp_path / 'mlflow.db'}")
    for value in (50.0, 60.0):
        both = {
            name: Evaluation({"knn/top1": value + add}, mlflow_target=(store, "here")) for add, name in enumerate("ab")
        }
        compare(both, tmp_path / "out", Console(quiet=True))
    client, experiment = open_experiment(store, "here")
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "comparison of 2 runs" and run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        f"comparison.{k}" for k in ("csv", "md", "tex", "png")
    }
    text = Path(client.download_artifacts(run.info.run_id, "comparison.csv", str(tmp_path))).read_text()
    assert "60.0" in text and "50.0" not in text
