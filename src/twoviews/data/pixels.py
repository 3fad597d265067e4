"""The image operations of the augmentation, each on a batch in which every image has its own parameter.

Pixels are float32 in [0, 1]. Given equal parameters the results are those of torchvision's float tensor operations to
about 1e-6. Shapes: B images, C channels, H x W px before and h x w px after resampling.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
SOLARIZE_FROM = 128 / 255  # RandomSolarize(128) on 8-bit pixels


def resample(
    images: UInt8[Tensor, "B C H W"],
    start: Float[Tensor, "_ 2"],
    extent: Float[Tensor, "_ 2"],
    size: int,
    *,
    flip: Bool[Tensor, " B"] | None = None,
    bleed: bool = False,
) -> Float[Tensor, "B C {size} {size}"]:
    """The box of each image at size x size px: bilinear with antialiasing, as two matrix products.

    Args:
        images: square, H = W.
        start: top and left of the box in px; fractions of a px are weighed by the part covered. One row: the same box in
            all images, which is several times as fast.
        extent: height and width of the box in px.
        size: side of the result in px.
        flip: images to mirror left to right.
        bleed: whether the filter sees pixels beyond the box, as in resize-then-crop (never beyond the image).
    """
    count, channels, side, _ = images.shape
    mirrored = None if flip is None else torch.stack((torch.zeros_like(flip), flip), dim=1)
    weights = _triangles(start, extent, side, size, mirrored, bleed)
    if len(start) == 1 < count:
        x = images.float() @ weights[0, 1].mT
        return (x.mT @ weights[0, 0].mT).mT.contiguous().div_(255)
    # [B, H, C, W]: the layout in which both products are plain batched ones, without a copy of the weights per channel.
    x = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = torch.bmm(weights[:, 0], x.view(count, side, channels * side))
    x = torch.bmm(x.view(count, size * channels, side), weights[:, 1].mT)
    return x.view(count, size, channels, size).transpose(1, 2).contiguous().div_(255)


def _triangles(
    start: Float[Tensor, "B 2"],
    extent: Float[Tensor, "B 2"],
    side: int,
    size: int,
    mirrored: Bool[Tensor, "B 2"] | None,
    bleed: bool,
) -> Float[Tensor, "B 2 {size} {side}"]:
    """Weight of each input px (last axis) for each output px: a triangle as wide as an output px, at least an input px.

    The filter of PIL and of torchvision's antialias=True; rows sum to 1.
    """
    step = (extent / size)[..., None]  # input px per output px
    centre = torch.arange(size, device=start.device) + 0.5
    centre = centre if mirrored is None else torch.where(mirrored[..., None], size - centre, centre)
    edge = torch.arange(side, device=start.device) - start[..., None]  # of each input px, relative to the box
    distance = (edge + 0.5).unsqueeze(-2) - (centre * step).unsqueeze(-1)
    weights = distance.abs_().neg_().add_(step.clamp(min=1).unsqueeze(-1)).clamp_(min=0)
    if not bleed:
        covered = torch.minimum(edge + 1, extent[..., None]) - edge.clamp(min=0)
        weights *= covered.clamp_(0, 1).unsqueeze(-2)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def grey(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
    """Luma of RGB images; of any other number of channels their mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = LUMA
    return (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)


def brightness(x: Float[Tensor, "B C H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B C H W"]:
    """`x` times the factor: 0 is black, 1 leaves the image as it is."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Float[Tensor, "B C H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B C H W"]:
    """`x` moved from the mean grey of the image: 0 is that grey, 1 leaves the image as it is."""
    return (x * factor).add_(grey(x).mean(dim=(2, 3), keepdim=True) * (1 - factor)).clamp_(0, 1)


def saturation(x: Float[Tensor, "B 3 H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    """`x` moved from its own grey version: 0 is grey, 1 leaves the image as it is."""
    return (x * factor).add_(grey(x).mul_(1 - factor)).clamp_(0, 1)


def hue(x: Float[Tensor, "B 3 H W"], turn: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    """`x` with its HSV hue turned by -0.5 to 0.5 of the colour circle; 0 leaves the image as it is.

    A channel equals the HSV value within 1/6 turn of its own hue (red 0, green 1/3, blue 2/3), falls to the smallest
    channel at 1/3 turn and stays there: the six cases of the usual conversion in one expression.
    """
    red, green, blue = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # A grey pixel has no hue: any finite number serves, because the chroma it is multiplied with is 0.
    sixth = chroma.clamp(min=torch.finfo(x.dtype).tiny).reciprocal_().div_(6)
    angle = torch.where(
        value == red,
        (green - blue).mul_(sixth),
        torch.where(value == green, (blue - red).mul_(sixth).add_(1 / 3), (red - green).mul_(sixth).add_(2 / 3)),
    )
    away = (angle + turn) - torch.arange(3, device=x.device).view(1, 3, 1, 1) / 3
    away = away.sub_(away.round()).abs_()  # in turns, 0 to 0.5
    return value - away.mul_(6).sub_(1).clamp_(0, 1).mul_(chroma)


def grayscale(x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """`x` without colour, as three equal channels."""
    return grey(x).expand_as(x)


def blur(x: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """Gaussian blur of standard deviation `sigma` px, the edges reflected; H = W.

    The kernel is an odd number of px near a tenth of the side and at least 3, as in SimCLR: 3 at 32 px, 9 at 96 px and
    23 at 224 px.
    """
    count, channels, side, _ = x.shape
    taps = _reflected_taps(side, max(1, side // 20), x.device)
    offset = torch.arange(len(taps), device=x.device) - len(taps) // 2
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    kernel /= kernel.sum(dim=1, keepdim=True)
    matrix = (kernel @ taps.flatten(1)).view(count, side, side)
    rows = torch.bmm(matrix, x.transpose(1, 2).reshape(count, side, channels * side))
    both = torch.bmm(rows.view(count, side * channels, side), matrix.mT)
    return both.view(count, side, channels, side).transpose(1, 2)


@lru_cache(maxsize=8)
def _reflected_taps(side: int, radius: int, device: torch.device) -> Float[Tensor, "{2*radius+1} {side} {side}"]:
    """1 where tap k of output px i (second axis) reads input px j (last axis), the edge px not repeated; else 0."""
    source = torch.arange(side) + torch.arange(-radius, radius + 1)[:, None]
    source = (side - 1) - ((side - 1) - source.abs()).abs()
    return torch.nn.functional.one_hot(source, side).float().to(device)


def solarize(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """`x` with its bright half inverted: 1 - x where x is at least 128/255."""
    return torch.where(x >= SOLARIZE_FROM, 1 - x, x)


def normalise(
    x: Float[Tensor, "B C H W"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "B C H W"]:
    """`x` minus the mean, over the standard deviation of each channel; overwrites `x`."""
    return x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
