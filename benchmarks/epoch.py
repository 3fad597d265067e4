"""What an epoch of PCL spends beside its steps: on the E-step, and on the kNN monitor at its default interval.

    OMP_NUM_THREADS=1 python benchmarks/epoch.py data.root=<cifar10> --json benchmarks/results/epoch.json

Of experiment=laptop method=pcl, from its beginning. A round is the E-step (embedding all images, every k-means, the
concentrations), warm from the one before, `--steps` steps, from which the seconds of all steps of an epoch follow, and in
every third round the monitor: features of the 60,000 images of bank and test set, and the search. The monitor's share is of
the steps alone of as many epochs as lie between two measurements, which is what it costs MoCo. CPU seconds.
"""

import statistics
import tempfile
from pathlib import Path

import hydra
from loops import ours
from recording import arguments, record, run, seconds

from twoviews.assembly import load_data, make_parts, make_views
from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.config.groups import CONF

GOALS = {"e_step": 0.15, "monitor": 0.05}


def main() -> None:
    """Command line."""
    options = arguments(__doc__, rounds=9, steps=40)
    shared = ["experiment=laptop", "method=pcl", "data=folder", "tracking=files"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [*shared, *options.overrides])
    check("train", cfg)
    data, runtime = load_data(cfg), build(cfg.runtime)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, runtime.torch_device())
    knn, epoch = parts.protocols["knn"], cfg.method.warmup_epochs
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in GOALS}
    with tempfile.TemporaryDirectory() as folder:
        steps = ours(parts, cfg, Path(folder))
        parts.method.before_epoch(epoch, parts.embed, 0)
        for _ in range(5):
            next(steps)
        for turn in range(options.rounds):
            e_step = seconds(lambda turn=turn: parts.method.before_epoch(epoch + turn + 1, parts.embed, turn))
            some = seconds(lambda: [next(steps) for _ in range(options.steps)])
            others = some / options.steps * len(parts.loader)
            parts_of_turn = {"e_step": (e_step, others)}
            if turn % 3 == 0:
                monitor = seconds(lambda: knn(parts.evaluation_context(parts.method.encoder)))
                parts_of_turn["monitor"] = monitor, knn.every_epochs * others
            for name, (own, rest) in parts_of_turn.items():
                rows[name].append({"seconds": own, "steps_s": rest, "share": own / (own + rest)})
                print(f"{name:8} {own:6.1f} s, steps {rest:7.1f} s: {100 * own / (own + rest):.1f} %", flush=True)
    results = []
    for name, goal in GOALS.items():
        share = statistics.median(row["share"] for row in rows[name])
        results.append({"what": name, "share": share, "goal": goal, "rounds": rows[name]})
        print(f"{name}: {100 * share:.1f} %, {'reaches' if share <= goal else 'misses'} {100 * goal:.0f} %")
    record(options.json, f"epoch.py data.root=<cifar10> --rounds {options.rounds} --steps {options.steps}", results)


if __name__ == "__main__":
    run(main)
