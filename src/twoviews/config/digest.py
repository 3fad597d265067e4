"""The digest of a configuration, which names a run: eight hex digits of all values that its result depends on."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twoviews.config.values import flat, plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Keys, and beginnings of keys, that no result of a run depends on.
NOT_IN_DIGEST = (
    "fresh",
    "preview",
    "find_batch",
    "sweep",
    "pictures",
    "tracking",
    "runtime.log_every",
    "runtime.checkpoint_seconds",
    "runtime.checkpoint_minutes",
    "runtime.cuda_graph",
    "runtime.deterministic",
    "data.workers",
    "data.cache",
)

REDUCED_FROM = "reduced_from"  # node of a run's configuration: by dotted key, values that were too large for its images


def digest(cfg: "DictConfig | dict[str, Any]") -> str:
    """Eight hex digits that change with every value of a configuration that can change the result of a run."""
    values = flat(plain(cfg))
    values |= {
        key.removeprefix(f"{REDUCED_FROM}."): values.pop(key) for key in [*values] if key.startswith(REDUCED_FROM)
    }
    values = {key: value for key, value in without_unused(values).items() if not key.startswith(NOT_IN_DIGEST)}
    if any(key.startswith("runtime.") for key in values):  # the configuration of a run
        values.setdefault("runtime.compile", False)  # a former option: runs that did not use it keep their names
    numbers = {key: as_float(value) for key, value in values.items()}
    return hashlib.blake2b(repr(sorted(numbers.items())).encode(), digest_size=4).hexdigest()


def without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a configuration without those of small_views if the run trains no smaller views: earlier runs lack them."""
    unused = () if values.get("small_views.share") else ("small_views.",)
    return {key: value for key, value in values.items() if not key.startswith(unused)}


def as_float(value: Any) -> Any:
    """An int as the float of the same value, where there is one, so that 1 and 1.0 are equal; anything else unchanged."""
    return float(value) if isinstance(value, int) and abs(value) <= 2**53 else value
