"""The configurations of many points, at some milliseconds each.

Hydra composes a configuration in some tenths of a second, nearly all of them for choosing and merging files. Points of a
sweep that choose the same files share that; what is left is what Hydra does last, setting the values one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config.groups import CONF


@dataclass
class _Chosen:
    """What points share that choose the same files and set the same keys; each sets them all, so nothing of one is left.

    Args:
        cfg: with the values of the last point.
        content: the same, resolved.
        groups: the file that each group has, without Hydra's own groups and those that have several; empty if `compose`
            leaves out Hydra's node.
        linked: nodes with interpolations, whose values may change with any other.
        values: the overrides of the last point, by key.
    """

    cfg: DictConfig
    content: dict[str, Any]
    groups: dict[str, Any]
    linked: set[str]
    values: dict[str, Override] = field(default_factory=dict)

    def set(self, override: Override) -> None:
        """As Hydra does it."""
        key, value = override.key_or_group, override.value()
        OmegaConf.update(self.cfg, key, value, merge=True)
        self.values[key] = override
        if _linked(value):
            self.linked.add(_node(key))


class Composer:
    """Resolved configurations, without Hydra's own node, by their overrides.

    Args:
        compose: Hydra's way from the overrides of a point to its configuration.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig]):
        self._compose = compose
        self._parsed: dict[str, Override] = {}
        self._texts: dict[str, str] = {}  # by repr, which tells 1 from 1.0 and true
        self._chosen: dict[tuple[tuple[str, ...], frozenset[str]], _Chosen] = {}

    def __call__(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved configuration of a point, to be read only: points share what they have in common.

        Raises:
            HydraException, OmegaConfBaseException: Hydra refuses an override.
        """
        choices, values = self._parted(overrides)
        kept = choices, frozenset(one.key_or_group for one in values)
        chosen = self._chosen.get(kept) or self._choose(choices)
        new = [one for one in values if chosen.values.get(one.key_or_group) is not one]
        try:
            for one in new:
                chosen.set(one)
        except OmegaConfBaseException:
            self._chosen.pop(kept, None)
            self._compose(list(overrides))  # says it in Hydra's words
            raise
        nodes = {_node(one.key_or_group) for one in new} | chosen.linked
        chosen.content = {**chosen.content, **{node: _resolved(chosen.cfg, node) for node in nodes}}
        self._chosen[kept] = chosen
        return chosen.content

    def choices(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The file that each group has in the configuration of a point that was composed before."""
        choices, values = self._parted(overrides)
        return self._chosen[choices, frozenset(one.key_or_group for one in values)].groups

    def _parted(self, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[Override]]:
        """What chooses files or has to be left to Hydra, and what only sets values."""
        parsed = [self.parse(override) for override in overrides]
        values = [one for one in parsed if _sets_a_value(one) and not _touches(one, parsed)]
        return tuple(one.input_line or "" for one in parsed if one not in values), values

    def _choose(self, choices: Sequence[str]) -> _Chosen:
        whole = self._compose(list(choices))
        cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        OmegaConf.set_struct(cfg, True)  # which the copy does not take over: unknown keys are refused
        raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
        linked = {node for node, value in raw.items() if _linked(value)}
        content = {node: None if node in linked else value for node, value in raw.items()}
        chosen = cast(dict[str, Any], OmegaConf.select(whole, "hydra.runtime.choices") or {})
        groups = {key: file for key, file in chosen.items() if _is_group(key) and not key.startswith("hydra/")}
        return _Chosen(cfg, content, groups, linked)

    def text(self, content: Mapping[str, Any]) -> str:
        """A configuration as YAML that OmegaConf reads back; the text of a node that several points have is made once."""
        nodes = [{key: value} for key, value in content.items()]
        for node in nodes:
            if repr(node) not in self._texts:
                self._texts[repr(node)] = OmegaConf.to_yaml(OmegaConf.create(node))
        return "".join(self._texts[repr(node)] for node in nodes)

    def parse(self, override: str) -> Override:
        """What Hydra's grammar makes of an override."""
        if override not in self._parsed:
            self._parsed[override] = OverridesParser.create().parse_override(override)
        return self._parsed[override]


def _sets_a_value(override: Override) -> bool:
    """Whether it changes a value that is there already, and chooses, adds or removes nothing."""
    plain = not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override())
    return plain and not chooses(override) and not isinstance(override.value(), dict)


def _touches(override: Override, others: Sequence[Override]) -> bool:
    """Whether the order of it and another one matters, because one sets a part of what the other sets."""
    path = f"{override.key_or_group}."
    paths = [f"{other.key_or_group}." for other in others if other is not override and not chooses(other)]
    return any(path.startswith(other) or other.startswith(path) for other in paths)


def chooses(override: Override) -> bool:
    """Whether it is about a file of a group: Hydra merges all of these before it sets a value."""
    files = _is_group(override.key_or_group) and not isinstance(override.value(), dict)
    return override.package is not None or files


@cache
def _is_group(key: str) -> bool:
    return (CONF / key).is_dir()


def _node(key: str) -> str:
    return key.partition(".")[0].partition("[")[0]


def _resolved(cfg: DictConfig, node: str) -> Any:
    value = cfg[node]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _linked(value: Any) -> bool:
    """Whether there is an interpolation in it."""
    if isinstance(value, (dict, list)):
        return any(_linked(one) for one in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "${" in value
