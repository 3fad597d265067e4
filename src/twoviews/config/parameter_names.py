"""Parameters in messages as they are typed on the command line: queue_size=16 of a method is method.queue_size=16.

Classes and functions know their parameters and not the configuration, so their messages name a parameter with "=" behind
it. Who builds and runs them puts the group in front.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from twoviews.config.groups import PASSED_BY_PROGRAM, PLUGIN_KEYS, groups, targets
from twoviews.errors import BadInput
from twoviews.signatures import signature

# A name that nothing dotted precedes, perhaps with keys inside it, and "=": queue_size=, views.global.size=.
_PARAMETER = re.compile(r"(?<![\w.$/:-])([a-z_]\w*)((?:\.[\w<>]+)*=)")
_WITHOUT_PREFIX = ("protocol", "hydra", "experiment", "special")  # groups with several nodes, or with none of their own
_ROOT_KEYS = ("seed", "epochs", "batch_size", "fresh", "preview", "find_batch")
# Root keys of evaluate.py that predict, embed, neighbours and export have as parameters; health.images is none of these.
_SET_BY_ROOT_KEYS = ("images", "format")


def qualify(
    sentence: str, group: str = "", root: Collection[str] = _ROOT_KEYS, keys: Mapping[str, str] | None = None
) -> str:
    """A sentence with the group in front of each parameter.

    Args:
        sentence: of a message.
        group: of the object whose message it is: a parameter of this group is not looked for in others. Other parameters
            are left as they are if several groups have them.
        root: keys of the configuration itself, which are in no group.
        keys: as they are typed, of the parameters of the object itself, see `protocol_keys`; before all others.
    """

    def full(match: re.Match[str]) -> str:
        name, rest = match.groups()
        if keys and name in keys:
            return f"{keys[name]}{rest}"
        if group and name in parameters(group):
            return f"{'hydra.' if group in PLUGIN_KEYS else ''}{group}.{name}{rest}"
        if name in root:
            return match.group()
        others = [other for other in groups() if other not in _WITHOUT_PREFIX and name in parameters(other)]
        return f"{others[0]}.{name}{rest}" if len(others) == 1 else match.group()

    return _PARAMETER.sub(full, sentence)


def protocol_keys(name: str, node: Mapping[str, Any]) -> dict[str, str]:
    """How the parameters of a protocol are typed, by their names: lr is protocol.finetune.lr.

    Args:
        name: of the protocol's node; several files (knn, knn_small) may share it.
        node: its configuration; parameters of a node inside it are those that the protocol itself does not have.
    """
    keys = {key: f"protocol.{name}.{key}" for key in node if key not in ("_target_", *_SET_BY_ROOT_KEYS)}
    for key, value in node.items():
        if isinstance(value, Mapping):
            keys = protocol_keys(f"{name}.{key}", value) | keys
    return keys


@contextmanager
def qualified_errors(
    group: str = "", root: Collection[str] = _ROOT_KEYS, keys: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Pass on BadInput with its messages qualified, and every other exception as it is."""
    try:
        yield
    except BadInput as error:
        error.args = ("\n".join(qualify(message, group, root, keys) for message in error.messages),)
        raise


def parameters(group: str) -> frozenset[str]:
    """Names that a configuration can set in a group, whichever of its files is chosen."""
    names: set[str] = set()
    for target in targets(group):
        with suppress(BadInput):  # of a file that names no class: said when it is chosen, not in messages of others
            names |= signature(target).keys()
    return frozenset(names) - {*PASSED_BY_PROGRAM.get(group, ())}
