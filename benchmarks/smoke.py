"""An epoch of every method and a call of every protocol, small and several at once: whether they run, and on what path.

    python benchmarks/smoke.py --device cuda --json smoke.json

Each is a command of its own, on the digits: train.py with a file of conf/method or a variant of one, then evaluate.py and
cluster.py on copies of the run of MoCo. What a protocol may do for long is made short. For each: exit code, seconds, and of
a training the lines that say which path it uses (step, norms, views).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from PIL import Image

from twoviews.config.groups import CONF
from twoviews.config.values import flat

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # of a method's file, which are other code
    "moco_symmetric": ["method.symmetric=true"],
    "moco_plain_norms": ["method.bn_splits=1"],
    "pcl_masked": ["method.mask_same_cluster=true"],
    "pcl_drawn": ["method.negative_prototypes=3"],
}
TRAINING = [
    *("data=digits", "augmentation=digits", "backbone=tiny", "batch_size=128", "epochs=1", "tracking=files"),
    *("protocol=[knn_small]", "runtime.log_every=1"),
]
METHOD = {  # what a method has of these is made smaller
    "queue_size": 512,
    "bn_splits": 4,
    "prototypes": 30,
    "clusters": [200, 300],
    "negative_prototypes": "null",
    "warmup_epochs": 0,
}
PROTOCOL = {  # and what a protocol has of these, in any of its parts
    "corruptions": ["gaussian_noise", "fog"],
    "severities": [3],
    "epochs": 2,
    "milestones": [1],
    "iterations": 5,
    "draws": 2,
    "learning_rates": [0.01, 0.1],
    "weight_decays": [0.001, 0.01],
}
PATH = re.compile(r"^(views|norms|step)\s.*?(compiled|tensors|fused|plain|CUDA graph|eager.*)", re.MULTILINE)


def methods() -> dict[str, list[str]]:
    """The overrides of train.py for each."""
    found = {}
    files = {path.stem: path.stem for path in sorted((CONF / "method").glob("*.yaml"))}
    for name, method in (files | {name: name.partition("_")[0] for name in VARIANTS}).items():
        known = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())
        small = [f"method.{key}={value}" for key, value in METHOD.items() if key in known]
        found[name] = [f"method={method}", *TRAINING, *small, *VARIANTS.get(name, [])]
    return found


def protocols(picture: Path) -> dict[str, list[str]]:
    """The overrides of evaluate.py for each."""
    found = {}
    for name in sorted(path.stem for path in (CONF / "protocol").glob("*.yaml")):
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = OmegaConf.to_container(hydra.compose("evaluate", [f"protocol=[{name}]"]).protocol)
        keys = [key for key in flat(node) if key.rpartition(".")[2] in PROTOCOL]
        small = [f"protocol.{key}={json.dumps(PROTOCOL[key.rpartition('.')[2]])}".replace('"', "") for key in keys]
        found[name] = [f"protocol=[{name}]", *small, *([f"images={picture}"] if name == "predict" else [])]
    return found


def called(name: str, command: list[str]) -> dict[str, Any]:
    """One command and what came of it."""
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    row = {"what": name, "code": done.returncode, "seconds": time.monotonic() - start}
    row |= dict(PATH.findall(done.stdout))
    if done.returncode:
        row["output"] = f"{done.stdout}\n{done.stderr}"[-4000:]
        print(f"{name}: exit code {done.returncode}\n{row['output']}", flush=True)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="commands")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="methods and protocols, beside moco")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    device, rows = f"runtime.device={options.device}", []

    def chosen(commands: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: one for name, one in commands.items() if not options.only or name in ("moco", *options.only)}

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        picture = Path(folder) / "picture.png"
        Image.new("L", (32, 32), 99).save(picture)
        training = {
            name: ["train.py", *overrides, device, f"hydra.run.dir={folder}/{name}"]
            for name, overrides in chosen(methods()).items()
        }
        judging = {
            f"protocol {name}": ["evaluate.py", f"run={folder}/for-{name}", *overrides, device]
            for name, overrides in chosen(protocols(picture)).items()
        }
        judging["cluster.py"] = ["cluster.py", f"run={folder}/for-cluster.py", "clusters=[10]", device]
        for several in (training, judging):
            rows += pool.map(called, several.keys(), several.values())
            if options.json:  # after each half, as the time may be short
                options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            if several is training and not (Path(folder) / "moco" / "encoder.json").exists():
                break  # there is nothing to judge
            for name in judging if several is training else ():  # because each command writes into its run
                shutil.copytree(Path(folder) / "moco", Path(folder) / f"for-{name.removeprefix('protocol ')}")
    failed = [row["what"] for row in rows if row["code"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} ran" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
