"""Counts, values and parameter names of sweeps as text for the user."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def typed(values: Mapping[str, Any], key: str) -> str:
    """The value of a key as it is typed; "-" if the configuration has no such key."""
    return text(values[key]) if key in values else "-"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole key where two end alike."""
    keys = list(keys)
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in keys}
