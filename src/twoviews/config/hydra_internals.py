"""Private parts of Hydra, all that this project uses; tests/config/test_hydra_internals.py fails when a release moves them.

Why each: Hydra has no public way to parse its own options without running a job, none to start faster, none to leave
lines out of what --help shows, and none to learn which options of a group were chosen, where several can be.
"""

import argparse
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

_get_help = Hydra.get_help


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's options of a command line, and the words that look like options and are not Hydra's.

    Raises:
        SystemExit: argparse refuses the words, which it has explained on standard error.
    """
    options, rest = get_args_parser().parse_known_args(list(arguments))
    return options, [word for word in (*rest, *options.overrides) if word.startswith("-")]


def start_faster(arguments: Sequence[str]) -> None:
    """Leave out two steps of Hydra's start whose results this project does not use; they take as long as all others.

    Hydra composes the configuration a first time only to read `hydra.mode`, which no file of conf/ sets and -m sets without
    that. For --help it lists the files of all groups, its own included, where the templates in conf/hydra/help list ours.
    """
    if not any("hydra.mode" in argument for argument in arguments):
        Hydra.get_mode = lambda *_, **__: None
    if "--hydra-help" not in arguments:
        Hydra.format_config_groups = lambda *_, **__: ""


def hide_classes() -> None:
    """Leave the classes that the program builds out of what --help shows: they are not for users to choose."""

    def without_classes(self: Hydra, *arguments: Any, **more: Any) -> str:
        return re.sub(r"^ *_target_: .*\n", "", _get_help(self, *arguments, **more), flags=re.MULTILINE)

    Hydra.get_help = without_classes


def chosen(node: DictConfig, group: str) -> set[str]:
    """The options of a group that a command takes, by default or as typed.

    `hydra.runtime.choices` has no group of which several can be chosen.

    Args:
        node: `hydra` of the composed configuration.
        group: its name, such as protocol.
    """
    words = (*node.overrides.hydra, *node.overrides.task)
    defaults = _defaults(GlobalHydra.instance().config_loader(), node.job.config_name, words)
    paths = [path.partition("/") for path, parent in defaults if not parent.startswith(f"{group}/")]
    return {name for first, _, name in paths if first == group}


@cache
def _defaults(loader: ConfigLoader, name: str, words: tuple[str, ...]) -> list[tuple[str, str]]:
    """The files that a configuration is composed of, each with the file that chooses it; some hundredths of a second."""
    defaults = loader.compute_defaults_list(name, list(words), RunMode.RUN).defaults
    return [(default.config_path or "", default.parent or "") for default in defaults]
