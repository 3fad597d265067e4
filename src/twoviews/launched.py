"""What this user has launched and where results were sent: folders may come from anywhere, and name code and stores, too."""

import contextlib
import hashlib
import os
from pathlib import Path

_here: set[str] = set()  # in this process, for where nothing can be written


def remember(what: str) -> None:
    """Of code its digest, of a launcher its values, of a store its address; where nothing can be written, this process does."""
    _here.add(what)
    with contextlib.suppress(OSError):
        path = _path(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def remembered(what: str) -> bool:
    """Whether it was launched, or named, with this user's cache folder or by this process."""
    return what in _here or _path(what).is_file()


def _path(what: str) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
    return caches / "twoviews" / "launched" / hashlib.blake2b(what.encode(), digest_size=32).hexdigest()
