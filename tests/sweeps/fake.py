"""A stand-in for train.py, so that what surrounds a training can be tested without waiting for torch.

`sweep(folder, plans)` makes a sweep whose jobs do what their plan says, in Python, with the helpers below at hand.
"""

from pathlib import Path

from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobSpec

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(next(one for one in sys.argv if one.startswith("--config-path=")).partition("=")[2])
(folder / "starts").open("a").write(f"{os.getpid()}\\n")

def checkpoint():
    (folder / "last.new").write_text(str(time.time_ns()))
    (folder / "last.new").rename(folder / "last.pt")

def result(state, **more):
    (folder / "result.json").write_text(json.dumps({"state": state, "seconds": 1, "knn/top1": 50.0, **more}))

def stop_when_told(number=None):
    def leave(number, frame):
        checkpoint(); result("interrupted"); sys.exit(128 + number)
    for one in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(one, leave)

def until(path):
    while not Path(path).exists():
        time.sleep(0.02)

exec("\\n".join(line[2:] for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("# ")))
"""
FINISH = "checkpoint(); result('finished')"


def sweep(folder: Path, *plans: str) -> list[Job]:
    """A sweep with a job for each plan."""
    code = folder / "code" / "fake"
    code.mkdir(parents=True, exist_ok=True)
    (code / "train.py").write_text(TRAIN)
    here = {"cwd": str(folder), "code": str(code)}
    made = [
        JobSpec(f"{number:08x}", {"seed": number}, [], config(number, plan), here) for number, plan in enumerate(plans)
    ]
    Sweep(folder).add(made)
    return Sweep(folder).jobs


def config(seed: object, plan: str) -> str:
    """The plan as comments of a configuration that can be read."""
    return "\n".join([f"seed: {seed}", *(f"# {line}" for line in plan.splitlines())]) + "\n"


def starts(job: Job) -> list[int]:
    """Process ids of the trainings that were started for it."""
    path = job.folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
