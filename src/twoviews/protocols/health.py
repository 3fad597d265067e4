"""Health of an encoder without labels: whether features use all dimensions, and are similar for two views of an image.

Shapes: N images, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.config.recorded import largest_view
from twoviews.data.images import Images
from twoviews.data.views import Views
from twoviews.features import BATCH
from twoviews.layers import spread
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import generator
from twoviews.ranges import Fraction, NonNegativeInt, Range
from twoviews.runtime import autocast

# Thresholds of the advice. Small ResNets on CIFAR-10 and on digits had a spread of 0.16 and 22 to 27 effective dimensions
# before training, and 0.33 to 0.56 and 38 to 65 after some epochs of any method.
MAX_SIMILARITY = 0.995  # mean cosine of different images
MIN_DIMENSIONS = 5.0  # effective ones (RankMe)
MIN_SPREAD = 0.25


def rankme(x: Float[Tensor, "N F"]) -> float:
    """Effective rank, from 1 to min(N, F): exp of the entropy of the normalised singular values.

    Garrido et al., arXiv:2210.02885, eq. 1 and 2: of features as they are, neither centred nor normalised.
    """
    values = torch.linalg.svdvals(x.float()).double()
    # The same epsilon as in the paper; of features that are all 0 the rank is 1.
    p = values / values.sum().clamp(min=1e-30) + 1e-7
    return max(1.0, torch.special.entr(p).sum().exp().item())


def alignment(x: Float[Tensor, "N F"], y: Float[Tensor, "N F"]) -> float:
    """Mean squared distance of the unit features of two views of an image, in [0, 4].

    Wang and Isola, arXiv:2005.10242, sec. 4.1, alpha = 2.
    """
    return (_unit(x) - _unit(y)).square().sum(1).mean().item()


def uniformity(x: Float[Tensor, "N F"]) -> float:
    """Log of the mean of exp(-2 |u - v|^2) over pairs of different unit features, in [-8, 0]; 0 if all are one point.

    Wang and Isola, arXiv:2005.10242, sec. 4.1, t = 2. About -4 is the least that many points can reach.
    """
    u = _unit(x)
    # A point's distance to itself is left out exactly; rounding may give others a negative one.
    squared = (2 - 2 * (u @ u.T)).clamp(min=0).fill_diagonal_(torch.inf)
    return ((-2 * squared).exp().sum() / (len(u) * (len(u) - 1))).log().item()


def similarities(x: Float[Tensor, "N F"], y: Float[Tensor, "N F"]) -> tuple[float, float]:
    """Mean cosine of two views of one image, and of views of two different images."""
    u, v = _unit(x), _unit(y)
    own = (u * v).sum(1).sum()
    others = u.sum(0) @ v.sum(0) - own
    return (own / len(u)).item(), (others / (len(u) * (len(u) - 1))).item()


def _unit(x: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    return nnf.normalize(x.double(), dim=1)


def advice(values: dict[str, float]) -> str:
    """A sentence on what is wrong with an encoder that has these values of `Health`, and what to do; "" if nothing is."""
    if values["negative_similarity"] > MAX_SIMILARITY or values["rankme"] < 2:
        return (
            f"the features of different images are all but equal (mean cosine {values['negative_similarity']:.4f}, "
            f"{values['rankme']:.1f} effective dimensions): the encoder has collapsed; lower optimizer.lr, give the batch norms "
            "larger batches, and check that the views are not too alike (preview=true)."
        )
    if values["rankme"] < MIN_DIMENSIONS:
        return (
            f"the features use only {values['rankme']:.1f} effective dimensions: most of them have collapsed; lower "
            "optimizer.lr, or give the batch norms larger batches."
        )
    if values["spread"] < MIN_SPREAD:
        return (
            f"the features' spread is {values['spread']:.2f}, as of an untrained network: the encoder has learnt little yet, so "
            "train longer; if it was larger before, the encoder is collapsing, so lower optimizer.lr."
        )
    return ""


@dataclass
class Health(Protocol):
    """Spread, RankMe, alignment, uniformity and similarities of the encoder's features (before any projector).

    They are measured on some of the training images, the same ones in every run on the data: on their features under the
    eval transform, and on those of two views of each, random crops that may be mirrored. Crops and flips are by default those
    of the training, because only they leave an image what it is (a mirrored digit is another sign); runs with different ones
    are compared by the same `scale` and `flip` for all.

    Args:
        images: number of images; RankMe is at most so large, and at most the number of features.
        scale: area of a crop as a share of the picture, smallest and largest.
        flip: probability of mirroring left to right.
    """

    needs_labels = False

    images: Annotated[int, Range(at_least=2, usual="2000")]
    scale: Sequence[Annotated[float, Range(above=0, at_most=1)]]
    flip: Fraction
    every_epochs: NonNegativeInt

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Crops and flips of the run's views; of several the one with the largest crops."""
        return largest_view(config)

    @torch.no_grad()
    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """spread, rankme, alignment, uniformity, positive_similarity and negative_similarity (mean cosines); no labels needed.

        Features that end in a ReLU are never negative, so that their spread stays below 1 and their cosines above 0.
        """
        data = context.data
        chosen = torch.randperm(len(data.train), generator=generator("health", len(data.train)))[: self.images]
        shown = data.train.subset(chosen)
        x = context.embed(shown)
        first, second = self._views(context, shown)
        positive, negative = similarities(first, second)
        values = {
            "spread": spread(x).item(),
            "rankme": rankme(x),
            "alignment": alignment(first, second),
            "uniformity": uniformity(x),
            "positive_similarity": positive,
            "negative_similarity": negative,
        }
        note = "health/spread is that of the features; train/spread is of the projections."
        return EvaluationResult(values, notes=[note], advice=advice(values))

    def _views(self, context: EvaluationContext, images: Images) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"]]:
        """Features of two random views of each image; the encoder is in eval mode."""
        data, encoder, training = context.data, context.encoder, context.encoder.training
        recipe = {"count": 2, "scale": self.scale, "flip": self.flip}
        make = Views({"both": recipe}, size=data.size, channels=data.channels, mean=data.mean, std=data.std)
        encoder.eval()
        rows = []
        for number, (pixels, sizes, _) in enumerate(images.batches(BATCH[context.device.type])):
            views = make(pixels.to(context.device), make.draw(sizes, generator("health", "views", number)))
            with autocast(context.device, context.dtype):
                rows.append([encoder(view.to(memory_format=context.memory_format)).float() for view in views])
        encoder.train(training)
        first, second = zip(*rows, strict=True)
        return torch.cat(first), torch.cat(second)
