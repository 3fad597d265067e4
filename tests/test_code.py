"""Copies of the code that later edits do not reach."""

import subprocess
from pathlib import Path

import pytest

from twoviews import code
from twoviews.errors import BadInput


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a committed file, a changed one, one that was added, an ignored one, and two that git does not know."""
    root = tmp_path / "checkout"
    for place in ("src/twoviews", "tests"):
        (root / place).mkdir(parents=True)
    for name, text in {
        "train.py": "1",
        "tests/test_train.py": "1",
        "src/twoviews/loop.py": "1",
        ".gitignore": "*.log\n",
        "README.md": "",
    }.items():
        (root / name).write_text(text)

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    (root / "src" / "twoviews" / "loop.py").write_text("2")
    (root / "src" / "twoviews" / "new.py").write_text("new")
    git("add", "src/twoviews/new.py")
    (root / "src" / "twoviews" / "mine.py").write_text("not added")
    (root / "src" / "id_rsa").write_text("PRIVATE KEY")
    (root / "src" / "noise.log").write_text("noise")
    monkeypatch.setattr(code, "ROOT", root)
    return root


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_has_what_runs_need_and_knows_its_commit(checkout: Path, tmp_path: Path, monkeypatch) -> None:
    commit, difference = code.code_state()
    copy = code.freeze(tmp_path / "code")
    assert files(copy) == {"train.py", "src/twoviews/loop.py", "src/twoviews/new.py", "commit.txt", "diff.patch"}
    (checkout / "src" / "twoviews" / "loop.py").write_text("3")
    assert (copy / "src" / "twoviews" / "loop.py").read_text() == "2"
    assert code.freeze(tmp_path / "code") != copy, "other code is another copy"
    monkeypatch.setattr(code, "ROOT", copy)
    assert code.code_state() == (commit, difference) and "+2" in difference and len(commit) == 40
    # Of a copy, too: it lies below a checkout whose git does not know it.
    assert files(code.freeze(tmp_path / "again")) == files(copy) and (tmp_path / "again" / copy.name).exists()


def test_the_same_code_is_copied_once(checkout: Path, tmp_path: Path) -> None:
    copy = code.freeze(tmp_path / "code")
    stamp = (copy / "train.py").stat().st_mtime_ns
    assert code.freeze(tmp_path / "code") == copy and (copy / "train.py").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "code").iterdir()] == [copy.name]


def test_what_git_does_not_track_is_left_out_and_named(checkout: Path, tmp_path: Path) -> None:
    assert code.left_out() == ["src/id_rsa", "src/twoviews/mine.py"]
    copy = code.freeze(tmp_path / "code")
    assert "PRIVATE KEY" not in code.code_state()[1] and "not added" not in code.code_state()[1]
    assert not {"src/id_rsa", "src/twoviews/mine.py"} & files(copy)


def test_a_copy_with_another_content_is_not_used(checkout: Path, tmp_path: Path) -> None:
    copy = code.freeze(tmp_path / "code")
    (copy / "train.py").write_text("other")
    with pytest.raises(BadInput, match="not the code that its name stands for"):
        code.freeze(tmp_path / "code")


@pytest.mark.parametrize("repository", [False, True])
def test_without_git_code_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: bool) -> None:
    if repository:  # another one, which does not know this folder
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "root" / "src" / "__pycache__").mkdir(parents=True)
    for name in ("train.py", "src/loop.py", "src/__pycache__/loop.pyc", "src/id_rsa", "src/key.pem"):
        (tmp_path / "root" / name).write_text("1")
    monkeypatch.setattr(code, "ROOT", tmp_path / "root")
    assert repository or code.code_state() == ("none", "")
    assert code.left_out() == ["src/id_rsa", "src/key.pem"]
    copy = code.freeze(tmp_path / "code")
    assert files(copy) == {"train.py", "src/loop.py", "commit.txt"}
