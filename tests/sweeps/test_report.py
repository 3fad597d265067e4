"""The report of a sweep says what its files say, at any time, and its pictures can be read."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from twoviews import figures as figure_files
from twoviews.errors import counted
from twoviews.sweep import exit_code
from twoviews.sweep import main as sweep_command
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobSpec, JobState, short_names, text
from twoviews.sweeps.report import report
from twoviews.sweeps.results import compare, estimate, gather

TYPED = "python train.py -m method.temperature=0.1,0.2 seed=0,1,2"


def sweep_of(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> Sweep:
    """Each job: its parameters; "knn" and "linear" in percent when it is finished; or "state" and "reason"."""
    sweep = Sweep(folder)
    for number, given in enumerate(jobs):
        parameters = {
            key: value for key, value in given.items() if key not in ("knn", "linear", "state", "reason", "epochs")
        }
        overrides = ["method=moco", *(f"{key}={value}" for key, value in parameters.items()), "sweep.wait=true"]
        digest = f"{number:08x}"
        jobs_made = sweep.add([JobSpec(digest, parameters, overrides, "seed: 0\n")], command=TYPED)
        fill(jobs_made[0], given)
    return sweep


def fill(job: Job, given: Mapping[str, Any]) -> None:
    epochs = given.get("epochs", 4 if "knn" in given else 0)
    lines = [
        {"step": 10 * epoch, "epoch": epoch, "time": 1000.0 + 30 * epoch}
        | {"knn/top1": given.get("knn", 30.0) * epoch / 4, "train/spread": 0.9, "baseline/pixels_knn_top1": 20.0}
        for epoch in range(1, epochs + 1)
    ]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if "knn" in given:
        (job.folder / "environment.json").write_text(
            json.dumps({"digest": "ab", "gpu": given.get("gpu"), "threads": 2, "processes": given.get("processes", 1)})
        )
        result = {"state": "finished", "knn/top1": given["knn"], "seconds": 180.0, "mlflow_run_id": None}
        if "linear" in given:
            result["linear/top1"] = given["linear"]
        (job.folder / "result.json").write_text(json.dumps(result))
    if "state" in given or "knn" in given:
        job.write(JobState(given.get("state", "FINISHED"), reason=given.get("reason", "")))


def page(sweep: Sweep) -> str:
    report(sweep)
    return (sweep.folder / "report.md").read_text()


GRID = [
    {"method.temperature": t, "seed": s, "knn": 40 + 50 * t + s, "linear": 60 - 50 * t + s * s}
    for t in (0.1, 0.2)
    for s in (0, 1, 2)
]


def test_interval_is_the_t_interval() -> None:
    one = estimate([1.0, 2.0, 3.0])
    assert one and (one.mean, one.count) == (2.0, 3)
    assert one.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2) from a table
    single = estimate([5.0])
    assert single and math.isnan(single.half_width) and str(single) == "5.00" and not estimate([]).count


def test_best_is_the_mean_over_seeds_with_the_command_to_run_it(tmp_path: Path) -> None:
    text_ = page(sweep_of(tmp_path / "s", GRID))
    assert "6 of 6 jobs finished." in text_ and "missing" not in text_ and "Failures" not in text_
    assert "**temperature=0.2**: kNN **51.00 ± 2.48**, linear **51.67 ± 5.17** over 3 seeds, by kNN accuracy" in text_
    again = "python train.py method=moco method.temperature=0.2 seed=0\n"
    assert f"To run it again with the first of its seeds (0, 1, 2):\n\n    {again}" in text_
    assert "By linear accuracy the highest is temperature=0.1: 56.67 ± 5.17." in text_
    assert f"    {TYPED}" in text_
    assert "| CPU | 6 finished | 0.6 | core-hours (threads x hours) |" in text_  # 6 x 180 s x 2 threads
    assert "| training per job |" in text_ and "Of training, without the starts of programs." in text_


def test_every_command_that_was_typed_is_on_the_page_once(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "s", GRID)
    for more in ("python train.py -m seed=3,4", TYPED):
        sweep.add([], command=more)
    assert f"\n\n    {TYPED}\n    python train.py -m seed=3,4\n\n" in page(sweep)


def test_every_process_of_a_job_costs(tmp_path: Path) -> None:
    several = [{"seed": s, "knn": 50.0, "gpu": "H100", "processes": 4} for s in (0, 1)]
    assert "| H100 | 2 finished | 0.4 | GPU-hours |" in page(sweep_of(tmp_path / "s", several))  # 2 x 180 s x 4


def test_paired_test_is_scipys_over_common_seeds(tmp_path: Path) -> None:
    first, second = [50.0, 52.0, 55.0, 51.0], [49.0, 50.0, 51.0]
    jobs = [{"a": 1, "seed": s, "knn": v} for s, v in enumerate(first)]
    jobs += [{"a": 2, "seed": s, "knn": v} for s, v in enumerate(second)]
    ranked = gather(sweep_of(tmp_path / "s", jobs)).ranked
    difference, p = compare(ranked[0], ranked[1], "knn/top1")
    assert ranked[0].parameters == {"a": 1} and difference.count == 3
    differences = [1.0, 2.0, 4.0]
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    assert p == pytest.approx(2 * stats.t.sf(t, 2)) and difference.mean == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ([(0, 50.0, 40.0)], "They differ by 10.00 on the one seed that both have; a paired test needs two"),
        ([(0, 50.0, None), (1, None, 40.0)], "no seed in common"),
        ([(0, 50.0, 40.0), (1, 51.0, 41.0)], "They differ by 10.00 on every common seed"),
        ([(0, 50.0, 40.0), (1, 52.0, 41.0)], "over 2 seeds: the first is ahead by 10.50 ± 6.35, p = 0.03. With fewer"),
    ],
)
def test_too_few_seeds_are_said(tmp_path: Path, seeds: list, sentence: str) -> None:
    jobs = [{"a": 1, "seed": s, "knn": one} for s, one, _ in seeds if one]
    jobs += [{"a": 2, "seed": s, "knn": other} for s, _, other in seeds if other]
    assert sentence in page(sweep_of(tmp_path / "s", jobs))


def test_a_lucky_seed_does_not_win(tmp_path: Path) -> None:
    lucky = {"method.temperature": 0.5, "seed": 0, "knn": 90.0}
    others = [{"method.temperature": 0.5, "seed": s, "state": "QUEUED"} for s in (1, 2)]
    text_ = page(sweep_of(tmp_path / "s", [lucky, *others, *GRID]))
    assert "**temperature=0.2**: kNN" in text_
    assert "temperature=0.5 is at 90.00 with 1 seed; it is ranked when it has as many." in text_
    assert "| 0.5 | 1 of 3 (seed 1, 2 missing) | 90.00 |" in text_


def test_jobs_that_run_wait_or_failed_are_counted_and_explained(tmp_path: Path) -> None:
    more = [
        {"method.temperature": 0.2, "seed": 3, "state": "RUNNING", "epochs": 2},
        {"method.temperature": 0.2, "seed": 4},
        {"method.temperature": 0.2, "seed": 5, "state": "FAILED", "reason": "loss is nan | lower\noptimizer.lr"},
        {"method.temperature": 0.2, "seed": 6, "state": "RUNNING"},
    ]
    sweep = sweep_of(tmp_path / "s", [*GRID, *more])
    lost = JobState("LOST", reason="its runner was killed")
    found = report(sweep, {sweep.jobs[9].digest: lost})
    text_ = (sweep.folder / "report.md").read_text()
    assert "6 of 10 jobs finished; 1 FAILED, 1 LOST, 1 QUEUED, 1 RUNNING. **4 missing**" in text_
    assert "| 00000008 | temperature=0.2, seed=5 | FAILED | 0 | loss is nan \\| lower optimizer.lr | " in text_
    assert "`python -m twoviews.sweep logs s 00000008`" in text_ and "its runner was killed" in text_
    assert [config.parameters["method.temperature"] for config in found.configs] == [0.2, 0.1]
    assert len(found.configs[0].values("knn/top1")) == 3  # the running one's last kNN is not final


def test_a_written_report_is_a_success_and_other_commands_say_why_they_are_none(tmp_path: Path, capsys) -> None:
    failed = {"method.temperature": 0.3, "seed": 0, "state": "FAILED", "reason": "loss is nan"}
    whole, partial = sweep_of(tmp_path / "whole", GRID), sweep_of(tmp_path / "partial", [*GRID, failed])
    for command in ("report", "status", "logs"):
        assert sweep_command([command, str(whole.folder)]) == 0
        assert not capsys.readouterr().err
    assert sweep_command(["report", str(partial.folder)]) == 0
    out = capsys.readouterr().out
    assert "1 of 7 jobs is not finished (1 FAILED); `python -m twoviews.sweep status partial` shows why." in out
    for command in ("status", "logs"):
        assert sweep_command([command, str(partial.folder)]) == 1
        assert capsys.readouterr().err == "exit code 1: 1 of 7 jobs is not finished (1 FAILED).\n"
    assert exit_code({"a": JobState("RUNNING"), "b": JobState("FAILED")}) == 3
    assert capsys.readouterr().err == "exit code 3: 2 of 2 jobs are not finished (1 FAILED, 1 RUNNING).\n"


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"]])
def test_help_says_which_sweep_is_meant_without_a_name(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        sweep_command(arguments)
    assert "changed last" in " ".join(capsys.readouterr().out.split())


def test_csv_has_a_row_for_each_job(tmp_path: Path) -> None:
    failed = {"method.temperature": 0.3, "seed": 0, "state": "FAILED", "reason": 'commas, and "quotes"'}
    sweep = sweep_of(tmp_path / "s", [*GRID, failed])
    report(sweep)
    with (sweep.folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and rows[6]["reason"] == failed["reason"] and rows[6]["knn/top1"] == ""
    assert [(row["method.temperature"], row["seed"]) for row in rows][:4] == [
        ("0.1", "0"),
        ("0.1", "1"),
        ("0.1", "2"),
        ("0.2", "0"),
    ]
    assert rows[0]["knn/top1"] == "45" and rows[0]["linear/top1"] == "55" and rows[0]["seconds"] == "180.0"


@pytest.mark.parametrize("jobs", [[], [{"seed": 0}], [{"seed": 0, "state": "RUNNING", "epochs": 1}]])
def test_a_sweep_that_has_not_found_anything_has_a_report(tmp_path: Path, jobs: list) -> None:
    text_ = page(sweep_of(tmp_path / "s", jobs))
    assert f"0 of {counted(len(jobs), 'job')} finished" in text_ and "No accuracy of a finished job" in text_


def test_making_it_again_changes_nothing(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "s", GRID)
    first = page(sweep)
    assert page(sweep) == first and not list(sweep.folder.glob("*.new"))


def test_every_picture_is_on_the_page_and_the_seed_has_none(tmp_path: Path) -> None:
    grid = [{**job, "backbone": b, "knn": job["knn"] + i} for i, b in enumerate(("tiny", "wide")) for job in GRID]
    sweep = sweep_of(tmp_path / "s", grid)
    text_ = page(sweep)
    made = sorted(path.name for path in sweep.folder.glob("*.png"))
    assert made == ["axis_backbone.png", "axis_temperature.png", "learning.png", "map_temperature_backbone.png"]
    for name in made:
        assert f"]({name})" in text_
        with Image.open(sweep.folder / name) as picture:
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


# --------------------------------------------------------------------------------------------- what is on the pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by file name."""
    kept: dict[str, Figure] = {}
    save = figure_files.save_figure

    def keep(figure: Figure, path: Path) -> None:
        kept[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(figure_files, "save_figure", keep)
    return kept


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Texts of a figure that cover each other, or that the edge cuts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [] if figure._suptitle is None else [figure._suptitle]  # type: ignore[attr-defined]
    for axis in figure.axes:
        texts += [axis.xaxis.label, axis.yaxis.label, axis.title]
        for one in (axis.xaxis, axis.yaxis):
            low, high = sorted(one.get_view_interval())
            texts += [tick.label1 for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label2 for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [one for legend in figure.legends for one in legend.get_texts()]
    boxes = [(one.get_text(), one.get_window_extent(renderer)) for one in texts if one.get_text() and one.get_visible()]
    found = [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1 :] if one.overlaps(other)]
    width, height = canvas.get_width_height()
    return found + [(a, "edge") for a, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


LONG = [f"a_choice_with_a_very_long_name_that_somebody_made_up_{n}_for_some_reason_or_other" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.05, 0.1, 0.2], [128, 256]),
        ([0.001, 0.0011, 0.1], LONG),
        (LONG, [128, 256]),
        (LONG, LONG),
        ([True, False, None], [[1, 1], [2, 2]]),
        ([0.05, 0.1, 0.2], [None]),
    ],
    ids=["numbers", "near", "long", "both long", "words", "one"],
)
def test_names_do_not_overlap(tmp_path: Path, figures: dict[str, Figure], first: list, second: list) -> None:
    jobs = [
        {
            "method.some_long_parameter_of_it": a,
            "optimizer.lr": b,
            "seed": s,
            "knn": 30.0 + 5 * i + 3 * j + s,
            "linear": 50.0,
        }
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        for s in (0, 1)
    ]
    report(sweep_of(tmp_path / ("s" * 60), jobs))
    assert {name: overlaps(figure) for name, figure in figures.items() if overlaps(figure)} == {}


def test_few_values_stand_at_equal_distances_and_many_over_decades_are_logarithmic(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    jobs = [{"lr": lr, "seed": s, "knn": 50.0 + s} for lr in (0.1, 0.001, 0.0011) for s in (0, 1)]
    report(sweep_of(tmp_path / "few", jobs))
    axis = figures["axis_lr.png"].axes[0]
    assert [one.get_text() for one in axis.get_xticklabels()] == ["0.001", "0.0011", "0.1"]
    assert axis.get_xticks().tolist() == [0, 1, 2]
    report(sweep_of(tmp_path / "many", [{"lr": 0.001 * 1.5**i, "seed": 0, "knn": 50.0} for i in range(20)]))
    assert figures["axis_lr.png"].axes[0].get_xscale() == "log"


def marks(axis: Any, marker: str) -> list[tuple[float, float]]:
    """The points of a panel with a marker."""
    return [tuple(point) for line in axis.lines if line.get_marker() == marker for point in line.get_xydata()]


def whiskers(axis: Any) -> list[list[float]]:
    return [line.get_ydata().tolist() for line in axis.lines if line.get_linestyle() == "-"]


def test_seeds_are_dots_around_their_mean_with_its_interval(tmp_path: Path, figures: dict[str, Figure]) -> None:
    jobs = [{"t": t, "seed": s, "knn": 50.0 + 10 * t + s} for t in (1, 2, 3, 4) for s in (0, 1, 2) if t < 4 or not s]
    report(sweep_of(tmp_path / "s", jobs))
    axis = figures["axis_t.png"].axes[0]
    assert sorted(y for _, y in marks(axis, "o")) == [60, 61, 62, 70, 71, 72, 80, 81, 82, 90], "one of a single seed"
    half = 4.302652729911275 / math.sqrt(3)
    assert sorted(whiskers(axis)) == [pytest.approx([mean - half, mean + half]) for mean in (61, 71, 81)]
    assert not marks(axis, "v") and not marks(axis, "^")


def test_the_interval_of_two_seeds_does_not_set_the_limits_and_arrows_mark_where_it_leaves(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    jobs = [{"t": t, "seed": s, "knn": 50.0 + 2 * t + s} for t in (1, 2) for s in (0, 1)]
    report(sweep_of(tmp_path / "s", jobs))
    axis = figures["axis_t.png"].axes[0]
    low, high = axis.get_ylim()
    assert (low, high) == pytest.approx((50.5, 56.5)), "seeds from 52 to 55, and half of that on either side"
    assert whiskers(axis) == [pytest.approx([low, high])] * 2, "± 6.35 is cut"
    assert [y for _, y in marks(axis, "v")] == pytest.approx([low] * 2)
    assert [y for _, y in marks(axis, "^")] == pytest.approx([high] * 2)
    assert "raw pixels: 20.0 (lower)" in [one.get_text() for one in figures["axis_t.png"].legends[0].get_texts()]


def test_what_was_measured_once_is_no_curve(tmp_path: Path, figures: dict[str, Figure]) -> None:
    sweep = sweep_of(tmp_path / "s", [{"seed": s, "knn": 50.0 + s} for s in (0, 1)])
    for job in sweep.jobs:
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines[:-1]:
            del line["knn/top1"]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text_ = page(sweep)
    (spread,) = figures["learning.png"].axes
    assert spread.get_xlim() == pytest.approx((0, 4), abs=0.2) and "projections" in spread.get_ylabel()
    assert spread.get_ylim() == pytest.approx((0, 1), abs=0.05) and spread.get_ylim()[1] >= 1
    assert "knn/top1: measured at one epoch, so not among the learning curves" in text_
    for job in sweep.jobs:
        last = (job.folder / "metrics.jsonl").read_text().splitlines()[-1]
        (job.folder / "metrics.jsonl").write_text(last + "\n")
    figures.clear()
    assert "knn/top1 and train/spread: measured at one epoch" in page(sweep) and "learning.png" not in figures


@pytest.mark.parametrize(
    ("knn", "heading"),
    [
        ({1: (15.0, 16.0), 2: (18.0, 19.5)}, "No config beats the baselines"),  # raw pixels: 20
        ({1: (15.0, 16.0)}, "The baselines are not beaten"),
        ({1: (50.0, 51.0)}, "Result"),
        ({1: (50.0, 51.0), 2: (50.0, 51.0)}, "A tie"),
        ({1: (50.0,), 2: (55.0,)}, "Highest, by one seed each"),
        ({1: (50.0, 55.0, 51.0), 2: (53.0, 52.0, 54.0)}, "No clear best"),
        ({1: (50.0, 51.0, 52.0), 2: (60.0, 61.0, 62.5)}, "Best"),
    ],
)
def test_the_heading_says_what_the_ranking_is_worth(tmp_path: Path, knn: dict, heading: str) -> None:
    jobs = [{"a": a, "seed": s, "knn": value} for a, values in knn.items() for s, value in enumerate(values)]
    said: list[str] = []
    report(sweep_of(tmp_path / "s", jobs), say=said.append)
    text_ = (tmp_path / "s" / "report.md").read_text()
    assert said[0].startswith(f"{heading}: {'the highest mean has a=' if len(knn) > 1 else 'kNN '}")
    assert f"\n## {heading}\n" in text_ and "Baselines, kNN: raw pixels 20.00." in text_
    assert ("To run it again:\n" in text_) == (heading == "Highest, by one seed each")


def test_equal_seeds_have_no_interval_of_no_width(tmp_path: Path) -> None:
    same = [{"a": 1, "seed": s, "knn": 50.0 + s, "linear": 43.33} for s in (0, 1)]
    text_ = page(sweep_of(tmp_path / "s", same))
    assert "linear **43.33 (2 equal seeds)**" in text_ and "± 0.00" not in text_


def test_tables_and_plots_for_a_paper(tmp_path: Path, capsys) -> None:
    sweep = sweep_of(
        tmp_path / "s", [{**job, "a_b": "50 %"} for job in GRID[:1]] + [{**job, "a_b": "x"} for job in GRID[1:]]
    )
    assert sweep_command(["report", str(sweep.folder), "--format", "pdf"]) == 0
    figure_files.set_formats("png")
    latex = (sweep.folder / "report.tex").read_text()
    assert "\\toprule" in latex and "50 \\%" in latex and "a\\_b" in latex and "51.00 $\\pm$ 2.48" in latex
    made = {path.name for path in sweep.folder.iterdir() if path.suffix in (".png", ".pdf")}
    assert "learning.pdf" in made and not [name for name in made if name.endswith("png")]
    assert "[Learning curves](learning.pdf)" in (sweep.folder / "report.md").read_text()


def test_random_search_is_drawn_as_jobs(tmp_path: Path, figures: dict[str, Figure]) -> None:
    jobs = [{"lr": 0.01 * 1.7**i, "t": 0.05 + 0.013 * ((7 * i) % 20), "seed": 0, "knn": 40.0 + i} for i in range(20)]
    sweep = sweep_of(tmp_path / "s", jobs)
    report(sweep)
    assert sorted(figures) == ["axis_lr.png", "axis_t.png", "learning.png"]  # a map would be nearly empty
    assert not [line for line in figures["axis_lr.png"].axes[0].lines if line.get_linestyle() == "-"]


def test_one_of_something_is_no_plural() -> None:
    assert [counted(number, "job") for number in (0, 1, 2, 2000)] == [
        "0 jobs",
        "1 job",
        "2 jobs",
        "2,000 jobs",
    ]
    assert counted(1, "class") == "1 class" and counted(2, "class") == "2 classes"
    assert counted(1.0, "epoch", ".4g") == "1 epoch" and counted(1.5, "epoch", ".4g") == "1.5 epochs"


def test_names_are_the_shortest_that_differ() -> None:
    assert short_names(["method.lr", "seed", "optimizer.lr"]) == {
        "method.lr": "method.lr",
        "seed": "seed",
        "optimizer.lr": "optimizer.lr",
    }
    assert [text(one) for one in (0.1, 1e-4, 3, True, None, [1, 2], "a", 0.123456789)] == [
        "0.1",
        "0.0001",
        "3",
        "true",
        "null",
        "[1,2]",
        "a",
        "0.123456789",
    ]


def test_the_last_loss_of_a_training_that_diverged_is_no_earlier_one(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [{"seed": 0, "state": "FAILED"}])
    lines = [
        {"step": 1, "epoch": 1, "time": 0.0, "train/loss": 1.5},
        {"step": 2, "epoch": 2, "time": 1.0, "train/loss": math.nan},
    ]
    (sweep.jobs[0].folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert math.isnan(gather(sweep).jobs["train/loss"].iloc[0])
