"""Which jobs a sweep has: every combination of values, pairs, or values drawn at random, each with all seeds.

These are choices of `hydra/sweeper=`, because a sweeper decides what the values mean that are typed in Hydra's grammar:
`0.1,0.2`, `range(1,5)`, `interval(0.1,1)`, `tag(log,interval(…))`.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from twoviews.config.groups import chooses, options
from twoviews.errors import BadInput
from twoviews.ranges import Index, Trials
from twoviews.sweeps.job import SEED
from twoviews.sweeps.launching import SweepCommand, launch_all

SIGNIFICANT_DIGITS = 4  # of drawn numbers: enough for a search, and readable
MAX_REPEATED_DRAWS = 100  # of configs that are known already, in a row, before the space is taken to be used up


@dataclass(frozen=True)
class Interval:
    """The numbers between two limits, which are included."""

    low: float
    high: float
    logarithmic: bool
    whole: bool  # whole numbers only

    def value(self, fraction: float) -> str:
        """The number at a fraction in [0, 1] of the interval, rounded, as it is typed."""
        if self.logarithmic:
            number = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            number = self.low + fraction * (self.high - self.low)
        return self.text(min(self.high, max(self.low, number)))

    def text(self, number: float) -> str:
        """A number as it is typed."""
        if self.whole:
            return str(round(number))
        rounded = float(f"{number:.{SIGNIFICANT_DIGITS}g}")
        return repr(rounded if self.low <= rounded <= self.high else number)


@dataclass(frozen=True)
class SearchSpace:
    """The search space that was typed.

    Args:
        fixed: overrides that all jobs share.
        parameters: the values by swept key, or the interval that contains them; without the seed.
        seeds: seeds of each config; empty for the configured one alone.
    """

    fixed: Sequence[str]
    parameters: Mapping[str, Sequence[str] | Interval]
    seeds: Sequence[str]

    def combinations(self, config: Mapping[str, str]) -> list[list[str]]:
        """The overrides of a config (value by swept key) with each seed."""
        overrides = [*self.fixed, *(f"{key}={value}" for key, value in config.items())]
        return [[*overrides, f"{SEED}={seed}"] for seed in self.seeds] if self.seeds else [overrides]

    def listed(self) -> dict[str, Sequence[str]]:
        """The values by swept key.

        Raises:
            BadInput: a key has an interval.
        """
        listed = {}
        for key, values in self.parameters.items():
            if isinstance(values, Interval):
                raise BadInput(
                    f"{key} is an interval, which cannot be listed; list some values, or use hydra/sweeper=random or optuna."
                )
            listed[key] = values
        return listed


def search_space(arguments: Sequence[str]) -> SearchSpace:
    """The search space that these overrides describe.

    Raises:
        BadInput: a range or an interval is empty, or logarithmic and not above 0, or a key is swept that lies inside of
            another one, or a pattern fits no file of a group.
    """
    fixed, parameters = [], {}
    for override in merged(OverridesParser.create().parse_overrides(list(arguments))):
        key = override.get_key_element()
        if override.is_interval_sweep():
            parameters[key] = _interval(override)
        elif isinstance(pattern := override.value(), Glob):
            parameters[key] = _matching_files(override, pattern)
        elif override.is_sweep_override():
            parameters[key] = list(dict.fromkeys(override.sweep_string_iterator()))
            if not parameters[key]:
                raise BadInput(f"{override.input_line} has no values; write some, as in {key}=1,2 or {key}=range(1,4).")
        else:
            fixed.append(f"{key}={override.get_value_element_as_str()}")
    seeds = parameters.pop(SEED, [])
    if isinstance(seeds, Interval):
        raise BadInput("seed=interval(…): seeds are not searched for; list them, as in seed=0,1,2.")
    return SearchSpace(fixed, parameters, seeds)


def merged(overrides: Sequence[Override]) -> list[Override]:
    """The overrides without those that a later one for the same key replaces.

    Raises:
        BadInput: one is swept, and another one sets a part of it or what it is a part of.
    """
    kept: list[Override] = []
    for override in overrides:
        for earlier in kept:
            outer, inner = sorted((override, earlier), key=lambda each: len(_key(each)))
            swept = override.is_sweep_override() or earlier.is_sweep_override()
            if swept and _key(inner).startswith(f"{_key(outer)}.") and not chooses(outer):
                raise BadInput(
                    f"{earlier.input_line} and {override.input_line} set the same values, and one of them is swept; "
                    "leave the other out."
                )
        kept = [earlier for earlier in kept if not _replaces(override, earlier)]
        kept.append(override)
    return kept


def _replaces(override: Override, earlier: Override) -> bool:
    """Whether an override makes an earlier one void. Hydra merges dictionaries, and + and ~ change the keys themselves."""
    if override.is_sweep_override() or earlier.is_sweep_override():
        return _key(override) == _key(earlier)
    plain = not any(isinstance(each.value(), dict) or each.is_add() or each.is_delete() for each in (override, earlier))
    return plain and override.get_key_element() == earlier.get_key_element()


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _matching_files(override: Override, pattern: Glob) -> list[str]:
    """The files of a group that match a pattern."""
    group = _key(override)
    if not (files := options(group)):
        raise BadInput(f"{override.input_line}: glob chooses files of a group, and {group} is none; list the values.")
    if not (matching := pattern.filter(files)):
        raise BadInput(f"{override.input_line} fits none of the files of {group}: {', '.join(files)}.")
    return matching


def _interval(override: Override) -> Interval:
    value = override.value()
    assert isinstance(value, IntervalSweep) and value.start is not None and value.end is not None
    low, high, logarithmic = value.start, value.end, "log" in value.tags
    if not low < high:
        raise BadInput(f"{override.input_line}: nothing lies between {low} and {high}; write the smaller number first.")
    if logarithmic and low <= 0:
        raise BadInput(f"{override.input_line}: logarithms need numbers above 0, and it begins at {low}.")
    return Interval(low, high, logarithmic, isinstance(low, int) and isinstance(high, int))


class Search(ABC):
    """Decides which jobs a sweep has; the parameters of the constructor are the keys of conf/hydra/sweeper/<name>.yaml."""

    def run(self, command: SweepCommand, arguments: Sequence[str]) -> int:
        """Run the jobs that follow from the overrides and have no result yet, all of them together; returns the exit code.

        Raises:
            BadInput: something is wrong, and nothing was started.
            SystemExit: a signal stopped it.
        """
        return launch_all(command, self.combinations(search_space(arguments)))

    def combinations(self, space: SearchSpace) -> list[list[str]]:
        """The overrides of each job.

        Raises:
            BadInput: the space does not suit this search.
        """
        return [overrides for config in self.configs(space) for overrides in space.combinations(config)]

    @abstractmethod
    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """The configs to try: value by swept key, without the seed."""


class Grid(Search):
    """Every combination of the values."""

    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """Every combination of the listed values, of which the last key changes fastest."""
        values = space.listed()
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))


class Zip(Search):
    """The first values of all keys together, then the second ones."""

    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """One config for each position.

        Raises:
            BadInput: keys have different numbers of values.
        """
        values = space.listed()
        counts = {key: len(listed) for key, listed in values.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{key} has {count}" for key, count in counts.items())
            raise BadInput(
                f"hydra/sweeper=zip takes keys with equal numbers of values, and {shown}; leave some out or add some."
            )
        for combination in zip(*values.values(), strict=True) if values else [()]:
            yield dict(zip(values, combination, strict=True))


@dataclass(frozen=True)
class Random(Search):
    """Configs drawn independently: uniform over a list or an interval, log-uniform over one that is tagged log.

    Args:
        trials: number of configs; fewer if the space has no more.
        draw: seed of the random numbers.
    """

    trials: Trials
    draw: Index

    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """Different configs; more trials begin with the same ones as fewer."""
        source, drawn, repeated = random.Random(self.draw), set(), 0
        while len(drawn) < self.trials and repeated < MAX_REPEATED_DRAWS:
            config = {
                key: values.value(source.random()) if isinstance(values, Interval) else source.choice(values)
                for key, values in space.parameters.items()
            }
            repeated = repeated + 1 if tuple(config.items()) in drawn else 0
            if not repeated:
                drawn.add(tuple(config.items()))
                yield config
