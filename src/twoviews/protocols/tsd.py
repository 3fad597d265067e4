"""TSD, test-time self-distillation: features learn to agree, through prototypes of the stream, with their predictions.

Wang et al., "Feature Alignment and Uniformity for Test Time Adaptation", arXiv:2303.10902, after the released code
(github.com/SakurajimaMaiii/TSD): the paper's text was not at hand. That code has the entropy filter, but not the
consistency filter of the paper's abstract; neither has this.

As released, `normalize(z, 1)` divides by the L1 norm (its second argument is the norm's order), so that the cosines are
tiny; the distillation takes the softmax of probabilities; and the local-clustering term, never switched on (lam = 0), sets
raw logits against probabilities with a sign that drives neighbours apart. `as_released=false` mends all four.

Shapes: B images, F features, K classes, N supports.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.errors import BadInput
from twoviews.protocols.adaptation import Adaptation, Model, PseudoLabels, affine
from twoviews.protocols.streams import Classify
from twoviews.ranges import Count, NotNegative, Positive


def distillation(
    z: Float[Tensor, "B F"], logits: Float[Tensor, "B K"], prototypes: Float[Tensor, "K F"], as_released: bool
) -> Float[Tensor, ""]:
    """Mean KL(softmax(n(z) n(P)^T) || q), without gradients of q and P.

    n divides by the L2 norm and q is softmax(logits); as released n divides by the L1 norm and q is softmax(softmax(logits)).
    """
    order = 1 if as_released else 2
    predicted = nnf.normalize(z, p=order, dim=1) @ nnf.normalize(prototypes.detach(), p=order, dim=1).T
    target = logits.detach().softmax(1) if as_released else logits.detach()
    return nnf.kl_div(target.log_softmax(1), predicted.log_softmax(1), reduction="batchmean", log_target=True)


def local_clustering(
    z: Float[Tensor, "B F"], logits: Float[Tensor, "B K"], memory: PseudoLabels, neighbours: int, as_released: bool
) -> Float[Tensor, ""]:
    """Mean over the supports most similar to each image of similarity x |said - softmax(support's logits)|^2.

    `said` is softmax(logits) and similarity the cosine; as released `said` is the logits, similarity the product of rows
    of unit L1 norm, and the sign is negative. An image in the memory is a neighbour of itself. The gradient is that of
    `said` alone.
    """
    order = 1 if as_released else 2
    similarity = nnf.normalize(z.detach(), p=order, dim=1) @ nnf.normalize(memory.z, p=order, dim=1).T
    near, index = similarity.topk(min(neighbours, len(memory.z)), dim=1)
    said = logits if as_released else logits.softmax(1)
    distance = (said[:, None] - memory.logits.softmax(1)[index]).square().sum(2)
    return (near * distance).mean() * (-1 if as_released else 1)


@dataclass
class TSD(Adaptation):
    """A step of Adam for each batch, batch norms on the statistics of the batch; dropout, unlike there, stays off.

    Features are those that the probe's weights are about (standardised).

    Args:
        lr: of Adam; in the released code 1e-4 for all parameters, 1e-3 for those of batch norms.
        update: all parameters of encoder and classifier, or the scales and offsets of batch norms.
        per_class: supports that a class keeps (`filter_K`); None is all.
        neighbours: of the local-clustering term.
        lam: weight of that term.
        as_released: with the released code's peculiarities.
        others: see `Adaptation`.

    Raises:
        BadInput: a local-clustering term as released, which has none.
    """

    lr: Positive
    update: Literal["all", "affine"]
    per_class: Count | None
    neighbours: Count
    lam: NotNegative
    as_released: bool

    @property
    def label(self) -> str:
        """The name of the method in tables: tsd or tsd_mended."""
        return "tsd" if self.as_released else "tsd_mended"

    def __post_init__(self) -> None:
        if self.as_released and self.lam:
            raise BadInput(
                f"lam={self.lam:g} with as_released=true: the released code runs without its local-clustering term; use lam=0 "
                "or as_released=false."
            )

    def start(self, model: Model) -> Classify:
        """A classifier for one stream: it returns the logits of a batch, then updates the model by them.

        Raises:
            BadInput: `update` is affine, and the encoder has no batch norm with scales and offsets.
        """
        norms, linear = model.batch_norms(), model.probe.linear
        parameters = affine(norms, "tsd") if self.update == "affine" else list(model.requires_grad_().parameters())
        optimizer, memory = torch.optim.Adam(parameters, lr=self.lr), PseudoLabels(linear, self.per_class)

        @torch.enable_grad()
        def classify(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
            z = model.features(images)
            logits = linear(z)
            memory.add(z, logits)
            loss = distillation(z, logits, memory.prototypes(), self.as_released)
            if self.lam:
                loss = loss + self.lam * local_clustering(z, logits, memory, self.neighbours, self.as_released)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return logits.detach()

        return classify
