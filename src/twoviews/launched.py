"""Code, launchers and tracking URIs that this user trusts, because a command of theirs has named them.

Run folders and sweep folders may come from anywhere and name code, launchers and URIs of others, which are refused. What is
trusted is recorded by hash in the user's cache folder.
"""

import contextlib
import hashlib
import os
from pathlib import Path

_of_this_process: set[str] = set()  # in case the cache folder cannot be written


def remember(text: str) -> None:
    """Trust this from now on: the digest of a copy of the code, the values of a launcher as JSON, or a tracking URI."""
    _of_this_process.add(text)
    with contextlib.suppress(OSError):
        path = _path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def remembered(text: str) -> bool:
    """Whether this was recorded by this process, or with this cache folder."""
    return text in _of_this_process or _path(text).is_file()


def _path(text: str) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
    return caches / "twoviews" / "launched" / hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
