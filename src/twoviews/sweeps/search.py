"""Which jobs a sweep has: every combination of values, pairs, or values drawn at random, each with all seeds.

These are choices of `hydra/sweeper=`, because a sweeper decides what the values mean that are typed in Hydra's grammar:
`0.1,0.2`, `range(1,5)`, `interval(0.1,1)`, `tag(log,interval(…))`.
"""

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType

from twoviews.config.groups import chooses, options
from twoviews.errors import BadInput
from twoviews.ranges import NonNegativeInt, Trials
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
            number = self.low * (self.high / self.low) ** fraction
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
    """The search space that was typed."""

    fixed: Sequence[str]  # overrides that all jobs share
    parameters: Mapping[str, Sequence[str] | Interval]  # the values by swept key, or their interval; without the seed
    seeds: Sequence[str]  # of each config; empty for the configured one alone

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
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif isinstance(value, IntervalSweep):
            parameters[key] = _interval(str(override.input_line), value)
        elif isinstance(value, Glob):
            files = options(_key(override))
            if not files:
                why = f"glob chooses files of a group, and {_key(override)} is none; list the values."
                raise BadInput(f"{override.input_line}: {why}")
            parameters[key] = value.filter(files)
            if not parameters[key]:
                raise BadInput(f"{override.input_line} fits none of the files of {_key(override)}: {', '.join(files)}.")
        else:
            parameters[key] = list(dict.fromkeys(override.sweep_string_iterator()))
            if not parameters[key]:
                raise BadInput(f"{override.input_line} has no values; write some, as in {key}=1,2 or {key}=range(1,4).")
    seeds = parameters.pop(SEED, [])
    if isinstance(seeds, Interval):
        raise BadInput("seed=interval(…): seeds are not searched for; list them, as in seed=0,1,2.")
    return SearchSpace(fixed, parameters, seeds)


def _interval(typed: str, value: IntervalSweep) -> Interval:
    low, high, logarithmic = value.start, value.end, "log" in value.tags
    assert low is not None and high is not None
    if not low < high:
        raise BadInput(f"{typed}: nothing lies between {low} and {high}; write the smaller number first.")
    if logarithmic and low <= 0:
        raise BadInput(f"{typed}: logarithms need numbers above 0, and it begins at {low}.")
    return Interval(low, high, logarithmic, isinstance(low, int) and isinstance(high, int))


def merged(overrides: Sequence[Override]) -> list[Override]:
    """The overrides without those that a later one for the same key replaces.

    Of two fixed ones that is so unless they are merged, as dictionaries are, or one adds or removes the key.

    Raises:
        BadInput: one is swept, and another one sets a part of it or what it is a part of.
    """
    kept: list[Override] = []
    for override in overrides:
        for earlier in [*kept]:
            outer, inner = sorted((override, earlier), key=lambda each: len(_key(each)))
            swept = override.is_sweep_override() or earlier.is_sweep_override()
            if swept and _key(inner).startswith(f"{_key(outer)}.") and not chooses(outer):
                raise BadInput(
                    f"{earlier.input_line} and {override.input_line} set the same values, and one of them is swept; "
                    "leave the other out."
                )
            if _key(outer) == _key(inner) and (swept or (_sets_value(outer) and _sets_value(inner))):
                kept.remove(earlier)
        kept.append(override)
    return kept


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _sets_value(override: Override) -> bool:
    return override.type == OverrideType.CHANGE and not isinstance(override.value(), dict)


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
        if len({len(listed) for listed in values.values()}) > 1:
            shown = ", ".join(f"{key} has {len(listed)}" for key, listed in values.items())
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
    draw: NonNegativeInt

    def configs(self, space: SearchSpace) -> Iterator[dict[str, str]]:
        """Different configs; more trials begin with the same ones as fewer."""
        source, drawn, repeated = random.Random(self.draw), set(), 0
        while len(drawn) < self.trials and repeated < MAX_REPEATED_DRAWS:
            config = {
                key: values.value(source.random()) if isinstance(values, Interval) else source.choice(values)
                for key, values in space.parameters.items()
            }
            repeated += 1
            if tuple(config.values()) not in drawn:
                repeated = 0
                drawn.add(tuple(config.values()))
                yield config
