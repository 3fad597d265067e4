"""The words of a command before Hydra sees them: mistakes that it would not report, and overrides that it would refuse."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from twoviews.config.command_line_errors import MULTIRUN_FLAGS, diagnose, unknown_override, wrong_choices
from twoviews.config.composition import compose_unresolved
from twoviews.config.groups import chooses
from twoviews.config.hydra_internals import parse_options
from twoviews.config.recorded import refuse_unsafe
from twoviews.errors import BadInput

OPEN_NODE = "hydra.launcher.options"  # a dictionary whose keys no file of conf/ lists


def check_arguments(name: str, arguments: Sequence[str]) -> None:
    """Refuse what Hydra would ignore without a word, or answer with a page of usage or a traceback.

    Args:
        name: of the command: train, evaluate or cluster.
        arguments: behind the name of the program.

    Raises:
        BadInput: an option is unknown, a configuration from elsewhere is unsafe, a choice is not in its group, or an
            override sets an empty dictionary.
    """
    options, unknown = parse_options(arguments)
    for word in unknown:
        key = word.partition("=")[0]
        override = f"{key.lstrip('-').replace('-', '_')}=..."
        raise BadInput(f"there is no option {key}; values have no dashes, {override}, and --help lists them.")
    if options.config_path is not None or options.config_name is not None:
        refuse_unsafe(options.config_path, options.config_name, arguments)
    for word in arguments:
        key, _, value = word.partition("=")
        if value.strip() == "{}" and not key.startswith("hydra."):
            raise BadInput(
                f"{word} changes nothing, because dictionaries are merged; set single keys of {key} instead."
            )
    if sentence := wrong_choices(arguments):
        raise BadInput(*dict.fromkeys([sentence, *diagnose(name, arguments)]))


def hydra_arguments(name: str, arguments: Sequence[str]) -> list[str]:
    """The words of a command as Hydra accepts them.

    Hydra sets only keys that exist, and composes the configuration of a sweep before it looks at what is swept. So a key
    of `OPEN_NODE` is added with "++", and a key that exists only with swept choices of groups is swept, too, over its one
    value.

    Args:
        name: of the command: train, evaluate or cluster.
        arguments: behind the name of the program.
    """
    words = [f"++{word}" if word.startswith((f"{OPEN_NODE}.", f"{OPEN_NODE}={{")) else word for word in arguments]
    if MULTIRUN_FLAGS.isdisjoint(words):
        return words
    try:
        parsed = {word: OverridesParser.create().parse_override(word) for word in words if not word.startswith("-")}
    except HydraException:  # reported by `diagnose` once Hydra has refused it
        return words
    fixed = {word: override for word, override in parsed.items() if _sets_value(override) and not chooses(override)}
    if not fixed or not any(chooses(override) and override.is_sweep_override() for override in parsed.values()):
        return words
    others = [word for word, override in parsed.items() if word not in fixed and not override.is_sweep_override()]
    content = compose_unresolved(name, others)
    absent = {word for word, override in fixed.items() if unknown_override(override, content)}
    return [
        f"{parsed[word].key_or_group}=choice({word.partition('=')[2]})" if word in absent else word for word in words
    ]


def _sets_value(override: Override) -> bool:
    """Whether an override changes one existing value of the configuration outside Hydra's own node."""
    added = override.is_add() or override.is_force_add() or override.is_delete()
    return override.value_type == ValueType.ELEMENT and not added and not override.is_hydra_override()
