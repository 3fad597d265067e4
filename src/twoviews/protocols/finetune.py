"""Fine-tuning: a copy of the encoder with a linear classifier, trained on labelled images, whole or from some layer on.

The learning rate may fall towards the input by a factor a layer, as in Clark et al., "ELECTRA", arXiv:2003.10555 (app. A),
and Bao et al., "BEiT", arXiv:2106.08254 (app. H).
Shapes: B images of a batch.
"""

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.batch_norms import whole_batch_norms
from twoviews.classifier_file import as_head, save_classifier
from twoviews.config.recorded import largest_view
from twoviews.data.images import Images
from twoviews.encoder_file import describe, is_buildable
from twoviews.errors import BadInput, counted, nearest
from twoviews.features import Features, embed
from twoviews.optim import sgd
from twoviews.protocols.classification import accuracies, top1
from twoviews.protocols.distance import kept, with_bank
from twoviews.protocols.encoder_layers import layers
from twoviews.protocols.labelled import Diverged, classifier, crops, labelled, train_classifier
from twoviews.protocols.linear import Linear, Probe, held_out, linear_of_run, temperature
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import seed_of
from twoviews.ranges import Count, Fraction, NonNegativeInt, NotNegative, Positive, Range, Seed
from twoviews.runtime import autocast
from twoviews.schedule import Cosine

STEPS = 20  # an epoch, at least, where the batch size is not given
CHOICE = 0.5  # length of the trainings that choose the learning rate, as a share of the final one


def default_batch_size(images: int) -> int:
    """256, or the smaller power of two, not below 16, that makes an epoch of at least STEPS steps."""
    return min(256, max(16, 2 ** math.floor(math.log2(max(1, images / STEPS)))))


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned encoder with its classifier."""

    encoder: Encoder
    head: nn.Linear  # [C, F], on its features
    lr: float  # that it was trained with; 0: none was better than the linear probe, and that is the classifier
    temperature: float  # that calibrates its logits; 1 where no images were held out
    notes: list[str]  # sentences for the user

    @property
    def model(self) -> nn.Sequential:
        """Encoder and classifier as one module, images [B, C, H, W] to logits [B, K]."""
        return nn.Sequential(self.encoder, self.head)


@dataclass
class FineTune(Protocol):
    """Accuracy of the encoder after training it with a linear classifier; the run's own encoder is not touched.

    The classifier begins as a linear probe of the features, as in Kumar et al., "Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution", arXiv:2202.10054 (LP-FT). evaluate.py keeps network and classifier as
    classifier.safetensors.

    Args:
        linear: how the probe is fitted that the classifier begins as; null: random weights, as in most published recipes.
        unfreeze_from: the first layer to train, such as "layer4" or "layer4.1"; what comes before stays frozen and in
            eval mode; null: all are trained.
        layer_decay: the learning rate of the l-th layer from the output (the classifier is 0) is lr * layer_decay^l.
        epochs: passes over the memory images.
        warmup_epochs: of linear warm-up, before half a cosine.
        batch_size: images a step; clamped to the memory images; null: 256, or the smaller power of two, not below 16, that
            makes an epoch of at least `STEPS` steps.
        lr: learning rate of the classifier; of several, the one with the best accuracy on held-out memory images after
            trainings of `CHOICE` of the length, unless the linear probe is still better there.
        held_out: share of the memory images that chooses.
        lr_scaling: "linear" means lr * batch_size / 256, with the batch size that is used.
        momentum: of SGD.
        weight_decay: on everything that is trained.
        smallest_crop: smallest area of a crop as a share of the picture.
        flip: probability of mirroring left to right.
        seed: of classifier, order, crops and dropout.
    """

    unfreeze_from: str | None
    layer_decay: Annotated[float, Range(above=0, at_most=1, usual="0.65 to 1")]
    epochs: Count
    warmup_epochs: NotNegative
    batch_size: Annotated[int, Range(at_least=2)] | None
    lr: Positive | Sequence[Positive]
    lr_scaling: Literal["none", "linear"]
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")]
    weight_decay: NotNegative
    smallest_crop: Annotated[float, Range(above=0, at_most=1, usual="0.08")]
    flip: Fraction
    seed: Seed
    every_epochs: NonNegativeInt
    linear: Linear | None = None  # this and held_out are missing in configurations of version 0.1.0
    held_out: Annotated[float, Range(above=0, below=1, usual="0.1")] = 0.1

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise BadInput(
                f"warmup_epochs={self.warmup_epochs:g} is longer than the training of {self.epochs} epochs; use less."
            )
        self.rates = list(self.lr) if isinstance(self.lr, Sequence) else [self.lr]

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run's linear probe, and crops and flips of its views; of several the one with the largest crops."""
        view = largest_view(config)
        crops = {"smallest_crop": view["scale"][0], "flip": view["flip"]} if view else {}
        return {**linear_of_run(config), **crops}

    def trained_layers(self, encoder: Encoder) -> list[list[nn.Parameter]]:
        """The parameters of each layer that is trained, in training mode from here on; the other layers are frozen.

        Raises:
            BadInput: there is no layer of that name.
        """
        all_layers, begin = layers(encoder), 0
        if self.unfreeze_from is not None:
            names = [layer.name for layer in all_layers]
            named = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{self.unfreeze_from}.")]
            if not named:
                raise BadInput(
                    f"unfreeze_from={self.unfreeze_from} is no layer of this encoder."
                    f"{nearest(self.unfreeze_from, names)} Layers: {', '.join(names)}; null trains all."
                )
            begin = named[0]
        encoder.train(begin == 0).requires_grad_(False)
        for layer in all_layers[begin:]:
            for part in (*layer.modules, *layer.parameters):
                part.train() if isinstance(part, nn.Module) else part.requires_grad_(True)
        return [layer.parameters for layer in all_layers[begin:]]

    def trained(
        self,
        context: EvaluationContext,
        images: Images,
        lr: float,
        probe: Probe | None,
        *key: int | str,
        length: float = 1.0,
    ) -> tuple[Encoder, nn.Linear, list[str]]:
        """A copy of the encoder with a classifier, trained on labelled images, and notes for the user; a function of `key`.

        Args:
            context: of the encoder.
            images: labelled.
            lr: learning rate of the classifier, before `lr_scaling`.
            probe: what the classifier begins as; None: random weights.
            key: of the random numbers.
            length: of the training, as a share of `epochs`.

        Raises:
            Diverged: the loss became infinite or not a number.
        """
        encoder = _copied(context.encoder).to(memory_format=context.memory_format)  # type: ignore[call-overload]
        layers_trained, seed = self.trained_layers(encoder), seed_of(self.seed, "finetune", *key)
        batch_size = self.batch_size or default_batch_size(len(images))
        loader, notes = crops(context, images, batch_size, self.smallest_crop, self.flip, seed)
        classes = context.data.classes
        if probe is None:
            head = classifier(encoder.out_dim, len(classes), context.device, seed)
        else:
            head = probe.head(classes).linear.requires_grad_(True)
        groups: list[dict] = [{"params": parameters} for parameters in (*layers_trained, [*head.parameters()])]
        numbers = (loader.batch_size, lr, self.lr_scaling, self.momentum, self.weight_decay)
        optimizer = sgd(groups, *numbers, exclude_norm_and_bias=False)
        for place, group in enumerate(reversed(optimizer.param_groups)):
            group["lr"] *= self.layer_decay**place
        model = nn.Sequential(encoder, head)

        def logits(images: Float[Tensor, "B _ _h _w"]) -> Tensor:
            with autocast(context.device, context.dtype):
                return model(images)

        epochs = math.ceil(length * self.epochs)
        schedule = Cosine(epochs, length * self.warmup_epochs)
        with torch.random.fork_rng([context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(seed)  # of dropout, which takes no generator
            train_classifier(logits, loader, optimizer, schedule, epochs, context)
        return encoder, head, notes

    def fitted(
        self, context: EvaluationContext, memory: Features, images: Images, *key: int | str, probe: Probe | None = None
    ) -> FineTuned:
        """The encoder after fine-tuning on images with the best of the learning rates; a function of `key`.

        `memory` are features and labels of the images. The classifier begins as `probe`, by default what `linear` makes of them.
        """
        classes = len(context.data.classes)
        if probe is None and self.linear is not None:
            probe = self.linear.fitted(memory, classes)[0]
        lr, temperature, notes = self._chosen(context, memory, images, *key)
        if lr or probe is None:
            encoder, head, more = self.trained(context, images, lr, probe, *key)
            return FineTuned(encoder, head, lr, temperature, [*more, *notes])
        encoder = _copied(context.encoder)
        return FineTuned(encoder, probe.head(context.data.classes).linear, lr, temperature, notes)

    def _chosen(
        self, context: EvaluationContext, memory: Features, images: Images, *key: int | str
    ) -> tuple[float, float, list[str]]:
        """The learning rate that is best on held-out images, 0 if the probe is better there; its temperature, and notes."""
        rest, chooses = (index.cpu() for index in held_out(memory.y, self.held_out))
        if len(self.rates) == 1:
            return self.rates[0], 1.0, []
        if not len(chooses):
            why = "each class has one labelled image, so none is held out to choose a learning rate"
            return self.rates[0], 1.0, [f"{why}: lr={self.rates[0]:g} is used."]
        training, held = (memory.subset(index) for index in (rest, chooses))
        logits: dict[float, Tensor] = {}
        probe = None
        if self.linear is not None:
            probe = self.linear.fitted(training, len(context.data.classes))[0]
            logits[0.0] = probe(held.x)
        for lr in self.rates:
            with contextlib.suppress(Diverged):
                encoder, head, _ = self.trained(context, images.subset(rest), lr, probe, "choice", *key, length=CHOICE)
                logits[lr] = self.scores(context, nn.Sequential(encoder, head), images.subset(chooses))
        if not logits:
            raise BadInput(f"all of lr={self.rates} diverge; use smaller ones, such as lr={min(self.rates) / 10:g}.")
        accuracy = {lr: top1(scores, held.y) for lr, scores in logits.items()}
        best = max(accuracy, key=lambda lr: (accuracy[lr], lr > 0, -lr))
        if best:
            note = f"lr={best:g} was chosen, with an accuracy of {accuracy[best]:.2f} % on {len(chooses):,} held-out images."
        else:
            least, many = min(self.rates), counted(len(chooses), "held-out image")
            note = (
                f"none of lr={self.rates} is better than the linear probe (a linear classifier of the features), which has "
                f"{accuracy[best]:.2f} % on {many}, so that probe is kept and the encoder is unchanged; for a fine-tuned one try "
                f"smaller rates, such as lr=[{least / 10:g},{least / 2:g}], or longer training, such as epochs={2 * self.epochs}."
            )
        return best, temperature(logits[best], held.y), [note]

    def scores(self, context: EvaluationContext, model: nn.Module, images: Images) -> Float[Tensor, "M C"]:
        """Logits of images under the eval transform."""
        return embed(model, images, context.data, context.device, context.dtype, context.channels_last)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 and top5 on the test images, and the learning rate; the calibrated classifier is saved."""
        memory, test = labelled(context)
        tuned = self.fitted(context, context.memory, memory)
        scores = self.scores(context, tuned.model, test)
        if context.folder is not None and is_buildable(tuned.encoder):
            weight, bias = (value.detach() / tuned.temperature for value in (tuned.head.weight, tuned.head.bias))
            of_bank = memory.subset(kept(len(memory)))
            x, test_x = (self.scores(context, tuned.encoder, images) for images in (of_bank, test))
            head = with_bank(as_head(weight, bias, context.data.classes), x, test_x)
            save_classifier(context.folder, tuned.encoder, head, describe(tuned.encoder, context.data))
        return EvaluationResult(
            {**accuracies(scores, context.test.y), "lr": tuned.lr}, scores.softmax(1), notes=tuned.notes
        )


def _copied(encoder: Encoder) -> Encoder:
    encoder = copy.deepcopy(encoder)
    whole_batch_norms(encoder)  # as evaluate.py has them; and other processes would never answer
    return encoder
