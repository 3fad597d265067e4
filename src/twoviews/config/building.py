"""From checked values to objects."""

import typing
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from twoviews.config.checks import is_node, node_problems, unknown_target
from twoviews.config.groups import PASSED_BY_PROGRAM, group_of
from twoviews.config.parameter_names import qualified_errors, qualify
from twoviews.config.values import plain
from twoviews.errors import BadInput

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from twoviews.data.images import ImageData


def build(node: "DictConfig | dict[str, Any]", *, _key_: str = "", **arguments: Any) -> Any:
    """The object that a node of a configuration describes.

    Args:
        node: values of a group, with the dotted path of a class or function as `_target_`.
        _key_: dotted key of the node, where it is not the group.
        arguments: passed beside the values of the node.

    Raises:
        BadInput: no file of conf/ names this `_target_`, a value does not fit its signature, or the object refuses it; the
            message has the keys as they are typed, such as method.queue_size=16.
    """
    values = plain(node) if isinstance(node, Mapping) else node
    target = str(values.get("_target_")) if isinstance(values, dict) else "None"
    if (group := group_of(target)) is None:
        raise unknown_target(target)
    if problems := [*node_problems(_key_ or group, values, (*arguments, *PASSED_BY_PROGRAM.get(group, ())))]:
        raise BadInput(*problems)
    # `NamedProtocol` (protocols/protocol.py) qualifies the errors of a protocol, by its name in the configuration.
    with nullcontext() if group == "protocol" else qualified_errors(group):
        return _instance(values, arguments)


def build_data(node: "DictConfig | dict[str, Any]") -> "ImageData":
    """The data set of a configuration's `data`; its notes name parameters as they are typed, such as data.size=64.

    Raises:
        BadInput: as `build` does; or what its function returned is no ImageData that a training can use.
    """
    from twoviews.data.image_checks import check_image_data

    data = build(node)
    check_image_data(data, node["_target_"])
    return replace(data, notes=tuple(qualify(note, "data") for note in data.notes))


def _instance(node: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """The object that a checked node describes.

    Not Hydra's instantiate, which also builds what was not checked.
    """
    values = {
        key: _instance(value, {}) if is_node(value) else value for key, value in node.items() if key != "_target_"
    }
    module, _, name = typing.cast(str, node["_target_"]).rpartition(".")
    return getattr(import_module(module), name)(**values, **arguments)
