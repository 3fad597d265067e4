"""Files of run folders and sweep folders, which may come from anywhere, read as plain values that can do nothing.

Every config.yaml and every JSON file of such a folder is read by `load`. What it returns names no class but those that
conf/ of this checkout names for the same group, has no interpolation where a configuration is built, and is small.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from twoviews.errors import BadInput
from twoviews.signatures import buildable

LARGEST = {".yaml": 2**18, ".json": 2**25}  # bytes; YAML takes far longer to read
DEPTH = 20  # of dictionaries and lists in each other; those of conf/ have five
WHOLE = 2**63  # of a whole number's size


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which few bytes make gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """As the parent class does.

        Raises:
            YAMLError: there is an alias.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def load(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file; empty where there is none.

    Raises:
        BadInput: it is too large, damaged, or holds more than plain values.
    """
    found = text(path)
    return {} if found is None else parse(found, path)


def regular(*paths: Path) -> None:
    """Refuse what would be waited for without end, or never ends itself: pipes, sockets and devices, and links to them.

    Raises:
        BadInput: one of these is there, and no regular file.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is no regular file; it is refused.")


def regular_files(folder: Path) -> None:
    """The same for all that lies in a folder of a run or a sweep but folders.

    Raises:
        BadInput: something is no regular file.
    """
    with contextlib.suppress(FileNotFoundError):
        regular(*(path for path in folder.iterdir() if not path.is_dir()))


def text(path: Path) -> str | None:
    """What `load` parses; None where there is no file.

    Raises:
        BadInput: it is too large, or no text.
    """
    try:
        regular(path)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(LARGEST[path.suffix] + 1)
        if len(content) > LARGEST[path.suffix]:
            raise BadInput(
                f"{path} has more than {LARGEST[path.suffix]:,} bytes, and is none that a run wrote; it is refused."
            )
        return content.decode()
    except FileNotFoundError:  # it was replaced meanwhile
        return None
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from None


def parse(content: str, path: Path) -> dict[str, Any]:
    """What `load` makes of the text, or of a part of the text, of the file at `path`.

    Raises:
        BadInput: it is damaged, or holds more than plain values.
    """
    try:
        tree = json.loads(content) if path.suffix == ".json" else yaml.load(content, _Loader)  # noqa: S506
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None
    if not isinstance(tree, dict):
        raise _damaged(path, "it holds no keys")
    for key, value in tree.items():
        wrong = _impure(str(key), value, str(key), path.suffix == ".yaml", DEPTH)
        # Hydra reads config.yaml when a point of a sweep is trained, and would follow these two.
        if key in ("defaults", "hydra") or str(key).startswith("_"):
            wrong = f"it has the key {_short(key)}"
        if wrong:
            raise BadInput(
                f"{path} is refused, because {wrong}: the files of a run may come from anywhere, so they hold plain values and "
                "classes that conf/ of this checkout names."
            )
    return tree


def _damaged(path: Path, why: object) -> BadInput:
    return BadInput(f"{path} cannot be read ({_short(why)}); put the file back that the run wrote.")


def _impure(path: str, value: Any, group: str, literal: bool, depth: int) -> str:
    """What keeps a value from being plain, as part of a sentence; empty if nothing does.

    Args:
        path: its dotted key.
        value: of a file.
        group: the key of the file that it is below.
        literal: whether no text may be an interpolation; in any case none of a group may.
        depth: of what may still be inside it.
    """
    literal = literal or bool(buildable(group))
    if not depth:
        return f"{path[:60]!r} is nested deeper than {DEPTH} levels"
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, (str, int)):
                return f"{path[:60]!r} has the key {_short(key)}"
            if str(key) == "_target_":
                if not isinstance(inner, str) or inner not in buildable(group):
                    return f"_target_={_short(inner)} is none that {group} can build"
            elif str(key).startswith("_") and str(key).endswith("_"):
                return f"{path[:60]!r} has the key {_short(key)}"
            elif wrong := _impure(f"{path}.{key}", inner, group, literal, depth - 1):
                return wrong
        return ""
    if isinstance(value, list):
        return next(filter(None, (_impure(path, one, group, literal, depth - 1) for one in value)), "")
    if isinstance(value, str):
        return f"{path[:60]!r} is the interpolation {_short(value)}" if literal and "${" in value else ""
    if isinstance(value, int):
        return f"{path[:60]!r} is out of range" if abs(value) > WHOLE else ""
    return "" if value is None or isinstance(value, float) else f"{path[:60]!r} is a {type(value).__name__}"


def _short(value: object) -> str:
    """On one line, and not long."""
    text = " ".join(str(value).split())
    return "".join(sign if sign.isprintable() else "?" for sign in text[:100]) + ("…" if len(text) > 100 else "")
