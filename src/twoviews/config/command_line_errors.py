"""A sentence for each mistake in a command that was refused."""

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from twoviews.config.checks import absent_key, check, unknown_key, with_group
from twoviews.config.composition import compose, compose_unresolved
from twoviews.config.digest import flat
from twoviews.config.groups import CONF, PASSED_BY_PROGRAM, groups, options, options_with
from twoviews.errors import mistakes, nearest, shown
from twoviews.signatures import signature

MULTIRUN_FLAGS = frozenset({"-m", "--multirun"})
_FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd")  # of Hydra's command line
MAX_NAME_BYTES = 255  # of a file on most file systems
OPTIONAL = ("experiment", "special")  # groups of conf/train.yaml that may have no file: "none"
PLUGINS = ("hydra/launcher", "hydra/sweeper")  # Hydra's own choices of these cannot run the jobs of a sweep


def diagnose(name: str, arguments: Sequence[str], error: Exception | None = None) -> list[str]:
    """A sentence for each mistake in a command that was refused.

    Its overrides are examined one by one: choices of files first, then the keys of the composition of the valid choices,
    then its values.

    Args:
        name: of the command: train, evaluate or cluster.
        arguments: behind the name of the program.
        error: raised by Hydra; its message is the answer if no mistake is recognised.
    """
    GlobalHydra.instance().clear()
    overrides, unreadable = _parsed(arguments)
    choices = [override for override in overrides if (CONF / override.key_or_group).is_dir()]
    sentences = {choice.input_line: _wrong_choice(name, choice) for choice in choices}
    problems = [*filter(None, sentences.values())]
    valid = [choice for choice in choices if not sentences[choice.input_line]]
    # Of a group without a valid choice no key is known.
    unknown = tuple(f"{choice.key_or_group}." for choice in choices if choice not in valid)
    chosen = [str(choice.input_line) for choice in valid if not choice.is_sweep_override()]
    content = compose_unresolved(name, chosen)
    correct = []
    for override in overrides:
        if override in choices or override.key_or_group.startswith(unknown):
            continue
        if sentence := unknown_override(override, content):
            problems.append(sentence)
        elif not override.is_sweep_override():
            correct.append(str(override.input_line))
    problems += [_unreadable(name, word, content) for word in unreadable]
    problems += _sweep_without_multirun(overrides, arguments)
    rest = compose(name, [*chosen, *correct]) if problems else None
    if rest is not None:
        with contextlib.suppress(OmegaConfBaseException):  # where interpolations cannot be resolved
            problems += mistakes(lambda: check(name, rest))
        problems = [problem for problem in problems if not problem.startswith(unknown)]
        typed = any(override.key_or_group == "run" for override in overrides)
        if typed or any("; write run=" in problem for problem in problems):
            problems = [problem for problem in problems if not problem.startswith("run is not set")]
        problems = [*dict.fromkeys(problems)]
    return problems or [" ".join(str(error).split())]


def _parsed(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides of a command, and the words that cannot be parsed as one."""
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


def _sweep_without_multirun(overrides: Sequence[Override], arguments: Sequence[str]) -> list[str]:
    """A sentence if a command has several values for a key and no -m."""
    swept = [str(override.input_line) for override in overrides if override.is_sweep_override()]
    multirun = not MULTIRUN_FLAGS.isdisjoint(arguments) or any("hydra.mode" in argument for argument in arguments)
    if not swept or multirun:
        return []
    return [f"{swept[0]} are several values; add -m to run each of them, or write a list in brackets, key=[a,b]."]


def _unreadable(name: str, argument: str, content: Any) -> str:
    """A sentence for a word that is not an override, with the override that was probably meant."""
    if argument in groups():
        return f"'{argument}' is a group; write {argument}=<choice>, with one of: {', '.join(options(argument))}."
    choices = [f"{group}={argument}" for group in groups() if argument in options(group)]
    leaves = {key: value for key, value in flat(content or {}).items() if not key.startswith("hydra.")}
    matching = [key for key in leaves if key == argument] or [key for key in leaves if key.endswith(f".{argument}")]
    keys = [f"{key}={'true' if leaves[key] is False else shown(leaves[key])}" for key in matching]
    run = [_quoted("run", argument)] if name != "train" and (_is_run(argument) or "=" not in argument) else []
    if suggestions := " or ".join((choices or keys or run)[:3]):
        return f"'{shown(argument)}' is not of the form key=value; write {suggestions}."
    return f"'{shown(argument)}' cannot be read as key=value; quote values with spaces or special characters: 'key=\"value\"'."


def _wrong_choice(name: str, override: Override) -> str:
    if name != "train" and override.input_line == "data=digits":
        return (
            "data=digits is a whole recipe of train.py; a run's own images need no data=, and others are named with "
            "data=folder or data=array data.root=<images>, data=cifar10 and so on."
        )
    return unknown_choice(override)


def _is_run(argument: str) -> bool:
    """Whether `run=` takes this value."""
    places = (Path(argument), *(Path(folder, argument) for folder in ("outputs", "multirun")))
    return argument == "latest" or any(os.path.exists(place) for place in places)  # noqa: PTH110 (of any length)


def _quoted(key: str, value: str) -> str:
    """An override as it is typed in a shell, with the quotes that Hydra needs."""
    plain = re.fullmatch(r"[\w./+:@%?-]+", value)
    return f"{key}={value}" if plain else shlex.quote(f"{key}='{value}'")


def wrong_choices(arguments: Sequence[str]) -> str:
    """A sentence for the first choice that its group does not have, and that Hydra would ignore or not understand.

    Empty if there is none.
    """
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0].partition("@")[0]
        if argument.startswith("-") or "=" not in argument or not (CONF / key).is_dir():
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except HydraException:  # reported by `diagnose` once Hydra has refused it
            continue
        if argument.startswith("+") and isinstance(override.value(), dict):  # keys of the chosen file, not a choice
            continue
        checked = key in (*OPTIONAL, *PLUGINS) or not _names_files(override.value()) or _too_long(override)
        if checked and (sentence := unknown_choice(override)):
            return sentence
    return ""


def _names_files(value: Any) -> bool:
    """Whether Hydra can look for the files that a choice names, existing or not."""
    if isinstance(value, list):
        return all(isinstance(element, (str, QuotedString)) for element in value)
    return value is None or isinstance(value, (str, QuotedString, Sweep, Glob))


def _too_long(override: Override) -> bool:
    """Whether a choice is longer than the name of a file can be, at which Hydra would fail."""
    return any(len(os.fsencode(f"{value}.yaml")) > MAX_NAME_BYTES for value in _values(override))


def unknown_choice(override: Override) -> str:
    """A sentence for the first value of a choice that is not a file of its group; empty if all are."""
    group = override.key_or_group
    choices = [*(["none"] if group in OPTIONAL else []), *options(group)]
    for value in _values(override):
        is_file = not _too_long(override) and (CONF / group / f"{value}.yaml").is_file()
        if not is_file and value not in choices:
            return f"{group}={shown(value)}: there is no such {group}.{nearest(value, choices)} Known: {', '.join(choices)}."
    return ""


def _values(override: Override) -> list[str]:
    """Names of the files that a choice or a sweep over choices names; none for a pattern."""
    value = override.value()
    if isinstance(value, Glob):
        return []
    if isinstance(value, Sweep):
        value = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    values = value if isinstance(value, list) else [value]
    texts = (element.text if isinstance(element, QuotedString) else element for element in values)
    return ["null" if text is None else str(text) for text in texts]


def unknown_override(override: Override, content: Any) -> str:
    """A sentence for the first part of an override's dotted key that the configuration does not have; empty if it has all."""
    if content is None:
        return ""
    prefix = ""
    for part in override.key_or_group.split("."):
        if isinstance(content, list):
            return ""
        if not isinstance(content, dict):
            return f"{prefix.rstrip('.')} is a single value and has no key '{part}'."
        if part not in content:
            return _unknown_part(override, prefix, part, content)
        prefix, content = f"{prefix}{part}.", content[part]
    return ""


def _unknown_part(override: Override, prefix: str, part: str, content: dict[str, Any]) -> str:
    keys = [key for key in content if key != "_target_"]
    if prefix:
        target, passed = str(content.get("_target_")), PASSED_BY_PROGRAM.get(prefix.rstrip("."), ())
        if target.startswith("twoviews.") and part not in passed and part in signature(target):
            return absent_key(prefix, part, target)
        others = [] if nearest(part, keys) else options_with(prefix.rstrip("."), part)
        found = f" It is a key of {prefix.rstrip('.')}={', '.join(others)}." if others else ""
        return unknown_key(prefix, part, keys) + found
    if part in groups():
        chosen = ", ".join(options(part))
        return f"no {part} is chosen here for {override.key_or_group} to change; choose one of: {chosen}."
    value = override.get_value_string() if override.key_or_group == part else None
    keys += [group for group in groups() if group not in content]
    keys = [key for key in keys if key not in ("hydra", "special")]  # both are chosen by files of conf/
    return unknown_key("", part, keys, with_group(part, content, value))
