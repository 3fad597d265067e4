import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from twoviews.console import progress_of
from twoviews.data.store import Chunk, Recipe, stored
from twoviews.errors import BadInput

PIXELS = torch.randint(0, 256, (10, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def recipe(chunks=None, **changes):
    rows = torch.arange(10)
    sizes = torch.full((10, 2), 8)
    chunks = chunks or [Chunk(rows[:6], PIXELS[:6], sizes[:6]), Chunk(rows[6:], PIXELS[6:], sizes[6:])]
    facts = {"splits": {"train": (0, 6), "test": (6, 10)}, "labels": np.arange(10) % 2, "classes": ("a", "b")}
    return Recipe(**{**facts, "channels": 2, "size": 8, "chunks": chunks, **changes})


def never():
    raise AssertionError("built a second time")


def test_a_store_is_built_once_and_holds_what_went_in(tmp_path):
    first = stored(str(tmp_path), "x", {"k": 1}, recipe)
    again = stored(str(tmp_path), "x", {"k": 1}, never)
    for one in (first, again):
        assert torch.equal(one.pixels, PIXELS)
        assert one.labels.tolist() == [0, 1] * 5
        assert one.rows.tolist() == list(range(10))
    assert again.meta == first.meta
    train = PIXELS[:6].double() / 255
    assert np.allclose(first.meta["mean"], train.mean((0, 2, 3)))
    assert np.allclose(first.meta["std"], train.std((0, 2, 3), correction=0))


def test_the_digest_follows_the_content_and_not_the_parts(tmp_path):
    def digest(name, made):
        return stored(str(tmp_path), name, {}, lambda: made).meta["digest"]

    rows, sizes = torch.arange(10), torch.full((10, 2), 8)
    same = recipe([Chunk(rows[i : i + 1], PIXELS[i : i + 1], sizes[i : i + 1]) for i in range(10)])
    changed = PIXELS.clone()
    changed[3, 0, 0, 0] ^= 1
    digests = [
        digest("a", recipe()),
        digest("b", same),
        digest("c", recipe([Chunk(rows, changed, sizes)])),
        digest("d", recipe(labels=np.ones(10, int))),
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_another_key_is_another_store(tmp_path):
    stored(str(tmp_path), "x", {"size": 8}, recipe)
    with pytest.raises(AssertionError, match="second time"):
        stored(str(tmp_path), "x", {"size": 9}, never)


def test_broken_rows_are_left_out_and_named(tmp_path):
    rows = torch.tensor([0, 1, 2, 4, 5, 6, 7, 9])
    chunk = Chunk(rows, PIXELS[rows], torch.full((8, 2), 8), broken=((3, "is truncated"), (8, "is empty")))
    names = tuple(f"{i}.png" for i in range(10))
    made = stored(str(tmp_path), "x", {}, lambda: recipe([chunk], names=names))
    assert torch.equal(made.pixels, PIXELS[rows])
    assert made.labels.tolist() == (rows % 2).tolist()
    assert made.meta["splits"] == {"train": [0, 5], "test": [5, 8]}
    assert made.meta["broken"] == [["3.png", "is truncated"], ["8.png", "is empty"]]


def test_without_pixels_only_the_facts_are_kept(tmp_path):
    made = stored(str(tmp_path), "x", {}, lambda: recipe(keep_pixels=False))
    assert made.pixels is None
    assert len(made.sizes) == 10
    assert not list(tmp_path.glob("*/pixels.npy"))


def test_constant_images_have_a_std_to_divide_by(tmp_path):
    flat = Chunk(torch.arange(10), torch.full_like(PIXELS, 51), torch.full((10, 2), 8))
    meta = stored(str(tmp_path), "x", {}, lambda: recipe([flat])).meta
    assert np.allclose(meta["mean"], 0.2)
    assert np.allclose(meta["std"], 1 / 255)


def left(folder):
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_a_failing_build_leaves_nothing(tmp_path):
    def chunks():
        yield Chunk(torch.arange(6), PIXELS[:6], torch.full((6, 2), 8))
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        stored(str(tmp_path), "x", {}, lambda: recipe(chunks()))
    assert left(tmp_path) == []
    assert len(stored(str(tmp_path), "x", {}, recipe).sizes) == 10


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(BadInput, match=r"1 MB left and the decoded images need 16\.8 MB.*cache="):
        stored(str(tmp_path), "x", {}, recipe)
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    def chunks():
        yield Chunk(torch.arange(6), PIXELS[:6], torch.full((6, 2), 8))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BadInput, match=r"no space is left on the device of .*; free some, or .*cache="):
        stored(str(tmp_path), "x", {}, lambda: recipe(chunks()))
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be used \(not a directory\); choose another folder with cache="):
        stored(str(tmp_path / "file" / "cache"), "x", {}, recipe)


def test_a_damaged_store_is_named(tmp_path):
    stored(str(tmp_path), "x", {}, recipe)
    next(tmp_path.glob("*/arrays.npz")).write_bytes(b"gone")
    with pytest.raises(BadInput, match="damaged"):
        stored(str(tmp_path), "x", {}, never)


BUILDER = """
import sys, time, torch, numpy as np
from pathlib import Path
from twoviews.data.store import Chunk, Recipe, stored

def chunks():
    for row in range(10):
        time.sleep(float(sys.argv[2]))
        yield Chunk(torch.tensor([row]), torch.full((1, 1, 8, 8), row, dtype=torch.uint8), torch.tensor([[8, 8]]))

def recipe():
    print("building", flush=True)
    return Recipe({"train": (0, 10)}, np.zeros(10, int), ("a",), 1, 8, chunks())

made = stored(sys.argv[1], "x", {}, recipe)
print(int(made.pixels.sum()), flush=True)
"""


def builder(cache, pause):
    command = [sys.executable, "-c", BUILDER, str(cache), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_processes_that_start_together_one_builds_and_the_others_wait(tmp_path):
    processes = [builder(tmp_path, 0.2) for _ in range(3)]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], printed
    assert sum("building" in out for out, _ in printed) == 1
    assert all(out.split()[-1] == str(64 * 45) for out, _ in printed)
    assert sum("Waiting for another process" in error for _, error in printed) >= 1


def test_a_killed_build_leaves_no_store_and_the_next_run_builds(tmp_path):
    process = builder(tmp_path, 0.5)
    assert process.stdout.readline() == "building\n"
    while not list(tmp_path.glob("*.building/pixels.npy")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [name for name in left(tmp_path) if not name.endswith(".building")] == []
    after = builder(tmp_path, 0)
    out, _ = after.communicate(timeout=120)
    assert out.split() == ["building", str(64 * 45)]
    (folder,) = left(tmp_path)
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["arrays.npz", "meta.json", "pixels.npy"]
    assert json.loads((tmp_path / folder / "meta.json").read_text())["splits"] == {"train": [0, 10]}


def test_progress_is_plain_lines_and_silent_on_other_ranks(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with progress_of("Decoding x", 10, "images", at_end=True) as advance:
        advance(6)
        advance(4)
    assert capsys.readouterr().err == "Decoding x: 10 of 10 images\n"
    monkeypatch.setenv("RANK", "1")
    with progress_of("Decoding x", 10, "images", at_end=True) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
