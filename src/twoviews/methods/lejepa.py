"""LeJEPA: all views of an image agree, and the embeddings of all images are an isotropic Gaussian.

Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", arXiv:2511.08544,
and MINIMAL.md of rbalestr-lab/lejepa. No teacher, no stop-gradient, no predictor.
Shapes: V views of B images a process, N over all processes, G of the views global; D embedding, M directions.
Letters as in the paper: z embeddings, a directions, t frequencies, lambda the weight of SIGReg.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import encode_crops, mlp, spread
from twoviews.methods.method import Collapse, Method, Output
from twoviews.ranges import Range, Size

KNOTS, T_MAX = 17, 3.0  # of the quadrature, as in the authors' code


def invariance(z: Float[Tensor, "V B D"], z_global: Float[Tensor, "G B D"]) -> Float[Tensor, ""]:
    """Mean over views, images and dimensions of the squared distance from the mean of the global views, which has gradient."""
    return (z - z_global.mean(0)).square().mean()


def random_directions(dim: int, count: int, device: torch.device) -> Float[Tensor, "D M"]:
    """Unit columns from the device's generator, uniform over the sphere, equal on all processes."""
    a = distributed.broadcast(torch.randn(dim, count, device=device))
    return nnf.normalize(a, dim=0)


def sigreg(z: Float[Tensor, "V B D"], a: Float[Tensor, "D M"]) -> Float[Tensor, ""]:
    """Sketched isotropic Gaussian regularisation: Epps and Pulley's test of all N images, mean over views and directions.

    N times the integral over |t| < 3 of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), where phi is the empirical characteristic
    function along a direction. About 1.05 for Gaussian embeddings, whatever N, and 0.40 N when all are 0.
    """
    t = torch.linspace(0, T_MAX, KNOTS, device=z.device)
    gaussian = torch.exp(-t.square() / 2)
    with torch.autocast(z.device.type, enabled=False):
        angles = (z.float() @ a)[..., None] * t  # [V, B, M, T]
    images = z.shape[1] * distributed.processes()
    sums = torch.stack([angles.cos().sum(1), angles.sin().sum(1)])  # [2, V, M, T]
    real, imaginary = distributed.sum_with_gradient(sums) / images
    error = (real - gaussian).square() + imaginary.square()
    # Even in t: twice the integral over t >= 0.
    return 2 * images * torch.trapezoid(error * gaussian, t, dim=-1).mean()


class LeJEPA(Method):
    """The paper's loss for any number of views; global are those of the largest size.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's two hidden layers.
        embed_dim: D.
        directions: M, drawn anew for each forward pass.
        sigreg_weight: lambda; the invariance has 1 - lambda. Too small, the embeddings collapse.
    """

    views = None
    batch_dependence = "characteristic functions"
    collapses = (
        Collapse(
            "std",
            "the embeddings' dimensions should have a standard deviation of about 1, and they hardly vary. Raise "
            "sigreg_weight, or use larger batches.",
            below=0.1,
        ),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        directions: Annotated[int, Range(at_least=1, at_most=100_000, usual="256 to 4096")],
        sigreg_weight: Annotated[float, Range(above=0, below=1, usual="0.01 to 0.1")],
    ):
        super().__init__()
        self.directions, self.sigreg_weight = directions, sigreg_weight
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, hidden_dim, embed_dim])

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Refuse micro-batches of one image, which have no distribution; no notes."""
        if micro_batch < 2:
            accumulate = f" / accumulate={batch_size // micro_batch}" if micro_batch < batch_size else ""
            raise BadInput(
                f"batch_size={batch_size}{accumulate} leaves LeJEPA without a distribution to compare with a Gaussian; use at "
                f"least {2 * (batch_size // micro_batch)}, usually 128 or more."
            )
        return []

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Views of one size share batch-norm statistics in the encoder, all views in the projector.

        Raises:
            BadInput: there are fewer than two views.
        """
        if len(views) < 2:
            raise BadInput(
                "LeJEPA compares views of an image and the augmentation makes one; choose another augmentation."
            )
        z = self.projector(encode_crops(self.encoder, views)).float().unflatten(0, (len(views), -1))
        largest = max(view.shape[-1] for view in views)
        z_global = torch.stack(
            [embedding for embedding, view in zip(z, views, strict=True) if view.shape[-1] == largest]
        )
        regularity = sigreg(z, random_directions(z.shape[2], self.directions, z.device))
        agreement = invariance(z, z_global)
        loss = self.sigreg_weight * regularity + (1 - self.sigreg_weight) * agreement
        # About 1 when embeddings are Gaussian, 0 when all are equal; the spread is of directions only.
        terms = {"sigreg": regularity, "invariance": agreement, "std": z[0].std(0).mean()}
        return Output(loss, {"spread": spread(z[0]), **{name: term.detach() for name, term in terms.items()}})
