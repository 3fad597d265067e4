"""The share of a PCL epoch that its E-step takes: embedding all images, every k-means, the concentrations.

    OMP_NUM_THREADS=1 python benchmarks/e_step.py data.root=<cifar10> --json benchmarks/results/e_step.json

Of experiment=laptop method=pcl, from its beginning. A round is the E-step, warm from the one before, and `--steps` steps,
from which the seconds of all steps of an epoch follow; a whole run logs the wall time of each as time/e_step. CPU seconds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import hydra
from loops import ours
from recording import arguments, record

from twoviews import config
from twoviews.assembly import load_data, make_parts, make_views

GOAL = 0.15


def main() -> None:
    """Command line."""
    options = arguments(__doc__, rounds=9, steps=40)
    shared = ["experiment=laptop", "method=pcl", "data=folder", "tracking=files", "protocol=[]"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.CONF)):
        cfg = hydra.compose("train", [*shared, *options.overrides])
    config.check("train", cfg)
    data, runtime = load_data(cfg), config.build(cfg.runtime)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, runtime.torch_device())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        steps = ours(parts, cfg, Path(folder))
        parts.method.before_epoch(cfg.method.warmup_epochs, parts.embed, 0)
        for _ in range(5):
            next(steps)
        for turn in range(options.rounds):
            start = time.process_time()
            parts.method.before_epoch(cfg.method.warmup_epochs + turn + 1, parts.embed, turn)
            e_step = time.process_time() - start
            start = time.process_time()
            for _ in range(options.steps):
                next(steps)
            epoch = (time.process_time() - start) / options.steps * len(parts.loader)
            share = e_step / (e_step + epoch)
            rows.append({"e_step_s": e_step, "steps_s": epoch, "share": share, "goal": GOAL})
            print(f"E-step {e_step:.1f} s, {len(parts.loader)} steps {epoch:.1f} s: {100 * share:.1f} %", flush=True)
    share = statistics.median(row["share"] for row in rows)
    print(f"{100 * share:.1f} % of an epoch, {'reaches' if share <= GOAL else 'misses'} {100 * GOAL:.0f} %")
    record(options.json, f"e_step.py data.root=<cifar10> --rounds {options.rounds} --steps {options.steps}", rows)


if __name__ == "__main__":
    main()
