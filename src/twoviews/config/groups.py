"""The files of conf/: the groups, the options of each, and the classes and functions that they name."""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

ROOT = Path(__file__).resolve().parents[3]  # of the checkout
_PACKAGED = Path(__file__).resolve().parents[1] / "conf"  # of a package that `pip install .` made
CONF = _PACKAGED if _PACKAGED.is_dir() else ROOT / "conf"

# The key of conf/hydra/<kind>/*.yaml that names our class. In a sweeper's, `_target_` names the plugin that Hydra starts.
PLUGIN_KEYS = {"launcher": "_target_", "sweeper": "search"}

# Parameters that the program passes: a configuration must not set them, or its value would be replaced silently.
PASSED_BY_PROGRAM = {
    "backbone": ("channels", "image_size"),
    "augmentation": ("size", "channels", "mean", "std"),
    "method": ("encoder", "labels", "classes"),
    "optimizer": ("param_groups", "batch_size"),
}


def groups() -> list[str]:
    """Names of the config groups, sorted."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


@cache
def is_group(key: str) -> bool:
    """Whether this key, such as method or hydra/launcher, is that of a group."""
    return (CONF / key).is_dir()


def chooses(override: "Override") -> bool:
    """Whether an override is about files of a group, all of which Hydra merges before it sets values."""
    files = is_group(override.key_or_group) and not isinstance(override.value(), dict)
    return override.package is not None or files


def changes_value(override: "Override") -> bool:
    """Whether an override changes one existing value, and chooses, merges, adds or removes nothing."""
    added = override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()
    return not added and not chooses(override) and not isinstance(override.value(), dict)


def options(group: str) -> list[str]:
    """What can be chosen in a group, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def options_with(group: str, key: str) -> list[str]:
    """The options of a group whose files have a key; none for anything that is no group."""
    files, given = sorted((CONF / group).glob("*.yaml")), re.compile(rf"^{re.escape(key)}:", re.MULTILINE)
    return [path.stem for path in files if given.search(path.read_text())]


@cache
def targets(group: str) -> frozenset[str]:
    """The classes and functions, by dotted path, that the files of a group, or of conf/hydra/launcher and sweeper, name."""
    return frozenset().union(*_targets_by_file(group).values())


def files_without(key: str, target: str, group: str) -> list[str]:
    """The files of a group that name this class or function and lack a key, as paths below the root of the checkout."""
    files = [path for path, named in _targets_by_file(group).items() if target in named]
    given = re.compile(rf"^ *{key}:", re.MULTILINE)
    return [f"conf/{path.relative_to(CONF)}" for path in files if not given.search(path.read_text())]


@cache
def _targets_by_file(group: str) -> dict[Path, frozenset[str]]:
    """What each file of a group names; see `targets`."""
    if not re.fullmatch(r"[a-z_]+", group):
        return {}
    folder = CONF / "hydra" / group if group in PLUGIN_KEYS else CONF / group
    named = re.compile(rf"^[^#\n]*\b{PLUGIN_KEYS.get(group, '_target_')}: *([\w.]+)", re.MULTILINE)
    return {path: frozenset(named.findall(path.read_text())) for path in sorted(folder.glob("*.yaml"))}


def group_of(target: str) -> str | None:
    """The group, or "launcher" or "sweeper", one of whose files names this class or function; None if no file does."""
    return next((group for group in (*groups(), *PLUGIN_KEYS) if target in targets(group)), None)
