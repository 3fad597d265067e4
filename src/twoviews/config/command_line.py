"""The words of a command: what Hydra would not report or would refuse, and a sentence for each mistake in them."""

import contextlib
import itertools
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
from twoviews.config.groups import PASSED_BY_PROGRAM, changes_value, chooses, groups, is_group, options, options_with
from twoviews.config.hydra_internals import parse_options
from twoviews.config.recorded import refuse_unsafe
from twoviews.config.values import flat
from twoviews.errors import BadInput, mistakes, nearest, shown
from twoviews.signatures import signature

MULTIRUN_FLAGS = frozenset({"-m", "--multirun"})
_FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd")  # of Hydra's command line
_OPEN_NODE = "hydra.launcher.options"  # a dictionary whose keys no file of conf/ lists
_PLUGINS = ("hydra/launcher", "hydra/sweeper")
_OPTIONAL = ("experiment", "special")  # groups of conf/train.yaml that may have no file: "none"


def check_arguments(name: str, arguments: Sequence[str]) -> None:
    """Refuse what Hydra would ignore silently, or answer with a page of usage or a traceback.

    `name` is that of the command: train, evaluate or cluster.

    Raises:
        BadInput: an option is unknown, a configuration from elsewhere is unsafe, a choice is not in its group, or an
            override sets an empty dictionary.
    """
    flags, unknown = parse_options(arguments)
    for word in unknown:
        key = word.partition("=")[0]
        override = f"{key.lstrip('-').replace('-', '_')}=..."
        raise BadInput(f"there is no option {key}; values have no dashes, {override}, and --help lists them.")
    if flags.config_path is not None or flags.config_name is not None:
        refuse_unsafe(flags.config_path, flags.config_name, arguments)
    for word in arguments:
        key, _, value = word.partition("=")
        if value.strip() == "{}" and not key.startswith("hydra."):
            raise BadInput(
                f"{word} changes nothing, because dictionaries are merged; set single keys of {key} instead."
            )
    if any(wrong_choice(name, override, flags.config_dir) for override in parsed(arguments)[0]):
        raise BadInput(*diagnose(name, arguments))


def hydra_arguments(name: str, arguments: Sequence[str]) -> list[str]:
    """The words of a command as Hydra accepts them.

    Hydra sets only keys that exist, so a key of `_OPEN_NODE` is added with "++". It composes the configuration of a sweep
    without the swept choices, so a key that only these have, such as method.queue_size with method=moco,moco_v3, is itself
    made a sweep over its one value.
    """
    words = [f"++{word}" if word.startswith((f"{_OPEN_NODE}.", f"{_OPEN_NODE}={{")) else word for word in arguments]
    if MULTIRUN_FLAGS.isdisjoint(words):
        return words
    overrides, unreadable = parsed(words)
    single = [override for override in overrides if not override.is_sweep_override()]
    fixed = [override for override in single if changes_value(override)]
    if unreadable or not fixed or not any(chooses(override) for override in overrides if override not in single):
        return words
    content = compose_unresolved(name, [str(override.input_line) for override in single if override not in fixed])
    absent = {override.input_line: override for override in fixed if unknown_override(override, content)}
    return [
        f"{absent[word].key_or_group}=choice({word.partition('=')[2]})" if word in absent else word for word in words
    ]


def diagnose(name: str, arguments: Sequence[str], error: Exception | None = None) -> list[str]:
    """A sentence for each mistake in a command that was refused; the message of Hydra's error where none is recognised.

    Its overrides are examined one by one: choices of files first, then the keys of the composition of the valid choices,
    then its values.
    """
    GlobalHydra.instance().clear()
    overrides, unreadable = parsed(arguments)
    choices = [override for override in overrides if is_group(override.key_or_group)]
    folder = parse_options(arguments)[0].config_dir
    wrong = {choice.input_line: sentence for choice in choices if (sentence := wrong_choice(name, choice, folder))}
    problems = [*wrong.values()]
    # Of a group without a valid choice no key is known.
    unknown = tuple(f"{choice.key_or_group}." for choice in choices if choice.input_line in wrong)
    valid = [choice for choice in choices if choice.input_line not in wrong and not choice.is_sweep_override()]
    chosen = [str(choice.input_line) for choice in valid]
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
    swept = [str(override.input_line) for override in overrides if override.is_sweep_override()]
    if swept and MULTIRUN_FLAGS.isdisjoint(arguments) and not any("hydra.mode" in argument for argument in arguments):
        remedy = "add -m to run each of them, or write a list in brackets, key=[a,b]"
        problems.append(f"{swept[0]} are several values; {remedy}.")
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


def parsed(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides of a command, and the words that cannot be parsed as one."""
    overrides: list[Override] = []
    unreadable = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before in _FLAGS_WITH_VALUE and "=" not in argument):
            continue
        try:
            overrides.append(OverridesParser.create().parse_override(argument))
        except HydraException:
            unreadable.append(argument)
    return overrides, unreadable


def wrong_choice(name: str, override: Override, config_dir: str | None = None) -> str:
    """A sentence for the first value of a choice that is not a file of its group; empty if all are, or if it is no choice.

    Args:
        name: of the command.
        override: of any kind.
        config_dir: of --config-dir, whose files can be chosen, too; launchers and sweepers are those of this project.
    """
    group, value = override.key_or_group, override.value()
    keys = isinstance(value, dict) and (override.is_add() or override.is_force_add())  # of the chosen file
    others = group.startswith("hydra/") and group not in _PLUGINS  # Hydra has files of its own for them
    # A removed group is judged by Hydra and by the checks of values.
    removed = override.is_delete() and value is None and group not in _OPTIONAL
    if not is_group(group) or keys or others or removed or isinstance(value, Glob):
        return ""
    if name != "train" and override.input_line == "data=digits":
        return (
            "data=digits is a whole recipe of train.py; a run's own images need no data=, and others are named with "
            "data=folder or data=array data.root=<images>, data=cifar10 and so on."
        )
    if isinstance(value, Sweep):
        elements = override.sweep_string_iterator() if override.is_choice_sweep() else ()
        value = [OverridesParser.create().parse_override(f"{group}={element}").value() for element in elements]
    files = options(group)
    if config_dir is not None and group not in _PLUGINS:
        files += sorted(path.stem for path in Path(config_dir, group).glob("*.yaml"))
    known = [*(["none"] if group in _OPTIONAL else []), *files]
    lists = [one if isinstance(one, list) else [one] for one in (value if isinstance(value, list) else [value])]
    for choice in itertools.chain(*lists):
        text = choice.text if isinstance(choice, QuotedString) else "null" if choice is None else str(choice)
        if text not in known and text.removesuffix(".yaml") not in files:
            return f"{group}={shown(text)}: there is no such {group}.{nearest(text, known)} Known: {', '.join(known)}."
    return ""


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


def _unreadable(name: str, argument: str, content: Any) -> str:
    """A sentence for a word that is not an override, with the override that was probably meant."""
    if argument in groups():
        return f"'{argument}' is a group; write {argument}=<choice>, with one of: {', '.join(options(argument))}."
    choices = [f"{group}={argument}" for group in groups() if argument in options(group)]
    leaves = {key: value for key, value in flat(content or {}).items() if not key.startswith("hydra.")}
    matching = [key for key in leaves if key == argument] or [key for key in leaves if key.endswith(f".{argument}")]
    keys = [f"{key}={'true' if leaves[key] is False else shown(leaves[key])}" for key in matching]
    places = (argument, f"outputs/{argument}", f"multirun/{argument}")
    is_run = argument == "latest" or any(map(os.path.exists, places))
    runs = [_quoted("run", argument)] if name != "train" and (is_run or "=" not in argument) else []
    if suggestions := " or ".join((choices or keys or runs)[:3]):
        return f"'{shown(argument)}' is not of the form key=value; write {suggestions}."
    return f"'{shown(argument)}' cannot be read as key=value; quote values with spaces or special characters: 'key=\"value\"'."


def _quoted(key: str, value: str) -> str:
    """An override as it is typed in a shell, with the quotes that Hydra needs."""
    plain = re.fullmatch(r"[\w./+:@%?-]+", value)
    return f"{key}={value}" if plain else shlex.quote(f"{key}='{value}'")
