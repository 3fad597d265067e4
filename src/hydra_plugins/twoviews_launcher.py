"""The launchers of `train.py -m`, where Hydra looks for plugins; what they do is in twoviews.sweeps."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Dispatching(Launcher):
    """Hands the combinations of a sweep to the launcher that conf/hydra/launcher/<name>.yaml names.

    Args:
        options: the keys of that file.
    """

    def __init__(self, **options: Any):
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs."""
        self._config, self._loader = config, hydra_context.config_loader

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start what is missing.

        Raises:
            BadInput: something is not right; nothing was started.
            SystemExit: jobs failed, or a signal stopped them.
        """
        from twoviews.sweeps.launching import Launch, launch

        # Hydra's own record, which its sweeper has just written beside the sweeps; sweep.json says all of it.
        Path(self._config.hydra.sweep.dir, "multirun.yaml").unlink(missing_ok=True)
        order = Launch(self._config, lambda one: self._loader.load_sweep_config(self._config, one))
        code = launch(order, job_overrides)
        if code:
            sys.exit(code)
        return []
