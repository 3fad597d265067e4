"""What is typed, in words that mean the same to Hydra where it would refuse them as they are."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

OPEN = "hydra.launcher.options"  # a dictionary whose keys no file of conf/ lists


def understood(name: str, arguments: Sequence[str]) -> list[str]:
    """The words of a command as Hydra takes them.

    Hydra sets keys only that are there, and a sweep's configuration before it looks at what is swept. So a key of `OPEN` is
    added, and a key that only the swept choices of groups have is swept, too, with its one value.

    Args:
        name: of the configuration.
        arguments: behind the name of the program.
    """
    words = [f"++{word}" if word.startswith((f"{OPEN}.", f"{OPEN}={{")) else word for word in arguments]
    if {"-m", "--multirun"}.isdisjoint(words):
        return words
    try:
        parsed = {word: OverridesParser.create().parse_override(word) for word in words if not word.startswith("-")}
    except HydraException:  # Hydra says it
        return words
    from twoviews.diagnosis import composed, has
    from twoviews.sweeps.composing import chooses

    plain = {word: one for word, one in parsed.items() if not (chooses(one) or one.is_sweep_override())}
    keys = {word: one for word, one in plain.items() if _sets(one)}
    if not keys or not any(chooses(one) and one.is_sweep_override() for one in parsed.values()):
        return words
    content = composed(name, [word for word, one in parsed.items() if word not in keys and not one.is_sweep_override()])
    absent = {word for word, one in keys.items() if content is not None and not has(content, one.key_or_group)}
    return [f"{parsed[word].key_or_group}=choice({_value(word)})" if word in absent else word for word in words]


def _sets(override: Override) -> bool:
    """Whether it changes a value that has to be there, of a run and not of Hydra."""
    added = override.is_add() or override.is_force_add() or override.is_delete()
    return override.value_type == ValueType.ELEMENT and not added and not override.is_hydra_override()


def _value(word: str) -> str:
    return word.partition("=")[2]
