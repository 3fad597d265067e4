"""All results in one Markdown table and one picture: what is compared, the ratio, the target, reached or not.

    python benchmarks/table.py

Reads benchmarks/results/*.json, of which every benchmark writes its own, and writes benchmarks/results/speed.png, and the tables
into docs/speed.md, docs/results.md and benchmarks/speedrun.md, between the two comments that name this file there.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/table.py begins -->", "<!-- benchmarks/table.py ends -->"
HEAD = ("what", "against", "ratio", "target", "", "date", "`benchmarks/…`")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """One comparison.

    Args:
        what: is ours.
        against: what it is compared with.
        ratio: times as fast, or, where the target is `at_most`, times as long; or the value itself, with `unit`.
        target: what is asked for.
        at_most: whether less is better.
        unit: of a value that is compared with its target only.
        equal: whether the results are as good as they have to be.
    """

    what: str
    against: str
    ratio: float
    target: float
    at_most: bool = False
    unit: str = ""
    equal: bool = True

    @property
    def reached(self) -> bool:
        """Whether the target is."""
        return self.equal and (self.ratio <= self.target if self.at_most else self.ratio >= self.target)

    @property
    def words(self) -> tuple[str, str]:
        """Ratio and target for a person."""
        kind = f" {self.unit}" if self.unit else " times as long" if self.at_most else " times as fast"
        return f"{_short(self.ratio)}{kind}", f"at {'most' if self.at_most else 'least'} {_short(self.target)}"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 20 else f"{number:.1f}" if number >= 10 else f"{number:.3g}"


def views(rows: Rows, place: str = "") -> Iterator[Line]:
    """Two views of an image, on a CPU or of batches on a GPU; this and the next are named as their benchmarks are."""
    if place == "gpu":
        for row in rows:
            if row["pipeline"] == "twoviews, kernel":
                target = 10 if "224" in row["recipe"] else 0.35  # a twentieth of a step of MoCo there
                yield Line(f"two views, {row['recipe']}, on a GPU", "", row["milliseconds"], target, True, "ms")
        return
    targets = {
        ("moco, 32 px", "compiled"): 40,
        ("moco, 32 px", "tensors"): 8,
        ("moco_v2, 96 px", "compiled"): 3.8,
        ("moco_v2, 96 px", "tensors"): 2.1,
        ("moco_v2, 224 px", "compiled"): 6.9,
        ("moco_v2, 224 px", "tensors"): 3.7,
    }
    for (recipe, form), target in targets.items():
        blur = " with blur" if "v2" in recipe else ""
        where = f"two views of {recipe.rpartition(', ')[2]}{blur}, {form}"
        own = {row["pipeline"]: row for row in rows if row["recipe"] == recipe}
        if row := own.get(f"twoviews, {form}"):
            yield Line(where, "torchvision on PIL images", row["ratio"], target)
            if "kornia" in own:
                yield Line(where, "kornia, batched", row["ratio"] / own["kornia"]["ratio"], 1.7)


def loops(rows: Rows, _: str = "") -> Iterator[Line]:
    """Whole loops, a file for each backbone."""
    peers = {"moco": "lightly's MoCo example", "simsiam": "the SimSiam loop as copied"}
    for row in rows:
        precision = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}[row["precision"]]
        what = f"whole loop of {row['method']}, {row['backbone'] or 'small network'}, {precision}"
        yield Line(what, peers[row["method"]], row["ratio"], row["goal"])
        if not row["backbone"]:  # with more arithmetic the difference is lost in the noise
            yield Line(what, "the same steps on ready-made views", row["of_ready_made"], 0.95)


def step(rows: Rows) -> Iterator[Line]:
    """Training steps on a GPU."""
    for row in rows:
        what = f"step of {row['method']}, {row['backbone']}, {row['batch_size']} images, {row['images_per_s']:,.0f} images/s"
        yield Line(what, "", 100 * row["of_floor_sum"], 60, unit="% of the floor")


def knn(rows: Rows, place: str = "") -> Iterator[Line]:
    """The search of the monitor."""
    where = " on a GPU" if place else ""
    for row in rows:
        if row["what"] == "kNN, k=200":
            what = f"kNN in 50,000 images, {row['features']} features{where}"
            yield Line(what, "the bare matrix product", row["of_the_product"], 1.25, at_most=True)


def kmeans(rows: Rows, place: str = "") -> Iterator[Line]:
    """An E-step, on a CPU a file for each k."""
    if place == "gpu":
        ks = " + ".join(f"{k:,}" for k in sorted({row["k"] for row in rows}))
        slowest = max(
            sum(row["seconds"] for row in rows if row["epoch"] == epoch) for epoch in {r["epoch"] for r in rows}
        )
        yield Line(f"k-means of an E-step, k = {ks}, slowest epoch, on a GPU", "", 1e3 * slowest, 500, True, "ms")
        return
    targets = {"default": (4.5, 1.005), "iterations=5": (9, 1.011)}
    for setting, (target, inertia) in targets.items():
        own = [row for row in rows if row["setting"] == setting]
        epochs = [[row for row in own if row["epoch"] == epoch] for epoch in {row["epoch"] for row in own}]
        speed = min(statistics.median(row["speed"] for row in epoch) for epoch in epochs)
        worst = max(statistics.median(row["inertia"] for row in epoch) for epoch in epochs)
        held = f"{100 * (worst - 1):+.1f} % inertia at worst, {100 * (inertia - 1):.1f} % allowed"
        what = f"k-means of an E-step, k = {place}, {setting}, slowest of {len(epochs)} epochs ({held})"
        yield Line(what, "PCL's recipe, faiss", speed, target, equal=worst <= inertia)


def epoch(rows: Rows) -> Iterator[Line]:
    """The part of an epoch that clustering takes, and the part that the monitor takes."""
    names = {
        "e_step": ("E-step, of experiment=laptop method=pcl", "% of the epoch"),
        "monitor": ("kNN monitor every 10 epochs, features and search", "% of them"),
    }
    for row in rows:
        what, unit = names[row["what"]]
        yield Line(what, "", 100 * row["share"], 100 * row["goal"], True, unit)


def linear(rows: Rows) -> Iterator[Line]:
    """The whole linear probe."""
    ratio = statistics.median(row["ratio"] for row in rows)
    yield Line("linear probe of a run", "100 epochs with the frozen backbone, extrapolated", ratio, 50)


def probe(rows: Rows) -> Iterator[Line]:
    """Many learning rates at once."""
    for row in rows:
        what = f"SGD probe, nine learning rates, {row['features']} features"
        yield Line(what, "one learning rate", row["ratio"], row["goal"], at_most=True)


def startup(rows: Rows) -> Iterator[Line]:
    """From the command on, and a sweep's points."""
    for row in rows:
        if row["goal"] and "ratio" in row:
            yield Line(row["what"], "import torch", row["ratio"], row["goal"], at_most=True)
        elif row["goal"]:
            yield Line(f"{row['what']} and checked", "", row["cpu_seconds"], row["goal"], at_most=True, unit="s")


def stalls(rows: Rows) -> Iterator[Line]:
    """What keeps the training thread."""
    for row in rows:
        if row["what"] == "Metrics.log":
            yield Line("logging a step", "", 1e6 * row["cpu_seconds"], 1e6 * row["goal_seconds"], True, "µs")
        if row["what"] == "Training.save":
            yield Line(
                "stall by a checkpoint of 168 MB", "", 1e3 * row["wall_seconds"], 1e3 * row["goal_seconds"], True, "ms"
            )


def decoding(rows: Rows) -> Iterator[Line]:
    """Large data."""
    for row in rows:
        if row.get("target"):
            yield Line(row["what"], row["against"], row["ratio"], row["target"], row.get("at_most", False))


READERS: dict[str, Callable[..., Iterator[Line]]] = {
    one.__name__: one for one in (views, step, loops, knn, kmeans, epoch, linear, probe, startup, stalls, decoding)
}


def results() -> Iterator[tuple[dict[str, Any], Line]]:
    """Every line, with the facts of the file that it is from."""
    for name, reader in READERS.items():
        for path in sorted(RESULTS.glob(f"{name}*.json"), key=lambda path: (len(path.name), path.name)):
            if match := re.fullmatch(rf"{name}(?:_(\w+))?", path.stem):
                facts = json.loads(path.read_text())
                for line in reader(facts["rows"], *filter(None, match.groups())):
                    yield facts, line


def table(found: list[tuple[dict[str, Any], Line]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for facts, line in found:
        ratio, target = line.words
        command = facts["command"].rpartition("benchmarks/")[2]
        cells = (line.what, line.against, ratio, target, "reached" if line.reached else "**missed**", facts["date"])
        lines.append(f"| {' | '.join(cells)} | `{command}` |")
    machines = "; ".join(sorted({facts["machine"] for facts, _ in found}))
    seconds = "ratios of CPU seconds within rounds (on a GPU and of checkpoints of wall seconds), medians"
    return f"{machines}; {seconds}.\n\n" + "\n".join(lines) + "\n"


def recorded(name: str) -> dict[str, Any]:
    """What a benchmark has written; empty before it was run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def steps() -> str:
    """Markdown of benchmarks/step.py; empty before it was run."""
    if not (facts := recorded("step")):
        return ""
    lines = ["| method | ms a step | images/s | share of the floor |", "|---|---|---|---|"]
    for row in facts["rows"]:
        cells = (
            f"`{row['method']}`",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{round(row['images_per_s'], -2):,.0f}",
            f"{100 * row['of_floor_sum']:.0f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    size = facts["rows"][0]["batch_size"]
    how = f"{facts['date']}, torch {facts['torch']}, {facts['precision']}, `{facts['command'].rpartition('benchmarks/')[2]}`"
    what = f"Training steps of {size} images on one {facts['machine']}, views included ({how})"
    return f"\n{what}:\n\n" + "\n".join(lines) + "\n"


def accuracies() -> str:
    """Markdown of benchmarks/reference.py: kNN of ours and of an implementation made of lightly's parts."""
    head = ("method and network", "seeds", "features, ours", "reference", "difference")
    head = (*head, "projections, ours", "reference", "difference", "machine")
    lines, commands = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for path in sorted(RESULTS.glob("reference*.json")):
        facts = json.loads(path.read_text())
        network = next((word[9:] for word in facts["command"].split() if word.startswith("backbone=")), "")
        for method, summary in facts["summary"].items():
            cells = [f"`{method}`, `{network}`", str(summary["seeds"])]
            for kind in ("features", "projections"):
                one, half = summary[kind], summary[kind]["half_interval"] if summary["seeds"] > 2 else None
                shown = f"{one['difference']:+.2f}" + (f" ± {half:.2f}" if half else "")
                cells += [f"{one['ours']:.2f}", f"{one['reference']:.2f}", shown]
            processor = facts["processor"] if facts["machine"].startswith("x86") else facts["machine"]
            lines.append(f"| {' | '.join(cells)} | {processor}, {facts['precision']} |")
        commands.append(f"    {facts['command']}")
    return "\n".join(lines) + "\n\n" + "\n".join(commands) + "\n"


def growth() -> str:
    """Markdown of benchmarks/growth.py; empty before it was run."""
    if not (facts := recorded("growth")):
        return ""
    lines = ["| what grows | from - to | time grows as | memory grows as | because |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        times, memory = (f"{row[key][0]:.3g} - {row[key][-1]:.3g}" for key in ("cpu_seconds", "megabytes"))
        cells = (
            row["what"],
            f"{row['sizes'][0]:,} - {row['sizes'][-1]:,}",
            f"x^{row['time_slope']:.2f} ({times} s)",
            f"x^{row['memory_slope']:.2f} ({memory} MB)",
            row["reason"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    command = facts["command"].rpartition("benchmarks/")[2]
    return f"\nGrowth ({facts['date']}, `{command}`, three steps or one search):\n\n" + "\n".join(lines) + "\n"


def large_kmeans() -> str:
    """Markdown of benchmarks/large_kmeans.py; empty before it was run."""
    if not (facts := recorded("large_kmeans")):
        return ""
    lines = ["| clusters | a pass | recipe, 101 passes | ours, up to 11 | `iterations=5`, 6 |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        hours = [f"{row['hours'][name]:.2g} h" for name in ("recipe", "default", "iterations=5")]
        lines.append(f"| {row['k']:,} | {row['pass_seconds'] / 60:.1f} min | {' | '.join(hours)} |")
    command, whole = facts["command"].rpartition("benchmarks/")[2], facts["whole"]
    return (
        f"\nK-means of 1,281,167 x 128 embeddings (ImageNet), extrapolated ({facts['date']}, `{command}`; of {whole['points']:,}"
        f" points and {whole['k']:,} clusters the whole took {whole['of_the_passes']:.2f} times its passes alone):\n\n"
        + "\n".join(lines)
        + "\n"
    )


def ladder() -> str:
    """Markdown of benchmarks/speedrun.py: the rungs of benchmarks/speedrun.md, fastest first."""
    head = ("kNN at least", "seconds", "kNN of the three seeds", "hardware", "commit", "date", "command")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rung in (50, 80, 85, 90):
        files = [path for path in RESULTS.glob("speedrun_*.json") if path.stem.split("_")[1] == str(rung)]
        found = sorted((json.loads(path.read_text()) for path in files), key=lambda facts: facts["seconds_mean"])
        for facts in found:
            rows, shared = facts["rows"], ""
            share = sum(row["whole_command_cpu_s"] for row in rows) / sum(row["whole_command_s"] for row in rows)
            if share < 0.95 and ", 1 thread(s)" in facts["hardware"]:  # a core that other programs used as well
                shared = f", of which it got {100 * share:.0f} %"
            cells = (
                f"{rung} %" if facts["reached"] else f"{rung} %, **missed**",
                f"{facts['seconds_mean']:,.1f} ± {facts['seconds_deviation']:,.1f}",
                f"{facts['knn_mean']:.2f} ± {facts['knn_deviation']:.2f}: "
                + ", ".join(f"{row['knn_top1']:.2f}" for row in rows),
                facts["hardware"] + shared,
                facts["commit"][:7] + (" and changes" if facts["changed"] else ""),
                facts["date"],
                f"`{facts['command'].rpartition('benchmarks/')[2]}`",
            )
            lines.append(f"| {' | '.join(cells)} |")
        if not any(facts["reached"] for facts in found):
            lines.append(f"| {rung} % | open | | | | | `speedrun.py {rung}` |")
    return "\n".join(lines) + "\n"


def speed(found: list[tuple[dict[str, Any], Line]]) -> str:
    """Markdown of everything that was timed."""
    return table(found) + steps() + growth() + large_kmeans()


def between(text: str) -> str:
    """What stands between the two comments of a page."""
    return text.partition(f"{BEGIN}\n")[2].partition(END)[0]


def write_between(path: Path, text: str) -> None:
    """Put it between the two comments, if they are there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def draw(path: Path, found: list[Line]) -> None:
    """Bars of all ratios, a panel for each direction, the targets as black marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    faster = [line for line in found if not line.at_most and not line.unit]
    longer = [line for line in found if line.at_most and not line.unit]
    figure = Figure(figsize=(11, 1.6 + 0.34 * (len(faster) + len(longer))), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(len(faster) + 1, len(longer) + 1))
    _bars(upper, faster, "times as fast as …: more is better")
    upper.set_xscale("log")
    upper.set_xlim(
        min([1, *(0.9 * line.ratio for line in faster)]),
        1.5 * max([1, *(max(line.ratio, line.target) for line in faster)]),
    )
    upper.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    upper.minorticks_off()
    _bars(lower, longer, "times as long as …: less is better")
    figure.savefig(path)


def _bars(axis: "Axes", lines: list[Line], title: str) -> None:
    places = range(len(lines))
    colours = ["#3b78a8" if line.reached else "#c8553d" for line in lines]
    axis.barh(places, [line.ratio for line in lines], color=colours, height=0.62)
    for place, line in zip(places, lines, strict=True):
        axis.plot([line.target] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        axis.annotate(
            _short(line.ratio), (max(line.ratio, line.target), place), (5, 0), textcoords="offset points", va="center"
        )
    names = [f"{re.sub(r' [(].*[)]', '', line.what)} against {line.against}".replace("`", "") for line in lines]
    axis.set_yticks(places, names, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.02)
    axis.set_title(f"{title}   (black mark: target; red: missed)", fontsize=10, loc="right")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write them all."""
    found = list(results())
    draw(RESULTS / "speed.png", [line for _, line in found])
    for name, text in {"speed": speed(found), "results": accuracies()}.items():
        write_between(ROOT / "docs" / f"{name}.md", text)
    write_between(ROOT / "benchmarks" / "speedrun.md", ladder())
    missed = [line.what for _, line in found if not line.reached]
    print(f"{len(found)} comparisons, {len(missed)} targets missed{': ' if missed else ''}{'; '.join(missed)}")


if __name__ == "__main__":
    main()
