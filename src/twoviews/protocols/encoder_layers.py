"""The layers of an encoder from input to output, which may have learning rates of their own."""

from dataclasses import dataclass

from torch import nn

from twoviews.backbones import Encoder


@dataclass
class Layer:
    """A part of an encoder that has its own learning rate."""

    name: str  # of its first module, such as layer4.0
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def layers(encoder: Encoder) -> list[Layer]:
    """The children of the encoder from input to output, those of a Sequential one by one.

    Modules that have no matrix of weights (norms, activations, pooling) belong to the layer before them, parameters of
    the encoder itself (a class token, position embeddings) to the first. An encoder around one model (timm's) has the
    layers of that model.
    """
    model: nn.Module = encoder
    while len(children := dict(model.named_children())) == 1 and not list(model.parameters(recurse=False)):
        (model,) = children.values()
    if not children:  # a single layer in itself
        return [Layer("", [model], list(model.parameters()))]
    all_layers: list[Layer] = []
    for name, child in children.items():
        parts = {name: child}
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
            parts = {f"{name}.{number}": part for number, part in enumerate(child)}
        for path, part in parts.items():
            if all_layers and all(p.ndim <= 1 for p in part.parameters()):
                all_layers[-1].modules.append(part)
                all_layers[-1].parameters += part.parameters()
            else:
                all_layers.append(Layer(path, [part], list(part.parameters())))
    all_layers[0].parameters += model.parameters(recurse=False)
    return all_layers
