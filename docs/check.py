"""Runs the commands of README.md, CONTRIBUTING.md and docs/*.md, each as it stands there, in a copy of the checkout.

    python docs/check.py                  # every command that can run here
    python docs/check.py choose own-data  # those of some pages
    python docs/check.py --compose        # run none, only compose and check their configurations

Commands are the lines of code blocks and the code within a line that begin with a program of this project. Placeholders and
names of the reader's own files stand for a small run and for small images that are made before; trainings are shortened by
the overrides in SHORTER, which come last and say nothing about the command's own keys. What cannot run on every machine is
composed and checked, so that a wrong key fails, and the reason is printed (REASONS).
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from twoviews.sweeps.composing import Composer

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = re.compile(
    r"^(?:OMP_NUM_THREADS=1 )?(?:python(?:3[.]1[123])? (?:-m twoviews[.]\w+ \w|[\w/]+[.]py)|torchrun .*[.]py|make \w"
    r"|pip install|RECORD_GOLDEN=1)"
)
SHORTER = ("epochs=1", "data.train_images=64", "batch_size=16", "runtime.device=cpu", "runtime.log_every=2")
SMALL_QUEUE = "method.queue_size=32"
WITH_QUEUE = ("moco", "moco_v1", "moco_v2", "pcl", "nnclr")
IMAGES = 140  # of a split: more than the largest batch of a command
TIMEOUT_S = 900

# Names in commands that stand for something of the reader's: what takes their place here.
PLACEHOLDERS = {
    "outputs/<run>": "outputs/example",
    "outputs/<other>": "outputs/other",
    "<run>": "outputs/example",
    "<folder of runs>": "outputs",
    "<cifar10>": "pictures",
    "<images>": "pictures",
    "<folder of CIFAR-10>": "pictures",
    "<name>": "example",
    "<host>": "127.0.0.1",
}
# Why a command is composed and checked, and not run; the first pattern that fits.
REASONS = {
    r"^make (train|test|test-slurm|setup|lint|types|lock|clean|docs|docs-check)\b|PYTHON=": "runs for minutes, or changes .venv",
    r"align_uniform|data=shapes": "an example of the page; tests/test_docs.py runs it",
    r"^make (mlflow|tracking-server)|tracking serve": "a server that runs until Ctrl-C",
    r"^make (bench|gpu-check)|benchmarks/": "a benchmark: minutes to hours, some on a GPU",
    r"hydra/launcher=slurm": "needs a SLURM cluster; make test-slurm has one",
    r"data=(cifar10|cifar100|stl10)\b|experiment=\w*cifar10": "downloads a data set",
    r"find_batch=true|runtime.device=cuda|cuda_graph|precision=fp16": "needs a GPU",
    r":pretrained|run=weights.pt|checkpoint.pth": "needs weights of the reader's",
    r"tracking.uri=http|--uri": "needs a server of MLflow",
    r"^pip install": "changes the environment; the tests of installation do it",
    r"RECORD_GOLDEN|pytest": "a part of the tests",
    r"hydra/sweeper=optuna": "a search of minutes; the tests of sweeps do it",
    r"twoviews.tracking tensorboard|protocol=duplicates|pictures.format|protocol=finetune": "a test of its own runs it",
}
EVALUATED_SHORTER = {  # settings of protocols that would take minutes
    r"linear_(moco|simsiam|swav)\b": "protocol.{0}.epochs=1",
    r"\bfew_labels_finetune\b": "protocol.few_labels.finetune.epochs=1",
}


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Args:
        page: where it stands, relative to the checkout.
        line: number of the line, from 1.
        text: as it stands there, continued lines joined and comments removed.
    """

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell splits it, with placeholders replaced."""
        text = self.text
        for name, value in PLACEHOLDERS.items():
            text = text.replace(name, value)
        return shlex.split(text)

    @property
    def entry(self) -> str:
        """train, evaluate or cluster; empty for other programs."""
        found = re.search(r"\b(train|evaluate|cluster)[.]py\b", self.text)
        return found[1] if found else ""

    @property
    def overrides(self) -> list[str]:
        """What follows the name of the program."""
        words = self.words
        name = f"{self.entry}.py"
        return words[words.index(name) + 1 :] if name in words else []

    @property
    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        return next((reason for pattern, reason in REASONS.items() if re.search(pattern, self.text)), "")


def pages() -> list[Path]:
    """The pages whose commands are checked."""
    others = ("README.md", "CONTRIBUTING.md", "benchmarks/speedrun.md")
    return [*(ROOT / name for name in others), *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> Iterator[Command]:
    """The commands of a page, in order."""
    page, joined, first, fence = str(path.relative_to(ROOT)), "", 0, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if text.startswith("```"):
            fence = None if fence is not None else text.removeprefix("```")
            continue
        if fence:  # code in a language
            continue
        if joined or ((fence == "" or line.startswith("    ")) and PROGRAM.match(text)):
            first = first or number
            joined += " " + text.removesuffix("\\").strip()
            if text.endswith("\\"):
                continue
            yield Command(page, first, re.sub(r"\s+#\s.*$", "", joined).strip())
            joined, first = "", 0
            continue
        for code in re.findall(r"`([^`]+)`", line):
            if PROGRAM.match(code) and not code.endswith("…"):
                yield Command(page, number, code)


def all_commands(names: Sequence[str] = ()) -> list[Command]:
    """Those of all pages, or of pages with these names, each once."""
    found: dict[str, Command] = {}
    for path in pages():
        if not names or path.stem in names:
            for command in commands(path):
                found.setdefault(command.text, command)
    return list(found.values())


def _whole(name: str, overrides: Sequence[str]) -> "DictConfig":
    """The configuration of an entry point with Hydra's own node."""
    from hydra import compose, initialize_config_dir

    from twoviews.config.composition import VERSION_BASE, register_resolvers
    from twoviews.config.groups import CONF

    register_resolvers()
    with initialize_config_dir(**VERSION_BASE, config_dir=str(CONF)):
        return compose(name, list(overrides), return_hydra_config=True)


@cache
def _composer(name: str) -> "Composer":
    """Composes configurations of an entry point; commands with the same choices of files share the work."""
    from twoviews.sweeps.composing import Composer

    return Composer(partial(_whole, name))


def compose(command: Command) -> None:
    """Compose the configurations of a command of an entry point and check them; raises what is wrong with it."""
    from twoviews.config.checks import check, checked_plugin
    from twoviews.config.command_line import MULTIRUN_FLAGS, check_arguments, hydra_arguments

    composer = _composer(command.entry)
    words = [word for word in command.overrides if word not in ("--help", "--cfg", "job", "--resolve")]
    check_arguments(command.entry, words)
    overrides = [word for word in hydra_arguments(command.entry, words) if word not in MULTIRUN_FLAGS]
    if not MULTIRUN_FLAGS.isdisjoint(words):
        whole = _whole(command.entry, next(_values(overrides)))
        for kind in ("launcher", "sweeper"):
            checked_plugin(whole, kind)
        overrides_of_jobs = [
            [word for word in job if not word.lstrip("+").startswith("hydra")] for job in _values(overrides)
        ]
    else:
        overrides_of_jobs = [overrides]
    for job in overrides_of_jobs:
        check(command.entry, composer(job).config)


def _values(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of jobs that have the first, the second, … of each key's values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
    swept: dict[str, list[str]] = {}
    for each in parsed:
        if each.is_interval_sweep():
            swept[each.key_or_group] = [str(each.value().start), str(each.value().end)]  # type: ignore[union-attr]
        elif each.is_sweep_override():
            swept[each.key_or_group] = [str(value) for value in each.sweep_string_iterator()]
    for number in range(max(map(len, swept.values()), default=1)):
        yield [*fixed, *(f"{key}={values[min(number, len(values) - 1)]}" for key, values in swept.items())]


def shortened(command: Command) -> list[str]:
    """The words of a command that is run, a training shortened."""
    words = ["python" if word == "python3" else word for word in command.words]
    if command.entry == "train" and not {"--help", "--cfg"} & set(words):
        own_batch = "batch_size=" in command.text  # needs as many images, and a queue for them
        words += [word for word in SHORTER if not (own_batch and word.startswith(("batch_size", "data.train_images")))]
        method = next((word.partition("=")[2] for word in reversed(words) if word.startswith("method=")), "moco")
        words += [SMALL_QUEUE] if method in WITH_QUEUE and not own_batch else []
        words += ["method.clusters=[4]"] if method in ("pcl", "deepcluster_v2") else []
        words += [] if "backbone=timm" in words else ["backbone.width=8"]
        # MLflow takes longer to start than these trainings.
        words += [] if "tracking" in command.text else ["tracking=files"]
    for pattern, override in EVALUATED_SHORTER.items():
        if command.entry == "evaluate" and (found := re.search(pattern, command.text)):
            words.append(override.format(found[0]))
    return words


class Copy:
    """A copy of what git knows of the checkout, with a small run and small images in it.

    Args:
        folder: where it is made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        git = ["git", "-c", "user.name=docs", "-c", "user.email=docs@example.org"]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
            subprocess.run([*git, *words], cwd=folder, check=True)
        self.bin = folder.parent / "bin"
        self.bin.mkdir(exist_ok=True)
        for name in ("python", "python3"):
            (self.bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (self.bin / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
        for path in self.bin.iterdir():
            path.chmod(0o755)
        self.images()

    def images(self) -> None:
        """Folders of pictures and a file of arrays, by the names that the pages use."""
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels = (images.reshape(-1, 8, 8) * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        for name, splits in {"pictures": ("train", "test"), "photos": ("train", "test", "all")}.items():
            for part, split in enumerate(splits):
                for number in range(IMAGES * part, IMAGES * part + IMAGES):
                    inner = "" if split == "all" else str(labels[number])
                    path = self.folder / name / split / inner / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels[number]).convert("RGB").save(path)
        for name in ("photo.png", "photo.jpg"):
            Image.fromarray(pixels[-1]).convert("RGB").save(self.folder / name)
        arrays = {"images": pixels[:200], "labels": labels[:200]}
        np.savez(self.folder / "digits.npz", **arrays, test_images=pixels[200:300], test_labels=labels[200:300])

    def run(self, words: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
        """A command in the copy."""
        words = list(words)
        extra = {"PYTHONPATH": str(self.folder / "src"), "PATH": f"{self.bin}:{os.environ['PATH']}", **environment}
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            key, _, value = words.pop(0).partition("=")
            extra[key] = value
        return subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", **extra},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def runs(self) -> None:
        """Two runs on colour pictures, the first of them a network that torchvision has, and a sweep; commands name them."""
        small = [*SHORTER, "tracking=files", SMALL_QUEUE]
        pictures = ["data=folder", "data.root=pictures"]
        for words in (
            [*small, *pictures, "hydra.run.dir=outputs/other", "seed=1", "backbone.width=8"],
            [*small, *pictures, "hydra.run.dir=outputs/example"],
            ["-m", *small, "backbone.width=8", "seed=0,1", "sweep.name=example"],
        ):
            done = self.run(["python", "train.py", *words])
            assert done.returncode == 0, done.stderr


def checked(command: Command, copy: Copy | None) -> tuple[str, str]:
    """What was done with a command ("run", "composed", "make -n", "looked up"), and what is wrong with it, if anything."""
    words = command.words
    if copy and not command.reason and words[0] != "make":
        (copy.folder / "outputs" / "example" / "config.yaml").touch()  # run=latest
        done = copy.run(shortened(command))
        return "run", "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-600:]
    if command.entry and "an example" not in command.reason:
        try:
            compose(command)
        except Exception as error:  # of Hydra's many types; all are mistakes of the page
            return "composed", str(error)
        return "composed", ""
    if words[0] == "make":
        plain = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [target for target in plain if target not in targets]
        return "make", f"there is no target {', '.join(wrong)}" if wrong else ""
    if script := next((word for word in words if word.endswith(".py")), None):
        text = (ROOT / script).read_text() if (ROOT / script).exists() else None
        if text is None:
            return "looked up", f"there is no {script}"
        wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in text]
        return "looked up", f"{script} has no {', '.join(wrong)}" if wrong else ""
    return "looked up", ""


def main() -> int:
    """Check all; the exit code is 1 if a command is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", help="names of pages without .md; none: all")
    parser.add_argument("--compose", action="store_true", help="run none")
    parser.add_argument("--folder", type=Path, help="of the copy; by default below outputs/, and deleted")
    options = parser.parse_args()
    found = all_commands(options.pages)
    folder = options.folder or ROOT / "outputs" / "docs-check"
    shutil.rmtree(folder, ignore_errors=True)
    copy = None if options.compose else Copy(folder / "checkout")
    if copy:
        copy.runs()
    counts, wrong = Counter[str](), 0
    for command in found:
        start = time.monotonic()
        how, problem = checked(command, copy)
        counts[how] += 1
        because = f" ({command.reason})" if command.reason and not options.compose else ""
        print(
            f"{how:9} {time.monotonic() - start:5.1f} s  {command.page}:{command.line}  {command.text}{because}",
            flush=True,
        )
        if problem:
            wrong += 1
            print(f"  WRONG: {problem}", flush=True)
    if copy and not options.folder:
        shutil.rmtree(folder, ignore_errors=True)
    shares = ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))
    print(f"{len(found)} commands: {shares}; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
