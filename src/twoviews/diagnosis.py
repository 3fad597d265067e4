"""One sentence for a command that Hydra refused."""

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
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config import CONF, groups, options, unknown_key
from twoviews.errors import nearest

_FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd")  # of Hydra's command line
OPTIONAL = ("experiment", "special")  # groups of conf/train.yaml that may have no file


def diagnose(name: str, arguments: list[str], error: Exception) -> str:
    """One sentence for a command that Hydra refused, found by going through its overrides one by one."""
    GlobalHydra.instance().clear()
    overrides: list[Override] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before in _FLAGS_WITH_VALUE and "=" not in argument):
            continue
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            if meant := " or ".join(f"{group}={argument}" for group in groups() if argument in options(group)):
                return f"'{argument}' is no key=value; write {meant}."
            if name != "train" and _is_run(argument):
                return f"'{argument}' is no key=value; write {_typed('run', argument)}."
            return f"'{argument}' cannot be read as key=value; quote values with spaces or special characters: 'key=\"value\"'."
    choices = []
    for override in overrides:
        group = override.key_or_group
        if (CONF / group).is_dir():
            choices.append(override.input_line)
            if name != "train" and override.input_line == "data=digits":
                return (
                    "data=digits is a whole recipe of train.py; a run's own images need no data=, and others are named with "
                    "data=folder or data=array data.root=<images>, data=cifar10 and so on."
                )
            if sentence := unknown_choice(override):
                return sentence
    known_content = _compose(name, [choice for choice in choices if "," not in choice])
    for override in overrides:
        sentence = "" if override.input_line in choices else _unknown_override(override, known_content)
        if sentence:
            return sentence
    several = [one.input_line for one in overrides if one.is_sweep_override()]
    if several and not {"-m", "--multirun"} & {*arguments} and not any("hydra.mode" in one for one in arguments):
        return f"{several[0]} are several values; add -m to run each of them, or write a list in brackets, key=[a,b]."
    return " ".join(str(error).split())


def _is_run(argument: str) -> bool:
    """Whether it is what `run=` takes."""
    places = (Path(argument), *(Path(folder, argument) for folder in ("outputs", "multirun")))
    return argument == "latest" or any(os.path.exists(place) for place in places)  # noqa: PTH110 (of any length)


def _typed(key: str, value: str) -> str:
    """An override as it is typed in a shell, with the quotes that Hydra wants."""
    plain = re.fullmatch(r"[\w./+:@%?-]+", value)
    return f"{key}={value}" if plain else shlex.quote(f"{key}='{value}'")


def unknown_choices(arguments: list[str]) -> str:
    """A sentence for a choice that a group does not have, of the groups that Hydra leaves out then; empty if there is none."""
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0].partition("@")[0]
        if key in OPTIONAL:
            try:
                (override,) = OverridesParser.create().parse_overrides([argument])
            except HydraException:  # Hydra says it
                continue
            if sentence := unknown_choice(override):
                return sentence
    return ""


def unknown_choice(override: Override) -> str:
    """A sentence for a value that is no file of its group; empty if all are."""
    group, known = override.key_or_group, options(override.key_or_group)
    for value in _values(override):
        if not (CONF / group / f"{value}.yaml").is_file() and not (value == "null" and group in OPTIONAL):
            return f"{group}={value}: there is no such {group}.{nearest(value, known)} Known: {', '.join(known)}."
    return ""


def _compose(name: str, choices: list[str]) -> Any:
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return OmegaConf.to_container(hydra.compose(name, choices), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return None


def _values(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, Sweep):
        value = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    values = value if isinstance(value, list) else [value]
    known = [one for one in values if not isinstance(one, Glob)]
    return [one.text if isinstance(one, QuotedString) else "null" if one is None else str(one) for one in known]


def _unknown_override(override: Override, content: Any) -> str:
    """The first part of a dotted key that the composed configuration does not have."""
    if content is None or override.key_or_group.startswith("hydra"):
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
                known += [group for group in groups() if group not in (*content, "hydra")]
            return unknown_key(prefix, part, known)
        prefix, content = f"{prefix}{part}.", content[part]
    return ""
