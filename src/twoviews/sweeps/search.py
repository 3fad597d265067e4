"""Which points a sweep has: every combination, pairs, or settings drawn at random; each with all seeds.

These are choices of `hydra/sweeper=` because the values that a key may take are typed in the grammar of Hydra's sweepers,
`0.1,0.2`, `range(1,5)`, `interval(0.1,1)`, `tag(log,interval(…))`, and which of them are meant is what a sweeper decides.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from twoviews.config.groups import options
from twoviews.errors import BadInput
from twoviews.ranges import Index, Trials
from twoviews.sweeps.axes import SEED
from twoviews.sweeps.composing import chooses
from twoviews.sweeps.launching import Launch, launch

DIGITS = 4  # of a number that is drawn: enough for a search, and it can be read
TIRES = 100  # draws of settings that are known already before the space is taken to be used up


@dataclass(frozen=True)
class Interval:
    """The numbers between two, ends included."""

    low: float
    high: float
    logarithmic: bool
    whole: bool  # whole numbers only

    def value(self, share: float) -> str:
        """What stands at this share of the way, 0 to 1, rounded."""
        if self.logarithmic:
            number = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            number = self.low + share * (self.high - self.low)
        return self.text(min(self.high, max(self.low, number)))

    def text(self, number: float) -> str:
        """A number as it is typed."""
        if self.whole:
            return str(round(number))
        rounded = float(f"{number:.{DIGITS}g}")
        return repr(rounded if self.low <= rounded <= self.high else number)


@dataclass(frozen=True)
class Space:
    """What was typed.

    Args:
        fixed: overrides that all points share.
        axes: values, or the interval they lie in, by key; without the seed.
        seeds: of each setting; empty where only the configuration's own is meant.
    """

    fixed: Sequence[str]
    axes: Mapping[str, Sequence[str] | Interval]
    seeds: Sequence[str]

    def points(self, setting: Mapping[str, str]) -> list[list[str]]:
        """The overrides of a setting with each seed."""
        one = [*self.fixed, *(f"{key}={value}" for key, value in setting.items())]
        return [[*one, f"{SEED}={seed}"] for seed in self.seeds] if self.seeds else [one]


def space(arguments: Sequence[str]) -> Space:
    """The space that these overrides describe.

    Raises:
        BadInput: a range or an interval is empty, or logarithmic and not above 0, or a key is swept that lies inside of
            another one, or a pattern fits no file of a group.
    """
    fixed, axes = [], {}
    for one in _lasting(OverridesParser.create().parse_overrides(list(arguments))):
        key = one.get_key_element()
        if one.is_interval_sweep():
            axes[key] = _interval(one)
        elif isinstance(pattern := one.value(), Glob):
            axes[key] = _fitting(one, pattern)
        elif one.is_sweep_override():
            axes[key] = list(dict.fromkeys(one.sweep_string_iterator()))
            if not axes[key]:
                raise BadInput(f"{one.input_line} has no values; write some, as in {key}=1,2 or {key}=range(1,4).")
        else:
            fixed.append(f"{key}={one.get_value_element_as_str()}")
    seeds = axes.pop(SEED, [])
    if isinstance(seeds, Interval):
        raise BadInput("seed=interval(…): seeds are not searched for; list them, as in seed=0,1,2.")
    return Space(fixed, axes, seeds)


def _fitting(override: Override, pattern: Glob) -> list[str]:
    """The files of a group that a pattern fits."""
    group = _key(override)
    if not (known := options(group)):
        raise BadInput(f"{override.input_line}: glob chooses files of a group, and {group} is none; list the values.")
    if not (found := pattern.filter(known)):
        raise BadInput(f"{override.input_line} fits none of the files of {group}: {', '.join(known)}.")
    return found


def _lasting(overrides: Sequence[Override]) -> list[Override]:
    """The overrides, of those of a swept key the last one.

    Raises:
        BadInput: one is swept, and another one sets a part of it or what it is a part of.
    """
    kept: list[Override] = []
    for one in overrides:
        swept = [other for other in kept if one.is_sweep_override() or other.is_sweep_override()]
        kept = [other for other in kept if other not in swept or _key(other) != _key(one)]
        for other in swept:
            outer, inner = sorted((one, other), key=lambda each: len(_key(each)))
            if _key(inner).startswith(f"{_key(outer)}.") and not chooses(outer):
                raise BadInput(
                    f"{other.input_line} and {one.input_line} set the same values, and one of them is swept; leave the other out."
                )
        kept.append(one)
    return kept


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


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
    """Decides which points a sweep has. What the constructor takes are the keys of conf/hydra/sweeper/<name>.yaml."""

    @abstractmethod
    def run(self, order: Launch, arguments: Sequence[str]) -> int:
        """Start what is missing of the points that follow from what was typed; the exit code.

        Raises:
            BadInput: something is not right; nothing was started.
            SystemExit: a signal stopped it.
        """


class Listed(Search):
    """A search whose points are all known beforehand."""

    def run(self, order: Launch, arguments: Sequence[str]) -> int:
        """All of them are launched together."""
        return launch(order, self.combinations(space(arguments)))

    def combinations(self, space: Space) -> list[list[str]]:
        """The overrides of each point.

        Raises:
            BadInput: the space does not fit this search.
        """
        points = [space.points(setting) for setting in self.settings(space)]
        return list(itertools.chain.from_iterable(points))

    @abstractmethod
    def settings(self, space: Space) -> Iterator[dict[str, str]]:
        """The settings of the axes but the seed."""


def _values(space: Space) -> dict[str, Sequence[str]]:
    """The values of each axis.

    Raises:
        BadInput: an axis is an interval.
    """
    listed = {key: values for key, values in space.axes.items() if not isinstance(values, Interval)}
    for key in space.axes:
        if key not in listed:
            raise BadInput(
                f"{key} is an interval, which has no end of values; list some, or use hydra/sweeper=random or optuna."
            )
    return listed


class Grid(Listed):
    """Every combination of the values."""

    def settings(self, space: Space) -> Iterator[dict[str, str]]:
        """The last key changes fastest."""
        values = _values(space)
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))


class Zip(Listed):
    """The first values of all keys together, then the second ones."""

    def settings(self, space: Space) -> Iterator[dict[str, str]]:
        """As many as each key has values.

        Raises:
            BadInput: keys have different numbers of values.
        """
        values = _values(space)
        counts = {key: len(some) for key, some in values.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{key} has {count}" for key, count in counts.items())
            raise BadInput(
                f"hydra/sweeper=zip takes keys with as many values each, and {listed}; leave some out or add some."
            )
        for combination in zip(*values.values(), strict=True) if values else [()]:
            yield dict(zip(values, combination, strict=True))


class Random(Listed):
    """Settings drawn independently: values of a list evenly, an interval evenly or, tagged log, in its logarithm.

    Args:
        trials: how many; fewer where the space has no more.
        draw: another number draws other settings.
    """

    def __init__(self, trials: Trials, draw: Index):
        self.trials, self.draw = trials, draw

    def settings(self, space: Space) -> Iterator[dict[str, str]]:
        """Different ones; a larger number of trials begins with those of a smaller one."""
        source, known, again = random.Random(self.draw), set(), 0
        while len(known) < self.trials and again < TIRES:
            setting = {
                key: values.value(source.random()) if isinstance(values, Interval) else source.choice(values)
                for key, values in space.axes.items()
            }
            again = again + 1 if (drawn := tuple(setting.items())) in known else 0
            if not again:
                known.add(drawn)
                yield setting
