"""Configurations as Hydra composes them from the files of conf/ and overrides."""

from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config.digest import digest
from twoviews.config.groups import CONF, options
from twoviews.config.hydra_internals import chosen
from twoviews.config.recorded import largest_view
from twoviews.errors import BadInput

# Arguments of hydra.main and hydra.initialize_config_dir: Hydra 1.4 knows one version of itself and takes no version_base.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def register_resolvers() -> None:
    """Register the resolvers that files of conf/ use.

    `run_name` is the name of a run's folder, `options` those of a group with * behind the chosen ones, `largest_view` a value
    of the training's views.
    """

    def run_name(*, _root_: DictConfig) -> str:
        choices = _root_.hydra.runtime.choices
        return f"{choices.method}-{choices.data}-{digest(_root_)}"

    def marked_options(group: str, *, _root_: DictConfig) -> str:
        taken = chosen(_root_.hydra, group)
        return ", ".join(f"{name}*" if name in taken else name for name in options(group))

    def of_largest_view(key: str, default: Any, *, _root_: DictConfig) -> Any:
        training = _root_.get("augmentation")  # evaluate.py has none and takes that of the run
        try:
            views = largest_view({"augmentation": OmegaConf.to_container(training, resolve=True) if training else {}})
        except BadInput:  # the augmentation is checked for itself
            views = {}
        value = views.get(key, default)
        return OmegaConf.create(value) if isinstance(value, list) else value

    # OmegaConf 2.4, which Hydra 1.4 needs, has a new name for it; in 2.3 that name means something else.
    register: Any = OmegaConf.register_new_resolver if VERSION_BASE else OmegaConf.register_resolver
    register("run_name", run_name, replace=True)
    register("largest_view", of_largest_view, replace=True)
    register("options", marked_options, replace=True)


def compose(name: str, overrides: list[str]) -> DictConfig | None:
    """The configuration of a command with Hydra's own node; None if Hydra refuses an override."""
    try:
        with hydra.initialize_config_dir(**VERSION_BASE, config_dir=str(CONF)):
            return hydra.compose(name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None


def compose_unresolved(name: str, overrides: list[str]) -> Any:
    """The same as nested dictionaries, interpolations as text; None if Hydra refuses an override."""
    cfg = compose(name, overrides)
    return None if cfg is None else OmegaConf.to_container(cfg, resolve=False)
