"""Protocols of a configuration, whose messages have their parameters as they are typed, as protocol.finetune.lr=0.1."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twoviews.config.building import build
from twoviews.config.digest import plain
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
    keys = protocol_keys(name, plain(node)) if isinstance(node, Mapping) else {}
    with qualified_errors(keys=keys):
        return NamedProtocol(build(node, _key_=f"protocol.{name}"), keys)


class NamedProtocol(Protocol):
    """A protocol of a configuration, whose messages name parameters as they are typed there.

    Args:
        protocol: that evaluates; its messages have its own names of the parameters, such as lr=0.1.
        keys: as the parameters are typed, by these names.
    """

    def __init__(self, protocol: Protocol, keys: Mapping[str, str]):
        self.protocol, self._keys, self.every_epochs = protocol, keys, protocol.every_epochs
        self.needs_labels, self.together = protocol.needs_labels, protocol.together

    def notes(self, data: ImageData) -> list[str]:
        """The protocol's notes, with parameters as they are typed."""
        return [qualify(note, keys=self._keys) for note in self.protocol.notes(data)]

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Evaluate the encoder by the protocol.

        Raises:
            BadInput: as the protocol does.
        """
        with qualified_errors(keys=self._keys):
            result = self.protocol(context)
        if not isinstance(result, EvaluationResult):
            name = f"{type(self.protocol).__module__}.{type(self.protocol).__name__}"
            raise BadInput(
                f"{name} returned {type(result).__name__}, and a protocol returns EvaluationResult(values, …) of "
                "twoviews.protocols.protocol."
            )
        return replace(result, notes=[qualify(note, keys=self._keys) for note in result.notes])
