"""The parameters in which the jobs of a sweep differ: those that were swept, and others that two launches had different.

A sweep may be launched again with other keys swept or other values fixed, to compare them. A job then has a value for what
only other jobs swept, and what was fixed in each launch distinguishes the jobs of different launches.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.sweeps.formatting import typed
from twoviews.sweeps.job import SEED, Job


def with_varying_parameters(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with the value of every parameter in which they differ among their `axes`, swept or not.

    A parameter that the command fixed for all jobs of a launch is one of them if jobs differ in it. Any other, such as a
    default that has changed, is one only if jobs differ in it that would be taken for the same config without it. A
    parameter that the configuration of a job lacks is not among its axes.
    """
    known = {job.digest: job.description for job in jobs}
    if len({_launch(job, known[job.digest]) for job in jobs}) < 2:
        return list(jobs)  # they differ in swept values alone, and no configuration has to be read
    if not all("choices" in description for description in known.values()):  # of jobs from before these were recorded
        known = {digest: {**description, "choices": {}} for digest, description in known.items()}
    values = {job.digest: _values(job, known[job.digest]) for job in jobs}
    keys = [*dict.fromkeys(key for job in jobs for key in job.axes)]
    fixed = dict.fromkeys(
        _key(override) for description in known.values() for override in description.get("overrides", ())
    )
    for key in (*fixed, SEED):
        if key not in keys and len({typed(job, key) for job in values.values() if key in job}) > 1:
            keys.append(key)
    groups = dict.fromkeys(group for description in known.values() for group in _choices(description))
    for key in dict.fromkeys([*groups, *(key for job in values.values() for key in job)]):
        if key not in keys and _distinguishes(key, [*values.values()], [other for other in keys if other != SEED]):
            keys.append(key)
    return [
        replace(job, axes={key: values[job.digest][key] for key in keys if key in values[job.digest]}) for job in jobs
    ]


def _launch(job: Job, description: Mapping[str, Any]) -> tuple[object, ...]:
    """The same for jobs whose configurations differ in swept values alone."""
    fixed = [override for override in description.get("overrides", ()) if _key(override) not in job.axes]
    return tuple(job.axes), tuple(fixed), description.get("code")


def _values(job: Job, description: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that can change the result of a job, by dotted key or group."""
    path = job.folder / "config.yaml"
    # A node of the configuration is at the left margin; most are the same in all jobs, and parsed once.
    nodes = re.split(r"\n(?=\w)", foreign.text(path) or "{}")
    try:
        values = {key: value for node in nodes for key, value in _leaves(node).items()}
    except BadInput:
        foreign.load(path)  # raises the same with the name of the file
        raise
    return {**values, **_choices(description), **job.axes}


def _choices(description: Mapping[str, Any]) -> dict[str, Any]:
    choices = description.get("choices", {}).items()
    return {group: choice or "none" for group, choice in choices if _changes_results(group)}  # null in version 0.1.0


@cache
def _leaves(node: str) -> dict[str, Any]:
    """The values of a part of a config.yaml by dotted key."""
    from twoviews.config.digest import flat

    values = flat(foreign.parse(node, Path("config.yaml")))
    return {key: value for key, value in values.items() if _changes_results(key)}


def _distinguishes(key: str, jobs: Sequence[Mapping[str, Any]], others: Sequence[str]) -> bool:
    """Whether two jobs with the same values of the other keys differ in this key."""
    if len({typed(job, key) for job in jobs}) == 1:
        return False
    first: dict[tuple[str, ...], str] = {}
    return any(
        first.setdefault(tuple(typed(job, other) for other in others), value := typed(job, key)) != value
        for job in jobs
    )


@cache
def _changes_results(key: str) -> bool:
    """Whether the result of a run can depend on this key."""
    from twoviews.config.digest import digest

    return digest({key: 0}) != digest({})


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
