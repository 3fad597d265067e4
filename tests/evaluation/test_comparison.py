"""The table of several runs: nothing dropped, nothing made up."""

import csv
import io
from pathlib import Path

from twoviews.console import Console
from twoviews.evaluation.comparison import Evaluation, as_csv, as_markdown, compare, headline, ordered, table
from twoviews.tracking.client import connect
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
    assert headline(RUNS) == "knn/top1"
    assert ordered(RUNS) == ["moco", "simclr", "untrained|resnet18", "unlabelled"]
    assert headline({"a": Evaluation({"health/rankme": 3.0})}) == "health/rankme"
    assert headline({}) is None and table({}) == []
    same = {name: Evaluation({"knn/top1": 50.0}) for name in ("c", "a", "b")}
    assert ordered({"nan": Evaluation({"knn/top1": float("nan")}), **same}) == ["c", "a", "b", "nan"]


def test_csv_has_every_number_and_empty_cells_for_the_others():
    rows = list(csv.DictReader(io.StringIO(as_csv(table(RUNS)))))
    assert [row["run"] for row in rows] == ordered(RUNS)
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
    lines = as_markdown(RUNS).splitlines()
    assert lines[0] == (
        "| run | health/rankme | knn/top1 | knn/top5 | linear/top1 | linear/weight_decay | knn.k | knn.temperature |"
    )
    assert lines[2] == "| moco |  | 82.50 |  | 88.00 | 0.0001 | 200 |  |"
    assert lines[3] == "| simclr | 60.00 | 80.25 [79.50, 81.00] | 99.00 |  |  | 200 | 0.1 |"
    assert lines[4].startswith("| untrained\\|resnet18 |  | 34.00 |")
    assert len(lines) == 6
    two = {name: RUNS[name] for name in ("simclr", "untrained|resnet18")}
    assert as_markdown(two).splitlines()[-1] == "The same for all: knn.k = 200."
    assert "knn.k" not in as_markdown(two).splitlines()[0]


def test_a_comparison_is_one_run_of_mlflow_however_often_it_is_made(tmp_path: Path) -> None:
    trust(store := f"sqlite:///{tmp_path / 'mlflow.db'}")
    for value in (50.0, 60.0):
        both = {name: Evaluation({"knn/top1": value + add}, mirror=(store, "here")) for add, name in enumerate("ab")}
        compare(both, tmp_path / "out", Console(quiet=True))
    client, experiment = connect(store, "here")
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "comparison of 2 runs" and run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        f"comparison.{k}" for k in ("csv", "md", "png")
    }
    text = Path(client.download_artifacts(run.info.run_id, "comparison.csv", str(tmp_path))).read_text()
    assert "60.0" in text and "50.0" not in text
