"""Random parameters of views, drawn for whole batches on the CPU.

Shapes: B images, V views of each.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twoviews.ranges import Fraction, NotNegative, Positive, Range, Repeats

ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the centre
NUMBERS_PER_IMAGE = 2 * ATTEMPTS + 16  # random numbers in [0, 1) for each view of an image
Share = Annotated[float, Range(above=0, at_most=1)]


@dataclass(frozen=True)
class View:
    """The distributions of the random parameters of a view.

    Attributes:
        count: number of views with these distributions.
        size: side of the view in px; up to 1 a share of the data's side, null that side itself.
        scale: area of the crop as a share of the picture, smallest and largest.
        ratio: width / height of the crop, smallest and largest.
        flip: probability of mirroring left to right.
        jitter: probability of changing brightness, contrast, saturation and hue, in random order.
        brightness: strength s: factor uniform in [max(0, 1 - s), 1 + s]; likewise contrast and saturation.
        contrast: strength.
        saturation: strength.
        hue: turn of the colour circle, uniform in [-hue, hue].
        grayscale: probability of losing the colours.
        blur: probability of a Gaussian blur.
        sigma: its standard deviation in px, smallest and largest.
        solarize: probability of inverting the bright half.
    """

    count: Repeats = 1
    size: Positive | None = None
    scale: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Fraction = 0.0
    jitter: Fraction = 0.0
    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Annotated[float, Range(at_least=0, at_most=0.5)] = 0.0
    grayscale: Fraction = 0.0
    blur: Fraction = 0.0
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    solarize: Fraction = 0.0

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Strength of brightness, contrast, saturation and hue; all 0 where jitter is never applied."""
        used = (self.brightness, self.contrast, self.saturation, self.hue)
        return used if self.jitter else (0.0, 0.0, 0.0, 0.0)

    @property
    def colour_operations(self) -> list[str]:
        """Names of the operations in use that need RGB images."""
        used = {"saturation": self.strengths[2], "hue": self.strengths[3], "grayscale": self.grayscale}
        return [name for name, strength in used.items() if strength]


@dataclass(frozen=True)
class Draw:
    """Parameters of V views of each of B images, on the CPU; an index selects views, or images if there is only one view."""

    box: Float[Tensor, "*V B 4"]  # top, left, height, width in px of the original picture
    sizes: Float[Tensor, "*V B 2"]  # height and width of the original picture in px
    flip: Bool[Tensor, "*V B"]
    order: Int[Tensor, "*V B 4"]  # index into rendering.JITTER of the operation applied first, second, ...; -1 is none
    factors: Float[Tensor, "*V B 4"]  # of brightness, contrast and saturation, and the turn of the hue
    grayscale: Bool[Tensor, "*V B"]
    sigma: Float[Tensor, "*V B"]  # of the blur in px; 0 is none
    solarize: Bool[Tensor, "*V B"]

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, index: int | slice) -> "Draw":
        return Draw(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __iter__(self) -> Iterator["Draw"]:
        return (self[index] for index in range(len(self)))


def distributions(recipes: Sequence[View]) -> dict[str, Tensor]:
    """Limits and probabilities of each view, [V, 1] or [_, V, 1], with which `draw` combines random numbers."""
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    strength = torch.tensor([view.strengths for view in recipes], dtype=torch.float32)
    low, high = centre - strength, centre + strength
    low[:, :3].clamp_(min=0)
    pairs = {
        "scale": [view.scale for view in recipes],
        "log_ratio": [tuple(map(math.log, view.ratio)) for view in recipes],
        "ratio": [view.ratio for view in recipes],
        "sigma": [view.sigma for view in recipes],
    }
    limits = {}
    for name, pair in pairs.items():
        dtype = torch.float32 if name == "sigma" else torch.double
        for end, values in (
            ("from", [a for a, _ in pair]),
            ("to", [b for _, b in pair]),
            ("range", [b - a for a, b in pair]),
        ):
            limits[f"{name}_{end}"] = torch.tensor(values, dtype=dtype)[:, None]
    chances = [(view.flip, view.jitter, view.grayscale, view.blur, 0.0, view.solarize) for view in recipes]
    return {
        **limits,
        "chances": torch.tensor(chances, dtype=torch.float32).T[..., None],
        "used": (strength > 0)[:, None],  # [V, 1, 4]
        "factors_from": low.T[..., None],
        "factors_range": (high - low).T[..., None],
    }


def draw(numbers: dict[str, Tensor], rows: Float[Tensor, "V B R"], sizes: Float[Tensor, "B 2"]) -> Draw:
    """The parameters that random numbers in [0, 1) stand for, computed for all views at once.

    Args:
        numbers: from `distributions`.
        rows: R = NUMBERS_PER_IMAGE random numbers for each view of each image.
        sizes: original height and width of each image in px.
    """
    # Images are the last axis, so that numbers of one kind are adjacent in memory.
    of_box, jitter, _, choices = rows.movedim(2, 0).split((2 * ATTEMPTS + 2, 4, 4, 6))
    flip, applied, grayscale, blurred, _, solarize = choices.contiguous() < numbers["chances"]
    order = rows[..., 2 * ATTEMPTS + 6 : 2 * ATTEMPTS + 10].argsort(dim=2)
    used = numbers["used"].expand_as(order).gather(2, order).logical_and_(applied[..., None])
    sigma = numbers["sigma_from"] + numbers["sigma_range"] * choices[4]
    factors = numbers["factors_from"] + numbers["factors_range"] * jitter.contiguous()
    box = _boxes(numbers, sizes, of_box.to(torch.double, memory_format=torch.contiguous_format))
    return Draw(
        box=box.to(torch.float32).movedim(0, 2),
        sizes=sizes.float().expand(len(rows), -1, -1),
        flip=flip,
        order=order.where(used, -1),
        factors=factors.movedim(0, 2),
        grayscale=grayscale,
        sigma=sigma.where(blurred, 0),
        solarize=solarize,
    )


def _boxes(
    numbers: dict[str, Tensor], sizes: Float[Tensor, "B 2"], random: Float[Tensor, "K V B"]
) -> Float[Tensor, "4 V B"]:
    """Top, left, height and width of RandomResizedCrop in whole px: the first of the attempts that fits into the image."""
    area, shape, place = random.split((ATTEMPTS, ATTEMPTS, 2))
    sides = sizes.T.contiguous()[:, None]
    height, width = sides
    area = (numbers["scale_from"] + numbers["scale_range"] * area).mul_(height).mul_(width)
    ratio = (numbers["log_ratio_from"] + numbers["log_ratio_range"] * shape).exp_()
    h, w = (area / ratio).sqrt_().round_(), (area * ratio).sqrt_().round_()
    fits = (w > 0).logical_and_(w <= width).logical_and_(h > 0).logical_and_(h <= height)
    any_fits, first = fits.to(torch.uint8).max(dim=0, keepdim=True)
    any_fits = any_fits.bool()
    # None fits: as much of the centre as the range of ratios allows.
    central_h = torch.minimum(height, (width / numbers["ratio_from"]).round())
    central_w = torch.minimum(width, (height * numbers["ratio_to"]).round())
    drawn = torch.cat((h.gather(0, first), w.gather(0, first)))
    extent = torch.where(any_fits, drawn, torch.stack((central_h, central_w)))
    room = sides - extent
    start = torch.where(any_fits, (place * (room + 1)).floor(), (room / 2).floor())
    return torch.cat((start, extent))


def on_canvas(images: Tensor, draw: Draw) -> tuple[Float[Tensor, "*V B 2"], Float[Tensor, "*V B 2"]]:
    """Top left corner and extent of the boxes in px of the canvas."""
    to_canvas = images.shape[-1] / draw.sizes
    return draw.box[..., :2] * to_canvas, draw.box[..., 2:] * to_canvas
