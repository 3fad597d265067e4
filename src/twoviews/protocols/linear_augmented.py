"""The published linear protocol: random crops and flips of the images every epoch, each through the frozen backbone.

He et al., "Momentum Contrast", arXiv:1911.05722, sec. 4.1, and the evaluation scripts of MoCo, SimSiam and SwAV; their
numbers are conf/protocol/linear_moco.yaml, linear_simsiam.yaml and linear_swav.yaml. It is there for comparison with
papers and costs as many passes of the backbone as it has epochs; `linear` and `linear_sgd` need one. Unlike those scripts,
which report the best epoch on the test images, this reports the last.
Shapes: B images of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.optim import larc, scaled_lr, sgd
from twoviews.protocols.classification import accuracies
from twoviews.protocols.labelled import classifier, crops, labelled, train_classifier
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import Count, Fraction, NonNegativeInt, NotNegative, Positive, Range, Seed
from twoviews.runtime import autocast
from twoviews.schedule import Cosine, Step

TRUST = 0.001  # coefficient of LARS in SimSiam's main_lincls.py


@dataclass
class LinearAugmented(Protocol):
    """Accuracy of a linear classifier on the features of augmented images; the learning rate changes between epochs.

    Args:
        optimizer: "sgd", or "larc", which is LARS as SimSiam uses it: apex's, without clipping, on weights and biases.
        lr: learning rate at the start.
        lr_scaling: "linear" means lr * batch_size / 256, with the batch size that is used.
        momentum: of the optimizer.
        weight_decay: on weights and biases.
        batch_size: images a step; clamped to the memory images.
        epochs: passes of the backbone over the memory images.
        milestones: epochs at which the learning rate falls to a tenth; null: half a cosine.
        smallest_crop: smallest area of a crop as a share of the picture.
        flip: probability of mirroring left to right.
        seed: of classifier, order and crops.
    """

    optimizer: Literal["sgd", "larc"]
    lr: Positive
    lr_scaling: Literal["none", "linear"]
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")]
    weight_decay: NotNegative
    batch_size: Count
    epochs: Count
    milestones: Sequence[NotNegative] | None
    smallest_crop: Annotated[float, Range(above=0, at_most=1, usual="0.08")]
    flip: Fraction
    seed: Seed
    every_epochs: NonNegativeInt

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 and top5 on the test images, learning rate and batch size that were used, and a note if it was clamped."""
        memory, _ = labelled(context)
        encoder, training = context.encoder, context.encoder.training
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        loader, notes = crops(context, memory, self.batch_size, self.smallest_crop, self.flip, self.seed)
        head = classifier(encoder.out_dim, len(context.data.classes), context.device, self.seed)
        make = sgd if self.optimizer == "sgd" else partial(larc, trust_coefficient=TRUST, clip=False)
        numbers = (loader.batch_size, self.lr, self.lr_scaling, self.momentum, self.weight_decay)
        optimizer = make([{"params": list(head.parameters())}], *numbers, exclude_norm_and_bias=False)
        schedule = Cosine(self.epochs, every="epoch") if self.milestones is None else Step(self.milestones, 0.1)

        def logits(images: Float[Tensor, "B _ _h _w"]) -> Tensor:
            with torch.no_grad(), autocast(context.device, context.dtype):
                features = encoder(images)
            return head(features.float())

        encoder.eval()
        train_classifier(logits, loader, optimizer, schedule, self.epochs, context)
        encoder.train(training)
        changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
        assert not changed, f"the frozen encoder changed: {changed}"
        with torch.no_grad():
            scores = head(context.test.x)
        values = accuracies(scores, context.test.y)
        values["learning_rate"] = scaled_lr(self.lr, self.lr_scaling, loader.batch_size)
        values["batch_size"] = float(loader.batch_size)
        return EvaluationResult(values, scores.softmax(1), notes=notes)
