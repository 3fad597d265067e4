"""Files of run folders and sweep folders, which may come from anywhere, read as plain values that can do nothing.

Every config.yaml and every JSON file of such a folder is read by `load`. What it returns names no class but those that
conf/ of this checkout names for the same group, has no interpolation where a configuration is built, is small, and has the
types that `FIELDS` says. `refuse_links` keeps what is read from and written into such a folder inside it.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from twoviews.config.groups import targets
from twoviews.errors import BadInput, system_reason
from twoviews.ranges import Count, NotNegative, Total
from twoviews.signatures import INT_LIMIT, mismatch

LARGEST = {".yaml": 2**18, ".json": 2**25}  # bytes; YAML takes far longer to read
DEPTH = 20  # of dictionaries and lists in each other; those of conf/ have five

_Node = Mapping[str, Any]
_STATISTICS = dict.fromkeys(("mean!", "std!"), Sequence[float])
_ENCODER = {"backbone!": _Node, "channels!": Count, "image_size!": Count, **_STATISTICS}
_TRACKING = {"uri!": str | None, "experiment!": str, "mirror!": bool, "encoder": bool}
_MACHINE = {"gpu": str | None, "host": str, "command": str}
_GROUPS = ("augmentation", "backbone", "data", "method", "optimizer", "protocol", "runtime", "schedule")
# Annotations of what is read from these files, "*" of all other keys; keys that end in "!" must be there.
FIELDS: dict[str, dict[str, Any]] = {
    "config.yaml": {**dict.fromkeys(_GROUPS, _Node), "epochs": Count, "tracking": _TRACKING},
    "result.json": {
        "state!": Literal["finished", "interrupted", "failed"],
        "step": Total,
        "epoch": NotNegative,
        "seconds": NotNegative,
        "reason": str,
        "diverged": bool,
        "precision": str,
        "mlflow_run_id": str | None,
        "*": float,
    },
    "environment.json": {"digest!": str, **dict.fromkeys(("processes", "threads"), Count), **_MACHINE},
    "data.json": {"name!": str, "digest!": str, "images": _Node},
    "encoder.json": _ENCODER,
    "classifier.json": {**_ENCODER, "classes!": Sequence[str]},
    "linear_head.json": {"encoder!": str, "classes!": Sequence[str]},
    "evaluation.json": {"intervals": _Node},
    "clusters.json": {"settings!": _Node, "scores!": _Node},
    "sweep.json": {
        "axes!": {"*": Sequence[Any]},
        "points!": {
            "*": {
                "axes!": _Node,
                "job": str | None,
                "submitted": NotNegative,
                "cancelled": NotNegative,
                "given_up": str,
                "refused": str,
            }
        },
        "launcher!": _Node,
        "commands": Sequence[str],
        "parent!": str | None,
        "parent_key": str,
        "parent_experiment": str,
        "tracking": {"uri!": str | None, "experiment!": str},
    },
    "point.json": {"axes!": _Node, "overrides!": Sequence[str], "choices": _Node, "code": str, "cwd": str},
    "state.json": {
        **dict.fromkeys(("submitted", "step", "starts", "stalled", "checkpoint"), NotNegative),
        **dict.fromkeys(("started", "ended"), NotNegative | None),
        **dict.fromkeys(("job", "node"), str | None),
        "state!": str,
        "reason": str,
    },
}
# What can be done without the file that was written.
REMEDIES = {
    "result.json": "delete it, and the same train.py command goes on from the last checkpoint and writes it again",
    "environment.json": "put the file back that the run wrote, or start over with fresh=true",
    "data.json": "put the file back that the run wrote, or start over with fresh=true",
    "linear_head.json": "delete it, and evaluate.py with protocol=linear writes it again",
    "evaluation.json": "delete it, and evaluate.py writes it again",
    "clusters.json": "delete it, and cluster.py writes it again",
    "sweep.json": "put the file back, or delete it and launch the sweep again, which goes on with its jobs",
    "point.json": "put the file back, or launch the sweep again, which writes it again",
    "state.json": "delete it, and the job counts as one that has not begun",
    "tracking.json": "delete it, and the run is sent to MLflow as a new one",
    "metrics.durable": "delete it, and the next checkpoint writes it again",
}


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


def load(path: Path, needed: bool = False) -> dict[str, Any]:
    """The content of a YAML or JSON file; empty where there is none.

    Raises:
        BadInput: it is too large, damaged, or holds more than plain values; or it is needed and missing.
    """
    content = text(path)
    if content is not None:
        return parse(content, path)
    if needed:
        raise BadInput(f"{path} is missing; {_remedy(path)}.")
    return {}


def check_regular(*paths: Path) -> None:
    """Refuse what would be waited for without end, or never ends itself: pipes, sockets and devices, and links to them.

    Raises:
        BadInput: one of these is there, and no regular file.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is no regular file; it is refused.")


def text(path: Path) -> str | None:
    """What `load` parses; None where there is no file.

    Raises:
        BadInput: it is too large, unreadable, or no text.
    """
    try:
        _refuse_link(path, path.parent)
        check_regular(path)
        if not path.is_file():
            if path.is_symlink():  # to nothing
                raise BadInput(f"{path} is a link to a file that is not there; delete it.")
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
        raise damaged(path, error) from None
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({system_reason(error)}); make it readable, or {_remedy(path)}."
        ) from None


def parse(content: str, path: Path) -> dict[str, Any]:
    """What `load` makes of the text, or of a part of the text, of the file at `path`.

    Raises:
        BadInput: it is damaged, or holds more than plain values.
    """
    try:
        tree = json.loads(content) if path.suffix == ".json" else yaml.load(content, _Loader)  # noqa: S506
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise damaged(path, error) from None
    if not isinstance(tree, dict):
        raise damaged(path, "it holds no keys" if content.strip() else "it is empty")
    for key, value in tree.items():
        wrong = _impure(str(key), value, str(key), path.suffix == ".yaml", DEPTH)
        # Hydra reads config.yaml when a job of a sweep is trained, and would follow these two.
        if key in ("defaults", "hydra") or str(key).startswith("_"):
            wrong = f"it has the key {short(key)}"
        if wrong:
            raise BadInput(
                f"{path} is refused, because {wrong}: the files of a run may come from anywhere, so they hold plain values and "
                "classes that conf/ of this checkout names."
            )
    if wrong := _misfit(tree, FIELDS.get(path.name, {})):
        raise damaged(path, wrong)
    return tree


def damaged(path: Path, why: object) -> BadInput:
    """The sentence for a file that is not what was written."""
    return BadInput(f"{path} cannot be read ({short(why)}); {_remedy(path)}.")


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Prefix BadInput with the file's path."""
    try:
        yield
    except BadInput as error:
        raise error if str(path) in str(error) else BadInput(f"{path}: {error}") from None


def _remedy(path: Path) -> str:
    return REMEDIES.get(path.name, "put the file back that the run wrote")


def _misfit(tree: Mapping[str, Any], fields: Mapping[str, Any], prefix: str = "") -> str:
    """What is missing or of another type than `FIELDS` says, as part of a sentence; empty if nothing is."""
    named = {key.rstrip("!"): kind for key, kind in fields.items()}
    if missing := [key for key in fields if key.endswith("!") and key.rstrip("!") not in tree]:
        return f"{prefix}{missing[0].rstrip('!')} is missing"
    for key, value in tree.items():
        kind = named.get(str(key), named.get("*", Any))
        inner = kind if isinstance(kind, dict) else None
        if wrong := mismatch(value, _Node if inner is not None else kind):
            return f"{prefix}{short(key)}={short(value)} {wrong.partition(';')[0]}"
        if inner is not None and (wrong := _misfit(value, inner, f"{prefix}{short(key)}.")):
            return wrong
    return ""


# ------------------------------------------------------------------------------------------------------------------ links


def refuse_links(folder: Path) -> None:
    """Make sure that what is read or written below a run folder or a sweep folder is not elsewhere.

    Raises:
        BadInput: something in it is a link that leads out of it, or neither a file nor a folder.
    """
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        _refuse_link(Path(entry.path), folder)
                    elif entry.is_dir():
                        waiting.append(Path(entry.path))
                    elif not stat.S_ISREG(entry.stat().st_mode):
                        raise BadInput(f"{entry.path} is no regular file, and none that a run wrote; delete it.")
        except (FileNotFoundError, NotADirectoryError):  # not there yet, or it was replaced meanwhile
            continue
        except OSError as error:
            raise BadInput(
                f"{error.filename or folder} cannot be read ({system_reason(error)}); make it readable."
            ) from None


def _refuse_link(path: Path, folder: Path) -> None:
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise BadInput(
            f"{path} is a link to {path.readlink()}, outside of {folder}: nothing is read or written through it; put a copy "
            "of the file in its place, or delete it."
        )


def _impure(path: str, value: Any, group: str, literal: bool, depth: int) -> str:
    """What keeps a value from being plain, as part of a sentence; empty if nothing does.

    Args:
        path: its dotted key.
        value: of a file.
        group: the key of the file that it is below.
        literal: whether no text may be an interpolation; in any case none of a group may.
        depth: of what may still be inside it.
    """
    literal = literal or bool(targets(group))
    if not depth:
        return f"{path[:60]!r} is nested deeper than {DEPTH} levels"
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, (str, int)):
                return f"{path[:60]!r} has the key {short(key)}"
            if str(key) == "_target_":
                if not isinstance(inner, str) or inner not in targets(group):
                    return f"_target_={short(inner)} is none that {group} can build"
            elif str(key).startswith("_") and str(key).endswith("_"):
                return f"{path[:60]!r} has the key {short(key)}"
            elif wrong := _impure(f"{path}.{key}", inner, group, literal, depth - 1):
                return wrong
        return ""
    if isinstance(value, list):
        return next(filter(None, (_impure(path, item, group, literal, depth - 1) for item in value)), "")
    if isinstance(value, str):
        return f"{path[:60]!r} is the interpolation {short(value)}" if literal and "${" in value else ""
    if isinstance(value, int):
        return f"{path[:60]!r} is out of range" if abs(value) > INT_LIMIT else ""
    return "" if value is None or isinstance(value, float) else f"{path[:60]!r} is a {type(value).__name__}"


def short(value: object) -> str:
    """A value as text on one line of at most 101 characters."""
    text = " ".join(str(value).split())
    return "".join(sign if sign.isprintable() else "?" for sign in text[:100]) + ("…" if len(text) > 100 else "")
