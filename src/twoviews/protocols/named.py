"""Protocols of a configuration, whose messages have their parameters as they are typed, as protocol.finetune.lr=0.1."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from twoviews.config.building import build, plain
from twoviews.config.parameter_names import protocol_keys, qualified_errors, qualify
from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol

if TYPE_CHECKING:
    from omegaconf import DictConfig


def build_protocol(name: str, node: "DictConfig | dict[str, Any]") -> Protocol:
    """The protocol of a node below `protocol`; its errors and notes have its parameters as they are typed.

    Raises:
        BadInput: as `build`, with keys such as protocol.finetune.lr=0.1.
    """
    values = plain(node)
    keys = protocol_keys(name, values) if isinstance(values, dict) else {}
    with qualified_errors(keys=keys):
        built = build(node, _key_=f"protocol.{name}")
    return NamedProtocol(built, partial(qualify, keys=keys))


class NamedProtocol(Protocol):
    """A protocol of a configuration, whose messages name parameters as they are typed there.

    Args:
        protocol: that evaluates; its messages have its own names of the parameters, such as lr=0.1.
        qualify: makes a sentence for the user of such a message.
    """

    def __init__(self, protocol: Protocol, qualify: Callable[[str], str]):
        self.protocol, self._qualify, self.every_epochs = protocol, qualify, protocol.every_epochs
        self.needs_labels, self.together = protocol.needs_labels, protocol.together

    def notes(self, data: ImageData) -> list[str]:
        """Those of the protocol."""
        return [*map(self._qualify, self.protocol.notes(data))]

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Evaluate the encoder by the protocol.

        Raises:
            BadInput: as the protocol does.
        """
        try:
            result = self.protocol(context)
        except BadInput as error:
            error.args = ("\n".join(map(self._qualify, error.messages)),)
            raise
        return replace(result, notes=[*map(self._qualify, result.notes)])
