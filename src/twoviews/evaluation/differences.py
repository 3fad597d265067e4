"""In what the trainings of several runs differ, to tell them apart in tables and pictures."""

from collections.abc import Mapping
from typing import Any

from twoviews.config.digest import NOT_IN_DIGEST, flat, without_unused
from twoviews.sweeps.job import short_names, typed

ALWAYS = ("method.", "backbone.")  # keys of these groups, and root keys, are shown wherever they differ
# Not of the training, or without influence on what it learns but for rounding.
LEFT_OUT = (*NOT_IN_DIGEST, "protocol", "runtime.device", "runtime.channels_last", "runtime.compile")


def differences(configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The values in which runs differ, as they are typed, by run; and the other keys that differ, which follow from those.

    Runs with other classes of a group, such as other methods, differ in that group, and not in each key inside it. What
    only comes with these classes, such as the augmentation of a method, or repeats a root key follows from them.

    Args:
        configs: of the trainings, by name of the run; a run without one has no values.
    """
    values = {
        run: {key: value for key, value in without_unused(flat(dict(config))).items() if not key.startswith(LEFT_OUT)}
        for run, config in configs.items()
        if config
    }
    keys = [
        key
        for key in dict.fromkeys(key for config_values in values.values() for key in config_values)
        if _differ(values, key)
    ]
    groups = [key.removesuffix("._target_") for key in keys if key.endswith("._target_")]
    for config_values in values.values():
        config_values.update(
            {group: str(config_values.get(f"{group}._target_", "-")).rpartition(".")[2] for group in groups}
        )
    keys = [key for key in keys if not key.startswith(tuple(f"{group}." for group in groups))]
    shown, following = groups + [key for key in keys if "." not in key], []
    roots = [_column(values, key) for key in shown]
    by_group = [tuple(column) for column in zip(*(_column(values, group) for group in groups), strict=True)]
    for key in keys:
        column = _column(values, key)
        if key not in shown:
            explained = len({*by_group}) == len({*zip(by_group, column, strict=True)}) if groups else False
            follows = column in roots or (explained and not key.startswith(ALWAYS))
            (following if follows else shown).append(key)
    shown.sort(key="seed".__eq__)  # the last, as it says least
    names = short_names(shown)
    return {
        run: {names[key]: typed(config_values, key) for key in shown} for run, config_values in values.items()
    }, following


def labels(configs: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> dict[str, str]:
    """A name for each run that says what differs, such as "temperature=0.2, seed=1"; other encoders keep their titles."""
    differing, _ = differences(configs)
    label_by_run = {
        run: ", ".join(f"{key}={value}" for key, value in differing.get(run, {}).items()) or title
        for run, title in titles.items()
    }
    repeated = [label for label in label_by_run.values() if [*label_by_run.values()].count(label) > 1]
    return {run: f"{label} ({run})" if label in repeated else label for run, label in label_by_run.items()}


def _column(values: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    return [typed(config_values, key) for config_values in values.values()]


def _differ(values: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    return len({*_column(values, key)}) > 1
