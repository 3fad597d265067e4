"""A batch and a queue that small data sets allow, where the user has not set them."""

import math
import pkgutil
from collections.abc import Set
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from twoviews import foreign
from twoviews.config.digest import REDUCED_FROM
from twoviews.config.recorded import override_keys
from twoviews.config.values import flat, plain

STEPS_PER_EPOCH = 4  # at least, where the data allow it
BATCH, QUEUE = "batch_size", "method.queue_size"


def keys_set_by_user(folder: Path) -> Set[str]:
    """The keys that the command sets, or for a job of a sweep the command that launched it.

    Of a run that is read from its config.yaml those that `fit_to_data` would change: they stay as they were recorded.
    """
    if "method" in HydraConfig.get().runtime.choices:
        overrides = HydraConfig.get().overrides.task
    elif (folder / "point.json").exists():
        overrides = foreign.load(folder / "point.json").get("overrides", [])
    else:
        return {BATCH, QUEUE}
    return {*override_keys(overrides)}


def fit_to_data(cfg: DictConfig, images: int, processes: int, fixed: Set[str]) -> list[str]:
    """Reduce batch_size and method.queue_size, in place, where the data do not allow them; a sentence that says so.

    The values before are kept in the configuration's `reduced_from`, so that the run has the name of its command. `fixed` are
    keys that stay as they are, and are refused later if they cannot work; `processes` share a batch.
    """
    if REDUCED_FROM in cfg:  # read from the folder of a run
        return []
    batch, queue = cfg.batch_size, cfg.method.get("queue_size") or 0
    limited = pkgutil.resolve_name(cfg.method._target_).queue_within_data
    if batch <= images and not (limited and queue > images):
        return []
    if BATCH not in fixed:
        batch = _batch(cfg, images, processes, min(batch, queue) if QUEUE in fixed and queue else batch)
    if limited and QUEUE not in fixed and batch <= images:
        keys = batch * (2 if cfg.method.get("symmetric") else 1)  # of a step
        queue = min(queue, max(keys, images // 2 // keys * keys))
    before = flat(plain(cfg))
    OmegaConf.update(cfg, BATCH, batch)
    if queue:
        OmegaConf.update(cfg, QUEUE, queue)
    after = flat(plain(cfg))
    changed = {key: value for key, value in before.items() if after[key] != value}
    if not changed:
        return []
    with open_dict(cfg):
        cfg[REDUCED_FROM] = changed
    shown = " and ".join(f"{key}={after[key]} in place of {value}" for key, value in changed.items())
    return [f"for {images:,} training images: {shown}; values that the command sets are kept."]


def _batch(cfg: DictConfig, images: int, processes: int, largest: int) -> int:
    """The power of two that leaves STEPS_PER_EPOCH steps, as a multiple of the parts that a batch is cut into."""
    parts = cfg.runtime.accumulate * math.lcm(cfg.method.get("bn_splits") or 1, processes)
    wanted = 2 ** int(math.log2(max(1, images // STEPS_PER_EPOCH)))
    return min(largest, max(2 * parts, wanted // parts * parts))
