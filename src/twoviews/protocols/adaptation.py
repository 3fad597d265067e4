"""Test-time adaptation: an encoder and its linear probe change while they classify a stream of corrupted images.

Online, one pass: each batch is classified before anything is learnt from it, and each stream starts again from the
run's own weights. All work is done on copies, so that the encoder stays as it is whatever happens.

Shapes: B images of a batch, F features, K classes, N supports.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.batch_norms import BatchNorm, whole_batch_norms
from twoviews.errors import BadInput
from twoviews.protocols.classification import bootstrap_interval
from twoviews.protocols.linear import Probe
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult
from twoviews.protocols.streams import Classify, OnStreams, headline
from twoviews.ranges import Range
from twoviews.runtime import autocast


class Model(nn.Module):
    """A frozen copy, in eval mode, of an encoder with its probe: normalised images to logits.

    Args:
        context: whose encoder, device and number format; fp16, in which small gradients vanish, becomes fp32.
        probe: its linear classifier.
    """

    def __init__(self, context: EvaluationContext, probe: Probe):
        super().__init__()
        self.encoder, self.probe = copy.deepcopy(context.encoder), copy.deepcopy(probe)
        self.device = context.device
        self.dtype = torch.float32 if context.dtype == torch.float16 else context.dtype
        self.requires_grad_(False).eval()

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Standardised features in float32, which the linear classifier takes."""
        with autocast(self.device, self.dtype):
            x = self.encoder(images)
        return self.probe.standardised(x.float())

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class logits of images by the adapted encoder and its linear classifier."""
        return self.probe.linear(self.features(images))

    def batch_norms(self) -> list[BatchNorm]:
        """Its batch norms, switched to normalise by the statistics of the batch; dropout stays off."""
        whole_batch_norms(self.encoder)  # one batch in one process, however the run divided its own
        return [module.train() for module in self.encoder.modules() if isinstance(module, BatchNorm)]


def affine(norms: Sequence[BatchNorm], protocol: str) -> list[nn.Parameter]:
    """Scales and offsets of batch norms, made trainable.

    Raises:
        BadInput: there are none.
    """
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    if not parameters:
        raise BadInput(
            f"protocol={protocol} changes the scales and offsets of batch norms, and this encoder has none; use protocol=t3a."
        )
    for parameter in parameters:
        parameter.requires_grad_()
    return parameters


def entropy(logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Entropy of each softmax, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class PseudoLabels:
    """Features with pseudo-labels; each class keeps those of smallest entropy. It begins with the classifier's weights.

    Args:
        linear: the classifier.
        per_class: features that a class keeps; None is all.
    """

    z: Float[Tensor, "N F"]
    logits: Float[Tensor, "N K"]

    def __init__(self, linear: nn.Linear, per_class: int | None):
        self.per_class = per_class
        self.z = linear.weight.detach().clone()
        self.logits = linear(self.z).detach()

    @property
    def labels(self) -> Int[Tensor, " N"]:
        """Pseudo-labels of the stored features."""
        return self.logits.argmax(1)

    def add(self, z: Float[Tensor, "B F"], logits: Float[Tensor, "B K"]) -> None:
        """Append a batch, then keep `per_class` features of each class."""
        self.z, self.logits = torch.cat([self.z, z.detach()]), torch.cat([self.logits, logits.detach()])
        if self.per_class is not None:
            order = entropy(self.logits).argsort(stable=True)
            order = order[self.labels[order].argsort(stable=True)]  # class after class, each from the smallest entropy
            counts = torch.bincount(self.labels, minlength=self.logits.shape[1])
            first = (counts.cumsum(0) - counts)[self.labels[order]]
            kept = order[torch.arange(len(order), device=order.device) - first < self.per_class]
            self.z, self.logits = self.z[kept], self.logits[kept]

    def prototypes(self) -> Float[Tensor, "K F"]:
        """Sum of the unit features of each class; 0 for a class that has none."""
        return nnf.one_hot(self.labels, self.logits.shape[1]).T.to(self.z.dtype) @ nnf.normalize(self.z, dim=1)


@dataclass
class Adaptation(OnStreams):
    """Abstract: accuracy of an adapting classifier beside that of the same classifier left alone.

    Args:
        batch_size: images at most; a stream is cut into batches that differ by at most one.
        others: see `OnStreams`.
    """

    batch_size: Annotated[int, Range(at_least=2, usual="128 to 200")]

    @property
    def label(self) -> str:
        """The name of the method in tables."""
        return type(self).__name__.lower()

    def start(self, model: Model) -> Classify:
        """A classifier for one stream, which may change `model`."""
        raise NotImplementedError

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 is the mean over corruptions and severities, `unadapted` without adaptation, `gain` the difference.

        Each with the limits of its 95 % interval, `_low` and `_high`; that of the gain is of paired differences.
        """
        streams, probe = self.streams(context), self.linear.probe(context)[0]
        before, table = streams.answers(self.batch_size, lambda: torch.no_grad()(Model(context, probe)))
        after, adapted = streams.answers(self.batch_size, lambda: self.start(Model(context, probe)))
        difference = after[-1] - before[-1]
        low, high = bootstrap_interval(100 * difference, self.seed)
        values = {
            **headline(adapted[-1], "top1"),
            **headline(table[-1], "unadapted"),
            **{"gain": 100 * difference.mean().item(), "gain_low": low, "gain_high": high},
        }
        pairs = [
            ({"method": "none", **row}, {"method": self.label, **own}) for row, own in zip(table, adapted, strict=True)
        ]
        return EvaluationResult(values, tables={"adaptation": [row for pair in pairs for row in pair]})
