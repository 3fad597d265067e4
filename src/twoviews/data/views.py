"""Augmentation of a whole batch at once: uint8 images on any device in, float views out.

Every image has its own random parameters, with the distributions of torchvision's RandomResizedCrop,
RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale, RandomApply(GaussianBlur) and RandomSolarize(128),
applied in this order (that of SimCLR, MoCo v2 and BYOL) and followed by the normalisation. `Views.draw` makes the
parameters of all images on the CPU (draws.py), `Views.__call__` applies them (rendering.py).

Shapes: B images, V views of each, C channels, S the canvas side in px, h = w the view side in px.
"""

from collections.abc import Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from twoviews.data import pixels
from twoviews.data.draws import NUMBERS_PER_IMAGE, Draw, View, distributions, draw
from twoviews.data.rendering import compiled, normalise, render_boxes, render_views
from twoviews.errors import BadInput, nearest, shown
from twoviews.ranges import Length
from twoviews.signatures import invalid_value, mismatch


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
        self._distributions = distributions(self.recipes)

    def __len__(self) -> int:
        """Number of views."""
        return len(self.recipes)

    def scaled_sizes(self, scale: float) -> tuple[int, ...]:
        """Sides of the views in px, scaled and rounded to even numbers, of which every stride of two makes use."""
        return self.sizes if scale == 1 else tuple(max(2, 2 * round(size * scale / 2)) for size in self.sizes)

    def cost(self, scale: float) -> float:
        """Pixels of the views with sides scaled, as a share of those at full size: about the share of a step's time."""
        return sum(side**2 for side in self.scaled_sizes(scale)) / sum(side**2 for side in self.sizes)

    def draw(self, sizes: Int[Tensor, "B 2"], generator: torch.Generator, *, rank: int = 0, processes: int = 1) -> Draw:
        """Random parameters of every view of pictures of these original sizes (height, width in px).

        With several processes, of the pictures of this one, number `rank` of `processes`, which has the rows rank,
        rank + processes, ... of the whole batch. The random numbers are drawn for the whole batch, so that a picture gets
        the same ones whoever takes it, on whatever device.
        """
        # A row in [0, 1) for each image, always as long: changing one number of a recipe leaves the other draws as they are.
        rows = torch.rand(len(self), len(sizes) * processes, NUMBERS_PER_IMAGE, generator=generator)
        return draw(self._distributions, rows[:, rank::processes], sizes.double())

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "B C S S"],
        draws: Draw,
        *,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """One normalised tensor per view, [B, C, h, w], on the device of the images.

        Args:
            images: canvases.
            draws: from `draw`, of the same images.
            scale: of the sides of all views: 0.5 makes them half as large, with the same crops.
            dtype: float32, bfloat16 or float16, to which the views are rounded.
            channels_last: the memory format.
        """
        form = {"dtype": dtype, "memory_format": torch.channels_last if channels_last else torch.contiguous_format}
        sides = self.scaled_sizes(scale)
        return tuple(render_views(images, draws, self.recipes, sides, self.mean, self.std, **form))


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
        return normalise(images.float().div_(255), *statistics)
    if (sizes == sizes[:1]).all():  # one box for all
        sizes = sizes[:1]
    original = sizes.to("cpu", torch.float32)
    square = crop * original.amin(dim=1, keepdim=True).expand_as(original)
    to_canvas = images.shape[-1] / original
    start, extent = (original - square) / 2 * to_canvas, square * to_canvas
    if render := compiled(images.device):
        x = render_boxes(render, images, start, extent, size, *statistics)
        if x is not None:
            return x
    start, extent = (t.to(images.device, non_blocking=True) for t in (start, extent))
    return normalise(pixels.resample(images, start, extent, size, bleed=True), *statistics)


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
        if wrong := mismatch(value, annotations[key]) or invalid_value(value):
            raise BadInput(f"{where}.{key}={shown(value)} {wrong}.")
        if get_origin(annotations[key]) is tuple and value[0] > value[1]:
            raise BadInput(f"{where}.{key}={shown(value)} has the larger number first: use [{value[1]},{value[0]}].")
    frozen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in numbers.items()}
    return View(**frozen)
