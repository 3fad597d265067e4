"""Features of whole image sets, computed once for all protocols that look at them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.data.images import ImageData, Images
from twoviews.data.views import eval_view
from twoviews.runtime import autocast

BATCH = 512  # images a forward pass; part of no result, only of its memory


@dataclass(frozen=True)
class Features:
    """x [N, F] in float32 on the device, y [N] classes."""

    x: Float[Tensor, "N F"]
    y: Int[Tensor, " N"]


class Pixels(Encoder):
    """The normalised pixels themselves, averaged down to 32 x 32 where there are more: what an encoder has to beat."""

    def __init__(self, channels: int, image_size: int):
        super().__init__()
        self.side = min(image_size, 32)
        self.out_dim = channels * self.side**2

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """[B, out_dim]."""
        return nnf.adaptive_avg_pool2d(images, self.side).flatten(1)


class Judged:
    """An encoder with the labelled images it is judged on; features are computed when first asked for.

    Args:
        encoder: in whatever mode; features are taken in eval mode and the mode is put back.
        data: memory and test images with labels.
        device: where to compute.
        dtype: number format of the forward pass.
        channels_last: memory format of the images.
    """

    def __init__(
        self, encoder: Encoder, data: ImageData, device: torch.device, dtype: torch.dtype, channels_last: bool = False
    ):
        self.encoder, self.data, self.device, self.dtype = encoder, data, device, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @cached_property
    def memory(self) -> Features:
        """Of the bank that kNN votes with and linear classifiers learn from."""
        assert self.data.memory is not None
        return self.embed(self.data.memory)

    @cached_property
    def test(self) -> Features:
        """Of the images that are classified."""
        assert self.data.test is not None
        return self.embed(self.data.test)

    @torch.no_grad()
    def embed(self, images: Images) -> Features:
        """Features of all images in their order, under the eval transform."""
        training = self.encoder.training
        self.encoder.eval()
        x = torch.empty(len(images), self.encoder.out_dim, device=self.device)
        for pixels, sizes, index in images.batches(BATCH):
            batch = eval_view(
                pixels.to(self.device, non_blocking=True),
                sizes,
                size=self.data.size,
                crop=1.0,
                mean=self.data.mean,
                std=self.data.std,
            )
            with autocast(self.device, self.dtype):
                x[index.to(self.device)] = self.encoder(batch.to(memory_format=self.memory_format)).float()
        self.encoder.train(training)
        assert images.labels is not None
        return Features(x, images.labels.to(self.device).long())
