"""The table of several runs: nothing dropped, nothing made up."""

import csv
import io

from twoviews.evaluation.comparison import Evaluation, as_csv, as_markdown, headline, ordered, table

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
