"""The sweeper plugin of `train.py -m`, where Hydra looks for it; sweeps are implemented in twoviews.sweeps."""

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SearchSweeper(Sweeper):
    """Runs the search that conf/hydra/sweeper/<name>.yaml names. Hydra's launchers are not used: see twoviews.sweeps.machine.

    Args:
        options: the keys of that file, which are read from the configuration instead.
    """

    def __init__(self, **options: Any):
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs."""
        self._config, self._loader = config, hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that follow from the overrides.

        Raises:
            BadInput: something is wrong; nothing was started.
            SystemExit: jobs failed, or a signal stopped them.
        """
        from twoviews.config.building import build
        from twoviews.config.checks import checked_plugin
        from twoviews.sweeps.launching import SweepCommand

        search = build(checked_plugin(self._config, "sweeper"))
        command = SweepCommand(self._config, lambda overrides: self._loader.load_sweep_config(self._config, overrides))
        if code := search.run(command, arguments):
            sys.exit(code)
