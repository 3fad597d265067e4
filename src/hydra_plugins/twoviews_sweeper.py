"""The sweepers of `train.py -m`, where Hydra looks for plugins; what they do is in twoviews.sweeps."""

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Searching(Sweeper):
    """Hands what was typed to the search that conf/hydra/sweeper/<name>.yaml names.

    Args:
        options: the keys of that file.
    """

    def __init__(self, **options: Any):
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs."""
        self._config, self._loader = config, hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        """Start what is missing.

        Raises:
            BadInput: something is not right; nothing was started.
            SystemExit: points failed, or a signal stopped them.
        """
        from twoviews.config.building import build
        from twoviews.config.checks import check_plugin
        from twoviews.sweeps.launching import Launch

        search = build(DictConfig(check_plugin(self._config, "sweeper")))
        order = Launch(self._config, lambda one: self._loader.load_sweep_config(self._config, one))
        code = search.run(order, arguments)
        if code:
            sys.exit(code)
