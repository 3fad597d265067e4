"""The code of this checkout: its commit and uncommitted changes, and frozen copies that later edits do not change."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from twoviews.config.groups import ROOT
from twoviews.errors import BadInput
from twoviews.files import write_atomic

SOURCES = Path(__file__).resolve().parents[1]  # of this package; in a job of a sweep those of the frozen copy
PATTERNS = ("src", "conf", "*.py")  # files that runs need, below the root of the checkout
SUFFIXES = (".py", ".yaml", ".c", ".cu")  # of the copied files, outside a git checkout


def code_state() -> tuple[str, str]:
    """The commit of this code and the diff of uncommitted changes; ("none", "") if there is no commit, see `no_commit`."""
    if (ROOT / "commit.txt").exists():  # a frozen copy, which lies in a folder that git ignores
        difference = ROOT / "diff.patch"
        return (ROOT / "commit.txt").read_text().strip(), difference.read_text() if difference.exists() else ""
    try:
        return _git("rev-parse", "HEAD").strip(), _git("diff", "HEAD", "--", ".", ":!outputs", ":!multirun")
    except (OSError, subprocess.CalledProcessError):
        return "none", ""


def no_commit() -> str | None:
    """Why the commit of this code is not known; None if it is known."""
    if (ROOT / "commit.txt").exists():
        return None if code_state()[0] != "none" else "none was known where it was copied"
    try:
        _git("rev-parse", "HEAD")
    except FileNotFoundError:
        return "git is not installed"
    except (OSError, subprocess.CalledProcessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return lines[0] if lines else str(error)
    return None


def freeze(folder: Path) -> Path:
    """The path of a copy of this code and its `code_state` below `folder`, named by its digest; made if it is not there.

    Only files that git tracks are copied, because a new file may be a private key; `left_out` lists the others.

    Raises:
        BadInput: the copy is there and has another content.
    """
    files = {path: (ROOT / path).read_bytes() for path in _files()[0]}
    digest = _digest(files)
    copy = folder / digest[:8]
    if copy.exists():
        if copy_digest(copy) != digest:
            raise BadInput(f"{copy} is not the code that its name stands for; delete it, and it is copied again.")
        return copy
    part = folder / f".{copy.name}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    for path, data in files.items():
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        (part / path).write_bytes(data)
    commit, difference = code_state()
    write_atomic(part / "commit.txt", commit + "\n")
    if difference:
        write_atomic(part / "diff.patch", difference)
    try:
        part.rename(copy)
    except OSError:  # another process was first
        if not copy.exists():
            raise
        shutil.rmtree(part)
    return copy


def copy_digest(copy: Path) -> str:
    """The digest of the files of a copy of code; empty if it contains links. Compiled files are removed from it first."""
    paths = sorted(copy.rglob("*"))
    for path in paths:
        if path.name == "__pycache__" and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # what is left counts as content
    kept = {path.relative_to(copy).as_posix(): path for path in paths if path.is_symlink() or path.is_file()}
    if any(path.is_symlink() for path in kept.values()):
        return ""
    about = ("commit.txt", "diff.patch")
    return _digest({name: path.read_bytes() for name, path in sorted(kept.items()) if name not in about})


def python_path(sources: Path = SOURCES) -> str:
    """PYTHONPATH for a child process that imports from this folder first; by default this package as it is here."""
    return os.pathsep.join(filter(None, [str(sources), os.environ.get("PYTHONPATH")]))


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for path, data in files.items():
        digest.update(f"{path}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def left_out() -> list[str]:
    """Paths below the root of the checkout that `freeze` does not copy, because git does not track them; sorted."""
    return _files()[1]


def _files() -> tuple[list[str], list[str]]:
    """Paths below the root of the checkout that are copied, and those that are not; each sorted."""
    try:
        if (ROOT / "commit.txt").exists():
            raise FileNotFoundError
        tracked, other = (
            _git("--glob-pathspecs", "ls-files", "-z", *options, "--", *PATTERNS).split("\0")
            for options in (("--cached",), ("--others", "--exclude-standard"))
        )
        if not any(tracked):  # this folder lies in a repository that does not know it
            raise FileNotFoundError
    except (OSError, subprocess.CalledProcessError):
        paths = [path for pattern in PATTERNS for top in ROOT.glob(pattern) for path in (top, *top.rglob("*"))]
        paths = [path.relative_to(ROOT) for path in paths if path.is_file() and "__pycache__" not in path.parts]
        tracked = [str(path) for path in paths if path.suffix in SUFFIXES]
        other = [str(path) for path in paths if path.suffix not in SUFFIXES]
    return sorted({path for path in tracked if path and (ROOT / path).is_file()}), sorted({*filter(None, other)})


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
