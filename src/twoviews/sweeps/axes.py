"""In what the points of a sweep differ: in what was swept, and in what else two launches of it had different.

A sweep may be launched again with other keys swept or other values fixed, to compare on purpose. A point then has a value
for what only others swept, and what was fixed for each launch tells points of different launches apart.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.sweeps.folder import Point
from twoviews.sweeps.words import typed

SEED = "seed"


def told_apart(points: Sequence[Point]) -> list[Point]:
    """The points with the value of every key in which they differ among their axes, also where it was not swept.

    What was typed for all points of a launch is an axis if points differ in it. Anything else, such as a default that was
    another one then, is an axis only if it tells settings apart that would be taken for the same without it. A key that is
    not in the configuration of a point is not among its axes either.
    """
    known = {point.digest: point.description for point in points}
    if len({_launch(point, known[point.digest]) for point in points}) < 2:
        return list(points)  # they differ in what was swept alone, and no configuration has to be read
    if not all("choices" in description for description in known.values()):  # of points from before these were recorded
        known = {digest: {**description, "choices": {}} for digest, description in known.items()}
    by_point = {point.digest: _values(point, known[point.digest]) for point in points}
    values = [*by_point.values()]
    axes = [*dict.fromkeys(key for point in points for key in point.axes)]
    fixed = dict.fromkeys(_key(one) for description in known.values() for one in description.get("overrides", ()))
    axes += [
        key for key in (*fixed, SEED) if key not in axes and len({typed(one, key) for one in values if key in one}) > 1
    ]
    groups = dict.fromkeys(group for description in known.values() for group in _choices(description))
    for key in dict.fromkeys([*groups, *(key for one in values for key in one)]):
        if key not in axes and _tells_apart(key, values, [axis for axis in axes if axis != SEED]):
            axes.append(key)
    return [
        replace(point, axes={key: own[key] for key in axes if key in (own := by_point[point.digest])})
        for point in points
    ]


def _launch(point: Point, description: Mapping[str, Any]) -> tuple[object, ...]:
    """The same for points whose configurations differ in the values of the axes alone."""
    fixed = [one for one in description.get("overrides", ()) if _key(one) not in point.axes]
    return tuple(point.axes), tuple(fixed), description.get("code")


def _values(point: Point, description: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that can change the result of a point, by dotted key or group."""
    path = point.folder / "config.yaml"
    # A node of the configuration is at the left margin; most are the same in all points.
    nodes = re.split(r"\n(?=\w)", foreign.text(path) or "{}")
    try:
        found = {key: value for node in nodes for key, value in _leaves(node).items()}
    except BadInput:
        foreign.load(path)  # which says the same with the name of the file
        raise
    return {**found, **_choices(description), **point.axes}


def _choices(description: Mapping[str, Any]) -> dict[str, Any]:
    return {group: choice for group, choice in description.get("choices", {}).items() if _matters(group)}


@cache
def _leaves(node: str) -> dict[str, Any]:
    """The values of a part of a config.yaml by dotted key."""
    from twoviews.config.digest import flat

    return {key: value for key, value in flat(foreign.parse(node, Path("config.yaml"))).items() if _matters(key)}


def _tells_apart(key: str, points: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> bool:
    """Whether two points with the same values of these axes differ in this key."""
    if len({typed(one, key) for one in points}) == 1:
        return False
    settings: dict[tuple[str, ...], str] = {}
    return any(
        settings.setdefault(tuple(typed(one, axis) for axis in axes), value := typed(one, key)) != value
        for one in points
    )


@cache
def _matters(key: str) -> bool:
    """Whether the result of a run can depend on it."""
    from twoviews.config.digest import digest

    return digest({key: 0}) != digest({})


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
