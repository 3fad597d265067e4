"""find_batch=true: sizes that fit, sizes that do not, and sizes that a method refuses, with memory that really runs out."""

import resource
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, refused, start
from omegaconf import OmegaConf
from PIL import Image

from twoviews import batch_size
from twoviews.console import Console

SIMCLR = (*SMALL, "method=simclr", "find_batch=true", "protocol=[knn,finetune,health]", "hydra.run.dir=run")


def sizes(out: str, *parts: str) -> list[int]:
    """Of the lines that have all these parts."""
    lines = [line for line in out.splitlines() if " images: " in line and all(part in line for part in parts)]
    return [int(line.split(" images: ")[0].replace(",", "")) for line in lines]


def largest(out: str) -> int:
    (line,) = [line for line in out.splitlines() if line.startswith("the largest that fits: ")]
    return int(line.split("batch_size=")[1].split()[0])


def test_memory_that_runs_out(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda: 400_000_000)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    big = ("augmentation.views.both.size=64", "backbone.width=16", "backbone.stem=cifar")
    done = command("train", *SIMCLR, *big, "batch_size=64")
    assert done.code == 0, done.out + done.err
    fit, not_fit = sizes(done.out, "images/s"), sizes(done.out, "does not fit")
    assert fit and not_fit and largest(done.out) == max(fit) < min(not_fit)
    assert f"for more: batch_size={2 * max(fit)} runtime.accumulate=2" in done.out
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


class Pretended(batch_size._Finder):
    """Where `fitting` images fit, of 1,000, and the method wants a multiple of `of`."""

    def __init__(self, begin: int, fitting: int, of: int = 1):
        self.cfg, self.console = OmegaConf.create({"batch_size": begin}), Console(quiet=True)
        self.fitting, self.of, self.tried = fitting, of, []

    def trial(self, size: int) -> batch_size.Trial:
        self.tried.append(size)
        if size % self.of:
            return batch_size.Trial(size, refused="no multiple")
        if size > self.fitting:
            return batch_size.Trial(size, failed="too large")
        return batch_size.Trial(size, peak=1.0, rate=1.0, images=1000)


@pytest.mark.parametrize(
    ("finder", "tried", "largest"),
    [
        (Pretended(64, 1000), [64, 128, 256, 512], 512),
        (Pretended(64, 300), [64, 128, 256, 512, 320], 256),
        (Pretended(64, 400), [64, 128, 256, 512, 320, 384, 448], 384),
        (Pretended(64, 511), [64, 128, 256, 512, 320, 384, 448], 448),
        (Pretended(64, 100), [64, 128, 80, 96, 112], 96),
        (Pretended(256, 50), [256, 128, 64, 32, 40, 48, 56], 48),
        (Pretended(64, 400, of=64), [64, 128, 256, 512, 320, 384, 448], 384),
        (Pretended(24, 100, of=24), [24, 48, 96, 192, 120], 96),
        (Pretended(96, 70, of=24), [96, 48, 60, 72], 48),
    ],
)
def test_which_sizes_are_tried(finder: Pretended, tried: list[int], largest: int) -> None:
    assert finder.largest().size == largest
    assert finder.tried == tried


def test_nothing_fits(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda: 1_000_000)
    refused(command("train", *SIMCLR, "batch_size=4"), "no batch from 2 to 4 images fits", "smaller backbone")


def test_sizes_that_a_method_refuses_are_named(command) -> None:
    moco = (*SMALL, "method.queue_size=128", "method.embed_dim=16", "find_batch=true", "hydra.run.dir=run")
    done = command("train", *moco, "batch_size=128")
    assert done.code == 0, done.out + done.err
    assert sizes(done.out, "images/s") == [128] and largest(done.out) == 128
    assert sizes(done.out, "passed over: method.queue_size=128 is smaller") == [256]


def test_images_that_workers_still_have_to_decode(command, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(16):
        Image.new("RGB", (8, 8), (16 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    folder = ("data=folder", "data.root=pictures", "data.labels=false", "data.cache=c", "data.size=8", "data.workers=1")
    small = [argument for argument in SIMCLR if not argument.startswith("data.")]
    done = command("train", *small, *folder, "batch_size=16")
    assert done.code == 0 and largest(done.out) == 16, done.out + done.err


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["batch_size=300"], ["batch_size=300 is larger than the 256 training images"]),
        (["preview=true"], ["preview=true and find_batch=true are two questions"]),
    ],
)
def test_what_is_refused(command, more: list[str], parts: list[str]) -> None:
    refused(command("train", *SIMCLR, *more), *parts)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")]
    child = start([*arguments, *SIMCLR], tmp_path)
    assert child.wait(300)
    assert (tmp_path / "stderr.txt").read_text().count("error: find_batch=true asks for the memory of one process") == 1


def test_a_finished_run_is_left_alone(command) -> None:
    run = [*SMALL, "method=simclr", "hydra.run.dir=run", "protocol=[]", "epochs=1"]
    assert command("train", *run).code == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    done = command("train", *run, "batch_size=128", "find_batch=true")
    assert done.code == 0, done.out + done.err
    assert sizes(done.out, "images/s") == [128, 256] and sizes(done.out, "more than the 256 training images") == [512]
    assert largest(done.out) == 256 and "runtime.accumulate" not in done.out  # no more images than that
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
