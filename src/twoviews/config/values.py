"""A configuration as plain values: nested dictionaries, or its leaves by dotted key."""

import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, node in tree.items() for key, value in flat(node, f"{prefix}{name}.").items()}


def plain(cfg: "DictConfig | dict[str, Any]") -> dict[str, Any]:
    """A configuration without Hydra's own node, or a node of one, as nested dictionaries, with interpolations resolved."""
    if isinstance(cfg, dict):
        return cfg
    from omegaconf import OmegaConf

    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]) if "hydra" in cfg else cfg
    return typing.cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))
