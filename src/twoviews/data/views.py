"""Augmentation of a whole batch at once: uint8 images on any device in, float views out.

Every image has its own random parameters, with the distributions of torchvision's RandomResizedCrop,
RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale, RandomApply(GaussianBlur) and RandomSolarize(128),
applied in this order (that of SimCLR, MoCo v2 and BYOL) and followed by the normalisation. `Views.draw` makes the
parameters of all images on the CPU, `Views.__call__` applies them: in compiled code (kernel.c, on a GPU kernel.cu) or, with
the same result, in batched operations on tensors (pixels.py).

Shapes: B images, C channels, S the canvas side in px, h = w the view side in px.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from twoviews.data import kernel, kernel_cuda, pixels
from twoviews.errors import BadInput, nearest
from twoviews.ranges import Count, Fraction, NotNegative, Positive, Range

JITTER = (
    pixels.brightness,
    pixels.contrast,
    pixels.saturation,
    pixels.hue,
)  # the operations of ColorJitter, in its order
ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the centre
Share = Annotated[float, Range(above=0, at_most=1)]


@dataclass(frozen=True)
class View:
    """One recipe: the distributions that the parameters of a view are drawn from.

    Attributes:
        count: how many views are made by this recipe.
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

    count: Count = 1
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
        """Strength of each operation of `JITTER`; all 0 where jitter is never applied."""
        used = (self.brightness, self.contrast, self.saturation, self.hue)
        return used if self.jitter else (0.0, 0.0, 0.0, 0.0)

    @property
    def colour_operations(self) -> list[str]:
        """Names of those operations in use that need red, green and blue."""
        used = {"saturation": self.strengths[2], "hue": self.strengths[3], "grayscale": self.grayscale}
        return [name for name, strength in used.items() if strength]


@dataclass(frozen=True)
class Draw:
    """The parameters of one view of each of B images, on the CPU."""

    box: Float[Tensor, "B 4"]  # top, left, height, width in px of the original picture
    sizes: Float[Tensor, "B 2"]  # height and width of the original picture in px
    flip: Bool[Tensor, "B"]
    order: Int[Tensor, "B 4"]  # index into JITTER of the operation applied first, second, ...; -1 is none
    factors: Float[Tensor, "B 4"]  # of brightness, contrast and saturation, and the turn of the hue
    grayscale: Bool[Tensor, "B"]
    sigma: Float[Tensor, "B"]  # of the blur in px; 0 is none
    solarize: Bool[Tensor, "B"]

    def take(self, rows: Int[Tensor, "N"] | slice) -> "Draw":
        """The parameters of some of the images, e.g. those of one process."""
        return Draw(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class Views:
    """The augmentation of a run: `draw` the parameters of a batch, then call it on the images.

    Args:
        views: recipes by name, each a mapping of the fields of `View`; their order is the order of the views.
        size: side of the data's canvas in px, which is the side of a view that names none.
        channels: of the data.
        mean: of each channel, of pixels in [0, 1].
        std: of each channel, of pixels in [0, 1].

    Raises:
        BadInput: an unknown or impossible number in a recipe, or a colour operation on data that is not RGB.
    """

    def __init__(
        self,
        views: dict[str, dict],
        *,
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        recipes = [_recipe(name, numbers) for name, numbers in views.items()]
        if channels != 3:
            _refuse_colour(recipes, channels)
        self.recipes = tuple(recipe for recipe in recipes for _ in range(recipe.count))  # one per view
        self.sizes = tuple(_side(recipe.size, size) for recipe in self.recipes)  # of each view, in px
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)

    def __len__(self) -> int:
        """Number of views."""
        return len(self.recipes)

    def draw(self, sizes: Int[Tensor, "B 2"], generator: torch.Generator) -> list[Draw]:
        """Random parameters of every view of pictures of these original sizes (height, width in px).

        Drawn for the whole batch of all processes at once, they do not depend on the device or on who takes which rows.
        """
        return [_draw(recipe, sizes.double(), generator) for recipe in self.recipes]

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B C S S"], draws: Sequence[Draw]) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """One normalised float32 tensor per view, [B, C, h, w], on the device of the images."""
        render, made = compiled(images.device), []
        for draw, recipe, size in zip(draws, self.recipes, self.sizes, strict=True):
            x = render(images, size, *_arguments(images, draw), self.mean, self.std) if render else None
            made.append(_in_tensors(images, draw, recipe, size, self.mean, self.std) if x is None else x)
        return tuple(made)


@torch.no_grad()
def eval_view(
    images: UInt8[Tensor, "B C S S"],
    sizes: Int[Tensor, "B 2"],
    *,
    size: int,
    crop: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "B C {size} {size}"]:
    """The central square of each original picture, normalised, without randomness: Resize, then CenterCrop.

    Args:
        images: canvases, into which pictures of any shape were resized.
        sizes: original height and width of each picture in px.
        size: side of the result in px.
        crop: side of the square as a share of the picture's shorter side, e.g. 224 / 256; 1 takes all of it.
        mean: of each channel, of pixels in [0, 1].
        std: of each channel, of pixels in [0, 1].
    """
    statistics = [torch.tensor(values, dtype=torch.float32) for values in (mean, std)]
    if crop == 1 and size == images.shape[-1] and (sizes[:, 0] == sizes[:, 1]).all():  # nothing to resample
        return _normalise(images.float().div_(255), *statistics)
    if (sizes == sizes[:1]).all():  # one box for all
        sizes = sizes[:1]
    original = sizes.to("cpu", torch.float32)
    square = crop * original.amin(dim=1, keepdim=True).expand_as(original)
    to_canvas = images.shape[-1] / original
    start, extent = (original - square) / 2 * to_canvas, square * to_canvas
    if render := compiled(images.device):
        x = _whole(render, images, start, extent, size, *statistics)
        if x is not None:
            return x
    start, extent = (t.to(images.device, non_blocking=True) for t in (start, extent))
    return _normalise(pixels.resample(images, start, extent, size, bleed=True), *statistics)


def _draw(view: View, sizes: Float[Tensor, "B 2"], generator: torch.Generator) -> Draw:
    # One row in [0, 1) per image, always as long: changing one number of a recipe leaves the other draws as they are.
    row = torch.rand(len(sizes), 2 * ATTEMPTS + 16, generator=generator)
    area, shape, place, jitter, keys, flip, applied, gray, blurred, sigma, inverted = row.split(
        (ATTEMPTS, ATTEMPTS, 2, 4, 4, 1, 1, 1, 1, 1, 1), dim=1
    )
    strength = torch.tensor(view.strengths)
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = (centre - strength), centre + strength
    low[:3].clamp_(min=0)
    order = keys.argsort(dim=1)
    order = order.where((strength > 0)[order] & (applied < view.jitter), -1)
    return Draw(
        box=_boxes(view, sizes, area.double(), shape.double(), place.double()).float(),
        sizes=sizes.float(),
        flip=(flip < view.flip)[:, 0],
        order=order,
        factors=low + (high - low) * jitter,
        grayscale=(gray < view.grayscale)[:, 0],
        sigma=(view.sigma[0] + (view.sigma[1] - view.sigma[0]) * sigma).where(blurred < view.blur, 0)[:, 0],
        solarize=(inverted < view.solarize)[:, 0],
    )


def _boxes(
    view: View,
    sizes: Float[Tensor, "B 2"],
    area: Float[Tensor, "B K"],
    shape: Float[Tensor, "B K"],
    place: Float[Tensor, "B 2"],
) -> Float[Tensor, "B 4"]:
    """RandomResizedCrop's top, left, height and width in whole px: of the attempts in [0, 1) the first that fits."""
    height, width = sizes[:, :1], sizes[:, 1:]
    narrowest, widest = view.ratio
    area = (view.scale[0] + (view.scale[1] - view.scale[0]) * area) * height * width
    ratio = torch.exp(math.log(narrowest) + (math.log(widest) - math.log(narrowest)) * shape)
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    # None fits: as much of the centre as the range of ratios allows.
    central_h = torch.minimum(height, (width / narrowest).round())
    central_w = torch.minimum(width, (height * widest).round())
    found = fits.any(dim=1, keepdim=True)
    drawn = torch.cat((h.gather(1, first), w.gather(1, first)), dim=1)
    extent = torch.where(found, drawn, torch.cat((central_h, central_w), dim=1))
    room = sizes - extent
    start = torch.where(found, (place * (room + 1)).floor(), (room / 2).floor())
    return torch.cat((start, extent), dim=1)


def _on_canvas(images: Tensor, draw: Draw) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """Top left and extent of the boxes in px of the canvas."""
    to_canvas = images.shape[-1] / draw.sizes
    return draw.box[:, :2] * to_canvas, draw.box[:, 2:] * to_canvas


def _arguments(images: Tensor, draw: Draw) -> tuple[Tensor | float, ...]:
    """Of both forms of `render`, from `start` to `solarize_from`."""
    applied = (draw.flip, draw.order, draw.factors, draw.grayscale, draw.sigma, draw.solarize)
    return (*_on_canvas(images, draw), *applied, float(pixels.SOLARIZE_FROM))


def _whole(
    render: Callable[..., Tensor | None],
    images: Tensor,
    start: Float[Tensor, "_ 2"],
    extent: Float[Tensor, "_ 2"],
    size: int,
    mean: Tensor,
    std: Tensor,
) -> Float[Tensor, "B C {size} {size}"] | None:
    """What `render` makes of boxes out of which the filter reaches, and of nothing else."""
    boxes = start.expand(len(images), 2), extent.expand(len(images), 2)
    no, none = torch.zeros(len(images), dtype=torch.bool), torch.full((len(images), len(JITTER)), -1)
    return render(images, size, *boxes, no, none, none.float(), no, no.float(), no, 1.0, mean, std, bleed=True)


def compiled(device: torch.device) -> Callable[..., Tensor | None] | None:
    """`render` of the compiled code for a device; None where tensors make the views."""
    if device.type == "cpu":
        library = kernel.library()
        return functools.partial(kernel.render, library) if library else None
    return _checked(device) if device.type == "cuda" else None


@functools.cache
def _checked(device: torch.device) -> Callable[..., Tensor | None] | None:
    """`render` of kernel.cu for a GPU, once it was seen to make there what tensors make."""
    built = kernel_cuda.build(device)
    if built is None:
        return None
    render = functools.partial(kernel_cuda.render, built)
    try:
        if _agrees(render, device):
            return render
        reason = "its views are not those of tensors"
    except Exception as error:  # whatever a driver, or a private function of torch, has against it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(
        f"kernel.cu is of no use on {device} ({reason}): tensors make views there, more slowly.", stacklevel=4
    )
    return None


CHECKED = {  # everything that the kernel has to get right, in crops that grow and that shrink
    "size": 40,
    **dict.fromkeys(("flip", "blur"), 0.5),
    **dict.fromkeys(("brightness", "contrast", "saturation", "grayscale", "hue", "solarize"), 0.3),
    "jitter": 0.9,
}
APART = 1e-4  # at most, in standard deviations, here of a quarter of the range


@torch.no_grad()
def _agrees(render: Callable[..., Tensor | None], device: torch.device) -> bool:
    """Whether `render` makes the views there that tensors make on the CPU, which has no TF32."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 3, 64, 64), dtype=torch.uint8, generator=random)
    views = Views({"only": CHECKED}, size=64, channels=3, mean=[0.5] * 3, std=[0.25] * 3)
    (draw,) = views.draw(torch.randint(32, 97, (96, 2), generator=random), random)
    (size,), (recipe,), statistics, there = views.sizes, views.recipes, (views.mean, views.std), images.to(device)
    boxes = _on_canvas(images, draw)
    made = (
        render(there, size, *_arguments(images, draw), *statistics),
        _whole(render, there, *boxes, size, *statistics),
    )
    wanted = (
        _in_tensors(images, draw, recipe, size, *statistics),
        _normalise(pixels.resample(images, *boxes, size, bleed=True), *statistics),
    )
    differ = ~((torch.cat([x.cpu() for x in made if x is not None]) - torch.cat(wanted)).abs() <= APART)  # nan does
    # A px on the threshold of solarize may fall to either side.
    solarized = torch.cat((draw.solarize, torch.zeros_like(draw.solarize)))
    return not differ[~solarized].any() and differ[solarized].float().mean().item() < 1e-3


def _in_tensors(
    images: UInt8[Tensor, "B C S S"], draw: Draw, view: View, size: int, mean: Tensor, std: Tensor
) -> Float[Tensor, "B C {size} {size}"]:
    boxes = _on_canvas(images, draw)
    start, extent, flip = (t.to(images.device, non_blocking=True) for t in (*boxes, draw.flip))
    x = pixels.resample(images, start, extent, size, flip=flip if view.flip else None)
    for stage in draw.order.unbind(dim=1):
        for index, operation in enumerate(JITTER):
            _apply(operation, x, stage == index, draw.factors[:, index].view(-1, 1, 1, 1))
    _apply(pixels.grayscale, x, draw.grayscale)
    _apply(pixels.blur, x, draw.sigma > 0, draw.sigma)
    _apply(pixels.solarize, x, draw.solarize)
    return _normalise(x, mean, std)


def _normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return pixels.normalise(x, *(t.to(x.device, non_blocking=True) for t in (mean, std)))


def _apply(operation: Callable[..., Tensor], x: Tensor, chosen: Bool[Tensor, "B"], *parameters: Tensor) -> None:
    """Overwrite the chosen images of `x`; who they are is known on the CPU, so the device is never waited for."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        given = [p[rows].to(x.device, non_blocking=True) for p in parameters]
        rows = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, operation(x.index_select(0, rows), *given))


def _side(size: float | None, data_side: int) -> int:
    if size is None:
        return data_side
    return max(2, round(size * data_side if size <= 1 else size))


def _refuse_colour(recipes: Sequence[View], channels: int) -> None:
    needed = list(dict.fromkeys(name for recipe in recipes for name in recipe.colour_operations))
    if needed:
        listed = f"{', '.join(needed[:-1])} and {needed[-1]}, which need" if needed[1:] else f"{needed[0]}, which needs"
        count = f"{channels} channel{'' if channels == 1 else 's'}"
        raise BadInput(f"augmentation uses {listed} RGB images, but the data has {count}: use augmentation=no_color.")


def _recipe(name: str, numbers: dict[str, Any]) -> View:
    """`numbers` as a View, after the checks that the entry point makes for parameters outside such a table."""
    annotations = get_type_hints(View, include_extras=True)
    where = f"augmentation.views.{name}"
    for key, value in numbers.items():
        if key not in annotations:
            close = nearest(key, annotations).replace("'", f"'{where}.", 1)
            raise BadInput(f"{where}.{key} is no number of a view.{close} Known: {', '.join(annotations)}.")
        _check(f"{where}.{key}={value}", value, annotations[key])
    frozen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in numbers.items()}
    return View(**frozen)


def _check(said: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise BadInput(f"{said} is not a pair, smallest and largest, such as [0.1,1].")
        for one, kind in zip(value, get_args(annotation), strict=True):
            _check(said, one, kind)
        if value[0] > value[1]:
            raise BadInput(f"{said} has the larger number first: use [{value[1]},{value[0]}].")
    elif get_origin(annotation) is Annotated:
        kind, limits = get_args(annotation)
        if not isinstance(value, int if kind is int else int | float) or isinstance(value, bool):
            raise BadInput(f"{said} is not a {'whole ' if kind is int else ''}number.")
        if value not in limits:
            raise BadInput(f"{said} is out of range: it must be {limits}.")
    elif value is not None:  # size: a number or null
        _check(said, value, get_args(annotation)[0])
