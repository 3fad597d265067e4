"""What this user has launched: a sweep folder may come from anywhere, and of its code and its launcher only that is run."""

import contextlib
import hashlib
import os
from pathlib import Path


def remember(what: str) -> None:
    """Of code its digest, of a launcher its values; where nothing can be written, nothing is run a second time."""
    with contextlib.suppress(OSError):
        path = _path(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def remembered(what: str) -> bool:
    """Whether it was launched with this user's cache folder."""
    return _path(what).is_file()


def _path(what: str) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
    return caches / "twoviews" / "launched" / hashlib.blake2b(what.encode(), digest_size=32).hexdigest()
