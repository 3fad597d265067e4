"""Augmentation of a whole batch at once: uint8 images on any device in, float views out.

Every image has its own random parameters, with the distributions of torchvision's RandomResizedCrop,
RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale, RandomApply(GaussianBlur) and RandomSolarize(128),
applied in this order (that of SimCLR, MoCo v2 and BYOL) and followed by the normalisation. `Views.draw` makes the
parameters of all images on the CPU, `Views.__call__` applies them: in compiled code (kernel.c, on a GPU kernel.cu) or, with
the same result, in batched operations on tensors (pixels.py).

Shapes: B images, V views of each, C channels, S the canvas side in px, h = w the view side in px.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_origin, get_type_hints

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from twoviews.data import kernel, kernel_cuda, pixels
from twoviews.errors import BadInput, nearest, shown
from twoviews.ranges import Fraction, Length, NotNegative, Positive, Range, Repeats
from twoviews.signatures import complaint, unusable

JITTER = (
    pixels.brightness,
    pixels.contrast,
    pixels.saturation,
    pixels.hue,
)  # the operations of ColorJitter, in its order
ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the centre
Share = Annotated[float, Range(above=0, at_most=1)]
# Images, the side of each view, parameters of all views, dtype and memory format to the views; None: it cannot make them.
Render = Callable[..., list[Tensor] | None]


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
    """The parameters of V views of each of B images, on the CPU; an index takes views, and from one view images."""

    box: Float[Tensor, "*V B 4"]  # top, left, height, width in px of the original picture
    sizes: Float[Tensor, "*V B 2"]  # height and width of the original picture in px
    flip: Bool[Tensor, "*V B"]
    order: Int[Tensor, "*V B 4"]  # index into JITTER of the operation applied first, second, ...; -1 is none
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
        views: Annotated[dict[str, dict], Length(at_least=1)],
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
        self._numbers = _numbers(self.recipes)

    def __len__(self) -> int:
        """Number of views."""
        return len(self.recipes)

    def draw(self, sizes: Int[Tensor, "B 2"], generator: torch.Generator, *, rank: int = 0, processes: int = 1) -> Draw:
        """Random parameters of every view of pictures of these original sizes (height, width in px).

        With several processes, of the pictures of this one, number `rank` of `processes`, which has the rows rank,
        rank + processes, ... of the whole batch. The random numbers are drawn for the whole batch, so that a picture gets
        the same ones whoever takes it, on whatever device.
        """
        # A row in [0, 1) for each image, always as long: changing one number of a recipe leaves the other draws as they are.
        rows = torch.rand(len(self), len(sizes) * processes, 2 * ATTEMPTS + 16, generator=generator)
        return _draw(self._numbers, rows[:, rank::processes], sizes.double())

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "B C S S"],
        draws: Draw,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """One normalised tensor per view, [B, C, h, w], on the device of the images.

        Args:
            images: canvases.
            draws: from `draw`, of the same images.
            dtype: float32, bfloat16 or float16, to which the views are rounded.
            channels_last: the memory format.
        """
        form = {"dtype": dtype, "memory_format": torch.channels_last if channels_last else torch.contiguous_format}
        render, made = compiled(images.device), None
        if render:
            made = render(images, self.sizes, *_arguments(images, draws), self.mean, self.std, **form)
        if made is None:
            in_tensors = zip(draws, self.recipes, self.sizes, strict=True)
            made = [_in_tensors(images, *one, self.mean, self.std).to(**form) for one in in_tensors]
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


def _numbers(recipes: Sequence[View]) -> dict[str, Tensor]:
    """Of each recipe, [V, 1] or [_, V, 1], what `_draw` multiplies and compares random numbers with."""
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
    found = {}
    for name, pair in pairs.items():
        dtype = torch.float32 if name == "sigma" else torch.double
        for end, values in (
            ("from", [a for a, _ in pair]),
            ("to", [b for _, b in pair]),
            ("range", [b - a for a, b in pair]),
        ):
            found[f"{name}_{end}"] = torch.tensor(values, dtype=dtype)[:, None]
    chances = [(view.flip, view.jitter, view.grayscale, view.blur, 0.0, view.solarize) for view in recipes]
    return {
        **found,
        "chances": torch.tensor(chances, dtype=torch.float32).T[..., None],
        "used": (strength > 0)[:, None],  # [V, 1, 4]
        "factors_from": low.T[..., None],
        "factors_range": (high - low).T[..., None],
    }


def _draw(numbers: dict[str, Tensor], rows: Float[Tensor, "V B R"], sizes: Float[Tensor, "B 2"]) -> Draw:
    """What the random rows amount to, for all views at once; images last, so that what is alike lies side by side."""
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
    """RandomResizedCrop's top, left, height and width in whole px: of the attempts in [0, 1) the first that fits."""
    area, shape, place = random.split((ATTEMPTS, ATTEMPTS, 2))
    sides = sizes.T.contiguous()[:, None]
    height, width = sides
    area = (numbers["scale_from"] + numbers["scale_range"] * area).mul_(height).mul_(width)
    ratio = (numbers["log_ratio_from"] + numbers["log_ratio_range"] * shape).exp_()
    h, w = (area / ratio).sqrt_().round_(), (area * ratio).sqrt_().round_()
    fits = (w > 0).logical_and_(w <= width).logical_and_(h > 0).logical_and_(h <= height)
    found, first = fits.to(torch.uint8).max(dim=0, keepdim=True)
    found = found.bool()
    # None fits: as much of the centre as the range of ratios allows.
    central_h = torch.minimum(height, (width / numbers["ratio_from"]).round())
    central_w = torch.minimum(width, (height * numbers["ratio_to"]).round())
    drawn = torch.cat((h.gather(0, first), w.gather(0, first)))
    extent = torch.where(found, drawn, torch.stack((central_h, central_w)))
    room = sides - extent
    start = torch.where(found, (place * (room + 1)).floor(), (room / 2).floor())
    return torch.cat((start, extent))


def _on_canvas(images: Tensor, draw: Draw) -> tuple[Float[Tensor, "*V B 2"], Float[Tensor, "*V B 2"]]:
    """Top left and extent of the boxes in px of the canvas."""
    to_canvas = images.shape[-1] / draw.sizes
    return draw.box[..., :2] * to_canvas, draw.box[..., 2:] * to_canvas


def _arguments(images: Tensor, draw: Draw) -> tuple[Tensor | float, ...]:
    """Of both forms of `render`, from `start` to `solarize_from`."""
    applied = (draw.flip, draw.order, draw.factors, draw.grayscale, draw.sigma, draw.solarize)
    return (*_on_canvas(images, draw), *applied, float(pixels.SOLARIZE_FROM))


def _whole(
    render: Render,
    images: Tensor,
    start: Float[Tensor, "_ 2"],
    extent: Float[Tensor, "_ 2"],
    size: int,
    mean: Tensor,
    std: Tensor,
) -> Float[Tensor, "B C {size} {size}"] | None:
    """What `render` makes of boxes out of which the filter reaches, and of nothing else."""
    count = len(images)
    boxes = start.expand(1, count, 2), extent.expand(1, count, 2)
    no, none = torch.zeros(1, count, dtype=torch.bool), torch.full((1, count, len(JITTER)), -1)
    made = render(images, [size], *boxes, no, none, none.float(), no, no.float(), no, 1.0, mean, std, bleed=True)
    return None if made is None else made[0]


def compiled(device: torch.device) -> Render | None:
    """`render` of the compiled code for a device; None where tensors make the views."""
    if device.type == "cpu":
        library = kernel.library()
        return functools.partial(kernel.render, library) if library else None
    found = _checked(device) if device.type == "cuda" else None
    return None if isinstance(found, str) else found


def reason_for_tensors(device: torch.device) -> str | None:
    """Why tensors make the views on a device; None where compiled code does, after it was seen to be right there."""
    if device.type == "cpu":
        return kernel.reason()
    found = _checked(device) if device.type == "cuda" else f"there is no kernel for {device.type}"
    return found if isinstance(found, str) else None


@functools.cache
def _checked(device: torch.device) -> Render | str:
    """`render` of kernel.cu for a GPU, once it was seen to make there what tensors make; else why it is of no use."""
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        return "TWOVIEWS_KERNEL=0"
    try:
        render = functools.partial(kernel_cuda.render, kernel_cuda.build(device))
        return render if _agrees(render, device) else "kernel.cu makes other views than tensors do"
    except Exception as error:  # whatever a driver, or a private function of torch, has against it
        return f"kernel.cu, {type(error).__name__}: {error}".splitlines()[0]


CHECKED = {  # everything that the kernel has to get right, in crops that grow and that shrink
    "size": 40,
    **dict.fromkeys(("flip", "blur"), 0.5),
    **dict.fromkeys(("brightness", "contrast", "saturation", "grayscale", "hue", "solarize"), 0.3),
    "jitter": 0.9,
}
APART = 1e-4  # at most, in standard deviations, here of a quarter of the range


@torch.no_grad()
def _agrees(render: Render, device: torch.device) -> bool:
    """Whether `render` makes the views there that tensors make on the CPU, which has no TF32, in all forms."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 3, 64, 64), dtype=torch.uint8, generator=random)
    views = Views(
        {"only": CHECKED, "half": {**CHECKED, "size": 20}}, size=64, channels=3, mean=[0.5] * 3, std=[0.25] * 3
    )
    draws = views.draw(torch.randint(32, 97, (96, 2), generator=random), random)
    statistics, there = (views.mean, views.std), images.to(device)
    made = render(there, views.sizes, *_arguments(images, draws), *statistics)
    boxes, size = _on_canvas(images, draws[0]), views.sizes[0]
    whole = _whole(render, there, *boxes, size, *statistics)
    if made is None or whole is None:
        return False
    for x, draw, recipe in zip(made, draws, views.recipes, strict=True):
        differ = _differ(x, _in_tensors(images, draw, recipe, x.shape[-1], *statistics))
        # A px on the threshold of solarize may fall to either side.
        if differ[~draw.solarize].any() or differ[draw.solarize].float().mean().item() >= 1e-3:
            return False
    if _differ(whole, _normalise(pixels.resample(images, *boxes, size, bleed=True), *statistics)).any():
        return False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            form = {"dtype": dtype, "memory_format": memory_format}
            again = render(there, views.sizes, *_arguments(images, draws), *statistics, **form)
            for x, y in zip(made, again or [], strict=True):
                if not (y.equal(x.to(dtype)) and y.is_contiguous(memory_format=memory_format)):
                    return False
    return True


def _differ(x: Tensor, wanted: Tensor) -> Bool[Tensor, "B C h w"]:
    """On the CPU, and also where `x` is nan."""
    return ~((x.cpu() - wanted).abs() <= APART)


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
    where = f"views.{name}"
    for key, value in numbers.items():
        if key not in annotations:
            close = nearest(key, annotations).replace("'", f"'{where}.", 1)
            raise BadInput(f"{where}.{key} is no number of a view.{close} Known: {', '.join(annotations)}.")
        if wrong := complaint(value, annotations[key]) or unusable(value):
            raise BadInput(f"{where}.{key}={shown(value)} {wrong}.")
        if get_origin(annotations[key]) is tuple and value[0] > value[1]:
            raise BadInput(f"{where}.{key}={shown(value)} has the larger number first: use [{value[1]},{value[0]}].")
    frozen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in numbers.items()}
    return View(**frozen)
