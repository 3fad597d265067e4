"""A sentence for each mistake in a command that was refused."""

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config import CONF, check, elsewhere, flat, groups, options, unknown_key
from twoviews.errors import mistakes, nearest, shown

_FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd")  # of Hydra's command line
OPTIONAL = ("experiment", "special")  # groups of conf/train.yaml that may have no file
PLUGINS = (
    "hydra/launcher",
    "hydra/sweeper",
)  # of which Hydra has files of its own, which do not run the jobs of a sweep


def diagnose(name: str, arguments: list[str], error: Exception | None = None) -> list[str]:
    """A sentence for each mistake in a command that was refused, found by going through its overrides one by one.

    Args:
        name: of the command.
        arguments: its own.
        error: what Hydra says, for mistakes that are not found.
    """
    GlobalHydra.instance().clear()
    overrides, unreadable = _parsed(arguments)
    choices = [one for one in overrides if (CONF / one.key_or_group).is_dir()]
    wrong_choices = {one.input_line: _wrong_choice(name, one) for one in choices}
    problems = [*filter(None, wrong_choices.values())]
    # Of these groups no key is known.
    guessed = tuple(f"{one.key_or_group}." for one in choices if wrong_choices[one.input_line])
    right = [
        str(one.input_line) for one in choices if not wrong_choices[one.input_line] and not one.is_sweep_override()
    ]
    cfg = _compose(name, right)
    content = None if cfg is None else OmegaConf.to_container(cfg, resolve=False)
    values = [one for one in overrides if one not in choices and not one.key_or_group.startswith(guessed)]
    known = []
    for one in values:
        if sentence := _unknown_override(one, content):
            problems.append(sentence)
        elif not one.is_sweep_override():
            known.append(str(one.input_line))
    problems += [_unreadable(name, word, content) for word in unreadable]
    swept = [str(one.input_line) for one in overrides if one.is_sweep_override()]
    multirun = {"-m", "--multirun"} & {*arguments} or any("hydra.mode" in one for one in arguments)
    if swept and not multirun:
        problems.append(
            f"{swept[0]} are several values; add -m to run each of them, or write a list in brackets, key=[a,b]."
        )
    rest = _compose(name, [*right, *known]) if problems else None
    if rest is not None:
        problems += mistakes(lambda: _check(name, rest))
        ours = [one for one in problems if not one.startswith(guessed)]
        if any("; write run=" in one for one in problems):
            ours = [one for one in ours if not one.startswith("run is not set")]
        problems = [*dict.fromkeys(ours)]
    return problems or [" ".join(str(error).split())]


def _parsed(arguments: list[str]) -> tuple[list[Override], list[str]]:
    """The overrides of a command, and the words that are none."""
    overrides: list[Override] = []
    unreadable = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before in _FLAGS_WITH_VALUE and "=" not in argument):
            continue
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            unreadable.append(argument)
    return overrides, unreadable


def _unreadable(name: str, argument: str, content: Any) -> str:
    """A sentence for a word of the command line that is no override, with the text that was probably meant."""
    groups_of = [f"{group}={argument}" for group in groups() if argument in options(group)]
    leaves = flat(content or {})
    known = [key for key in leaves if key == argument] or [key for key in leaves if key.endswith(f".{argument}")]
    keys = [f"{key}={'true' if leaves[key] is False else shown(leaves[key])}" for key in known]
    run = [_typed("run", argument)] if name != "train" and (_is_run(argument) or "=" not in argument) else []
    if meant := " or ".join((groups_of or keys or run)[:3]):
        return f"'{shown(argument)}' is no key=value; write {meant}."
    return f"'{shown(argument)}' cannot be read as key=value; quote values with spaces or special characters: 'key=\"value\"'."


def _wrong_choice(name: str, override: Override) -> str:
    if name != "train" and override.input_line == "data=digits":
        return (
            "data=digits is a whole recipe of train.py; a run's own images need no data=, and others are named with "
            "data=folder or data=array data.root=<images>, data=cifar10 and so on."
        )
    return unknown_choice(override)


def _is_run(argument: str) -> bool:
    """Whether it is what `run=` takes."""
    places = (Path(argument), *(Path(folder, argument) for folder in ("outputs", "multirun")))
    return argument == "latest" or any(os.path.exists(place) for place in places)  # noqa: PTH110 (of any length)


def _typed(key: str, value: str) -> str:
    """An override as it is typed in a shell, with the quotes that Hydra wants."""
    plain = re.fullmatch(r"[\w./+:@%?-]+", value)
    return f"{key}={value}" if plain else shlex.quote(f"{key}='{value}'")


def unknown_choices(arguments: list[str]) -> str:
    """A sentence for a choice that a group does not have, and that Hydra leaves out or falls over; empty if there is none."""
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0].partition("@")[0]
        if argument.startswith("-") or "=" not in argument or not (CONF / key).is_dir():
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except HydraException:  # Hydra says it
            continue
        if argument.startswith("+") and isinstance(override.value(), dict):  # keys of the chosen file, not a choice
            continue
        if (key in (*OPTIONAL, *PLUGINS) or not _names_files(override.value())) and (
            sentence := unknown_choice(override)
        ):
            return sentence
    return ""


def _names_files(value: Any) -> bool:
    """Whether Hydra can look for the files that a choice names; whether they are there is another question."""
    if isinstance(value, list):
        return all(isinstance(one, (str, QuotedString)) for one in value)
    return value is None or isinstance(value, (str, QuotedString, Sweep, Glob))


def unknown_choice(override: Override) -> str:
    """A sentence for a value that is no file of its group; empty if all are."""
    group, known = override.key_or_group, options(override.key_or_group)
    for value in _values(override):
        if not (CONF / group / f"{value}.yaml").is_file() and not (value == "null" and group in OPTIONAL):
            return f"{group}={value}: there is no such {group}.{nearest(value, known)} Known: {', '.join(known)}."
    return ""


def composed(name: str, choices: list[str]) -> Any:
    """The configuration with these overrides, unresolved; None if Hydra refuses them."""
    cfg = _compose(name, choices)
    return None if cfg is None else OmegaConf.to_container(cfg, resolve=False)


def _compose(name: str, choices: list[str]) -> DictConfig | None:
    """With Hydra's own node."""
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return hydra.compose(name, choices, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None


def has(content: Any, key: str) -> bool:
    """Whether a configuration has a dotted key."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return isinstance(content, list)
        content = content[part]
    return True


def _check(name: str, cfg: DictConfig) -> None:
    """Compare what can be resolved with the signatures."""
    with contextlib.suppress(OmegaConfBaseException):
        check(name, OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))


def _values(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, Glob):
        return []
    if isinstance(value, Sweep):
        value = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    values = value if isinstance(value, list) else [value]
    return [one.text if isinstance(one, QuotedString) else "null" if one is None else str(one) for one in values]


def _unknown_override(override: Override, content: Any) -> str:
    """The first part of a dotted key that the composed configuration does not have."""
    if content is None:
        return ""
    prefix = ""
    for part in override.key_or_group.split("."):
        if isinstance(content, list):
            return ""
        if not isinstance(content, dict):
            return f"{prefix.rstrip('.')} is a single value and has no key '{part}'."
        if part not in content:
            known = [key for key in content if key != "_target_"]
            if not prefix:
                if part in groups():
                    chosen = ", ".join(options(part))
                    return f"no {part} is chosen here for {override.key_or_group} to change; choose one of: {chosen}."
                known = [key for key in known if key != "hydra"] + [one for one in groups() if one not in content]
                typed = override.get_value_string() if override.key_or_group == part else None
                return unknown_key("", part, known, elsewhere(part, content, typed))
            return unknown_key(prefix, part, known)
        prefix, content = f"{prefix}{part}.", content[part]
    return ""
