"""The configurations of many points, at some milliseconds each.

Hydra composes a configuration in some tenths of a second, nearly all of them for choosing and merging files. Points of a
sweep that choose the same files share that; what is left is what Hydra does last, setting the values one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config import CONF


class Composer:
    """Resolved configurations, without Hydra's own node, by their overrides.

    Args:
        compose: Hydra's way from the overrides of a point to its configuration.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig]):
        self._compose = compose
        self._parsed: dict[str, Override] = {}
        # By the overrides that choose files, and the keys of those that set values: each point sets all of them, so
        # nothing of the point before it is left.
        self._composed: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved configuration of a point.

        Raises:
            HydraException, OmegaConfBaseException: Hydra refuses an override.
        """
        parsed = [self.parse(override) for override in overrides]
        values = [one for one in parsed if _sets_a_value(one) and not _touches(one, parsed)]
        choices = tuple(one.input_line or "" for one in parsed if one not in values)
        kept = choices, tuple(one.key_or_group for one in values)
        if kept not in self._composed:
            whole = self._compose(list(choices))
            self._composed[kept] = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        cfg = self._composed[kept]
        try:
            for one in values:
                OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)  # as Hydra does it
        except OmegaConfBaseException:
            del self._composed[kept]
            self._compose(list(overrides))  # to say it in Hydra's words
            raise
        return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))

    def parse(self, override: str) -> Override:
        """What Hydra's grammar makes of an override."""
        if override not in self._parsed:
            self._parsed[override] = OverridesParser.create().parse_override(override)
        return self._parsed[override]


def _sets_a_value(override: Override) -> bool:
    """Whether it changes a value that is there already, and chooses, adds or removes nothing."""
    plain = not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override())
    return plain and not _chooses(override) and not isinstance(override.value(), dict)


def _touches(override: Override, others: Sequence[Override]) -> bool:
    """Whether the order of it and another one matters, because one sets a part of what the other sets."""
    path = f"{override.key_or_group}."
    paths = [f"{other.key_or_group}." for other in others if other is not override and not _chooses(other)]
    return any(path.startswith(other) or other.startswith(path) for other in paths)


def _chooses(override: Override) -> bool:
    """Whether it is about a file of a group: Hydra merges all of these before it sets a value."""
    return override.package is not None or (CONF / override.key_or_group).is_dir()
