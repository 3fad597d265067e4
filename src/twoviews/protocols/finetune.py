"""Fine-tuning: a copy of the encoder with a linear classifier, trained on labelled images, whole or from some layer on.

The learning rate may fall towards the input by a factor a layer, as in Clark et al., "ELECTRA", arXiv:2003.10555 (app. A),
and Bao et al., "BEiT", arXiv:2106.08254 (app. H).
Shapes: B images of a batch.
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.batch_norms import whole_batch_norms
from twoviews.data.images import Images
from twoviews.errors import BadInput, nearest
from twoviews.features import embed
from twoviews.optim import LrScaling, sgd
from twoviews.protocols.classification import accuracies
from twoviews.protocols.labelled import classifier, crops, labelled, train_classifier
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import seed_of
from twoviews.ranges import Count, Fraction, Index, NotNegative, Positive, Range, Seed
from twoviews.runtime import autocast
from twoviews.schedule import Cosine


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


class FineTune(Protocol):
    """Accuracy of the encoder after training it with a linear classifier; the run's own encoder is not touched.

    Args:
        unfreeze_from: the first layer to train, such as "layer4" or "layer4.1"; what comes before stays frozen and in
            eval mode; null: all are trained.
        layer_decay: the learning rate of the l-th layer from the output (the classifier is 0) is lr * layer_decay^l.
        epochs: passes over the memory images.
        warmup_epochs: of linear warm-up, before half a cosine.
        batch_size: images a step; clamped to the memory images.
        lr: learning rate of the classifier.
        lr_scaling: "linear" means lr * batch_size / 256, with the batch size that is used.
        momentum: of SGD.
        weight_decay: on everything that is trained.
        smallest_crop: smallest area of a crop as a share of the picture.
        flip: probability of mirroring left to right.
        seed: of classifier, order, crops and dropout.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    def __init__(
        self,
        unfreeze_from: str | None,
        layer_decay: Annotated[float, Range(above=0, at_most=1, usual="0.65 to 1")],
        epochs: Count,
        warmup_epochs: NotNegative,
        batch_size: Annotated[int, Range(at_least=2)],
        lr: Positive,
        lr_scaling: Literal["none", "linear"],
        momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
        weight_decay: NotNegative,
        smallest_crop: Annotated[float, Range(above=0, at_most=1, usual="0.08")],
        flip: Fraction,
        seed: Seed,
        every_epochs: Index,
    ):
        if warmup_epochs > epochs:
            raise BadInput(
                f"protocol.finetune.warmup_epochs={warmup_epochs:g} is longer than the training of {epochs} epochs; use less."
            )
        self.unfreeze_from, self.layer_decay, self.epochs = unfreeze_from, layer_decay, epochs
        self.warmup_epochs, self.batch_size, self.lr = warmup_epochs, batch_size, lr
        self.lr_scaling: LrScaling = lr_scaling
        self.momentum, self.weight_decay = momentum, weight_decay
        self.smallest_crop, self.flip, self.seed, self.every_epochs = smallest_crop, flip, seed, every_epochs

    def trained_layers(self, encoder: Encoder) -> list[Layer]:
        """The layers that are trained; they are put into training mode, and the others are frozen.

        Raises:
            BadInput: there is no layer of that name.
        """
        all_layers, begin = layers(encoder), 0
        if self.unfreeze_from is not None:
            names = [layer.name for layer in all_layers]
            named = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{self.unfreeze_from}.")]
            if not named:
                close = nearest(self.unfreeze_from, names)
                raise BadInput(
                    f"protocol.finetune.unfreeze_from={self.unfreeze_from} is no layer of this encoder.{close} Layers: "
                    f"{', '.join(names)}; null trains all."
                )
            begin = named[0]
        encoder.train(begin == 0).requires_grad_(False)
        for layer in all_layers[begin:]:
            for module in layer.modules:
                module.train()
            for parameter in layer.parameters:
                parameter.requires_grad_(True)
        return all_layers[begin:]

    def rates(self, trained: list[Layer], head: nn.Linear) -> list[dict]:
        """Parameter groups of the trained layers and the classifier, with `scale`, the factor of their learning rate."""
        groups = [
            {"params": layer.parameters, "scale": self.layer_decay ** (len(trained) - number)}
            for number, layer in enumerate(trained)
        ]
        return [*groups, {"params": list(head.parameters()), "scale": 1.0}]

    def fitted(self, context: EvaluationContext, images: Images, *key: int | str) -> tuple[nn.Sequential, list[str]]:
        """A copy of the encoder with a classifier, trained on these images, and notes for the user; a function of `key`."""
        encoder = copy.deepcopy(context.encoder)
        whole_batch_norms(encoder)  # as evaluate.py has them; and other processes would never answer
        if context.channels_last:
            encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained, seed = self.trained_layers(encoder), seed_of(self.seed, "finetune", *key)
        loader, notes = crops(context, images, self.batch_size, self.smallest_crop, self.flip, seed)
        head = classifier(encoder.out_dim, len(context.data.classes), context.device, seed)
        numbers = (loader.batch_size, self.lr, self.lr_scaling, self.momentum, self.weight_decay)
        optimizer = sgd(self.rates(trained, head), *numbers, exclude_norm_and_bias=False)
        for group in optimizer.param_groups:
            group["lr"] *= group["scale"]
        model = nn.Sequential(encoder, head)

        def logits(images: Float[Tensor, "B _ _h _w"]) -> Tensor:
            with autocast(context.device, context.dtype):
                return model(images)

        devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)  # of dropout, which takes no generator
            schedule = Cosine(self.epochs, self.warmup_epochs)
            train_classifier(logits, loader, optimizer, schedule, self.epochs, context)
        return model, notes

    def scores(self, context: EvaluationContext, model: nn.Module) -> Float[Tensor, "M C"]:
        """Logits of the test images under the eval transform."""
        test = labelled(context)[1]
        return embed(model, test, context.data, context.device, context.dtype, context.channels_last)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 and top5 on the test images."""
        memory, test = labelled(context)
        model, notes = self.fitted(context, memory)
        scores = self.scores(context, model)
        assert test.labels is not None
        labels = test.labels.to(context.device).long()
        return EvaluationResult(accuracies(scores, labels), scores.softmax(1), notes=notes)
