"""What runs more slowly than it could, or is not recorded, is said in a line, once, and nothing where all is as it should be."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MOCO

from twoviews import code, compiled, fallbacks, fused_norm
from twoviews.data import rendering
from twoviews.fallbacks import slower, unrecorded

CPU = torch.device("cpu")
CACHES = (compiled.library, fused_norm._compiled, fused_norm._checked, rendering._checked)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled code is looked for anew."""
    monkeypatch.setenv("TWOVIEWS_KERNEL", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for one in CACHES:
        one.cache_clear()
    yield
    for one in CACHES:
        one.cache_clear()


def told(out: str) -> list[str]:
    """The lines about fallbacks."""
    return [line for line in out.splitlines() if line.startswith(("slower ", "code "))]


def test_each_command_says_it_once(forgotten, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command("train", *SMALL_MOCO, "epochs=1", "protocol=[]", "seed=1")
    assert whole.code == 0 and told(whole.out) == [], whole.out
    assert "views     compiled" in whole.out and "norms     fused\n" in whole.out
    (tmp_path / "bin").mkdir()
    for one in CACHES:
        one.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))  # neither git nor a compiler
        done = command("train", *SMALL_MOCO, "epochs=1", "protocol=[]")
        assert done.code == 0, done.err
        missing = "there is no C compiler cc; install one, or name another by the environment's CC."
        assert told(done.out) == [
            "slower    in plain torch: views (about five times as long), batch norms; " + missing,
            "code      no commit is recorded: git is not installed.",
        ]
        assert "views     tensors" in done.out and "norms     plain\n" in done.out
        assert (done.folder / "commit.txt").read_text() == "none\n"
        both = f"run=[{done.folder},{whole.folder}]"
        for name, *more in (
            ("evaluate", both, "protocol=knn_small"),
            ("cluster", f"run={done.folder}", "clusters=[3]"),
        ):
            after = command(name, *more)
            assert after.code == 0, after.err
            (line,) = told(after.out)
            assert "views" in line and "batch norms" not in line and line.endswith(missing)


def test_why_a_file_is_not_compiled(forgotten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slower("cpu", CPU, norms=True) == []
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho 'In file:' >&2\necho \"mycc: error: no such option -march\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for one in CACHES:
        one.cache_clear()
    lines = slower("cpu", CPU, norms=True)
    assert len(lines) == 2
    for line, source in zip(lines, ("kernel", "norm"), strict=True):
        (log,) = (tmp_path / "cache" / "twoviews").glob(f"{source}-*.log")
        assert f"{compiler} does not compile {source}.c (mycc: error: no such option -march)" in line
        assert str(log) in line and "In file:" in log.read_text() and f"{source}.c -o" in log.read_text()
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiler))  # a file: nothing can be written there
    compiled.library.cache_clear()
    (line,) = slower("cpu", CPU)[:1]
    assert str(compiler) in line
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    compiled.library.cache_clear()
    (line,) = slower("cpu", CPU, norms=True)
    assert "views (about five times as long), batch norms; TWOVIEWS_KERNEL=0." in line


def test_a_gpu_that_torch_does_not_find(forgotten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fallbacks, "DRIVER", tmp_path)
    (line,) = slower("auto", CPU)
    assert "this machine has a GPU, and torch does not find it" in line
    assert slower("cpu", CPU) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slower("auto", CPU) == []


def test_without_onednn(forgotten, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    (line,) = slower("cpu", CPU)
    assert "convolutions of features" in line and "oneDNN" in line


def test_why_no_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "unpacked"
    root.mkdir()
    monkeypatch.setattr(code, "ROOT", root)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (line,) = unrecorded()
    assert line.startswith("code      no commit is recorded: fatal: not a git repository")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert unrecorded() == []
    for name in ("src/twoviews/methods/mine.py", "src/notes.txt", "mine.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    subprocess.run([*git, "add", "mine.py"], check=True)
    (line,) = unrecorded()
    assert line.endswith("1 file that git does not track: src/twoviews/methods/mine.py; `git add` them.")
    subprocess.run([*git, "add", "src"], check=True)
    assert unrecorded() == []
    (root / "commit.txt").write_text("none\n")
    assert "where it was copied" in unrecorded()[0]
    (root / "commit.txt").write_text("0123abcd\n")
    assert unrecorded() == []
