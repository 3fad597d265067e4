"""Views made of drawn parameters: by compiled code (kernel.c, on a GPU kernel.cu) or by operations on tensors (pixels.py).

Both give the same result; compiled code for a GPU is compared with tensors before it is used.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from twoviews.data import kernel, kernel_cuda, pixels
from twoviews.data.draws import NUMBERS_PER_IMAGE, Draw, View, distributions, draw, on_canvas

JITTER = (
    pixels.brightness,
    pixels.contrast,
    pixels.saturation,
    pixels.hue,
)  # the operations of ColorJitter, in its order
# Called with images, the side of each view in px, the parameters of all views, dtype and memory format; returns the views,
# or None if it cannot make them.
Render = Callable[..., list[Tensor] | None]


def render_views(
    images: UInt8[Tensor, "B C S S"],
    draws: Draw,
    recipes: Sequence[View],
    sizes: Sequence[int],
    mean: Tensor,
    std: Tensor,
    **form: Any,
) -> list[Tensor]:
    """One normalised tensor per view, [B, C, h, w], on the device of the images.

    Args:
        images: canvases.
        draws: parameters of each view of the same images.
        recipes: the distributions that they were drawn from.
        sizes: side of each view in px.
        mean: of each channel, of pixels in [0, 1].
        std: of each channel, of pixels in [0, 1].
        form: dtype and memory_format of the views.
    """
    if render := compiled(images.device):
        views = render(images, sizes, *arguments(images, draws), mean, std, **form)
        if views is not None:
            return views
    per_view = zip(draws, recipes, sizes, strict=True)
    return [in_tensors(images, *drawn, mean, std).to(**form) for drawn in per_view]


def arguments(images: Tensor, draw: Draw) -> tuple[Tensor | float, ...]:
    """Arguments of both compiled forms of `render`, from `start` to `solarize_from`."""
    applied = (draw.flip, draw.order, draw.factors, draw.grayscale, draw.sigma, draw.solarize)
    return (*on_canvas(images, draw), *applied, float(pixels.SOLARIZE_FROM))


def render_boxes(
    render: Render,
    images: Tensor,
    start: Float[Tensor, "_ 2"],
    extent: Float[Tensor, "_ 2"],
    size: int,
    mean: Tensor,
    std: Tensor,
) -> Float[Tensor, "B C {size} {size}"] | None:
    """Normalised boxes, resampled with the pixels beyond them and otherwise unchanged; None if `render` cannot make them."""
    count = len(images)
    boxes = start.expand(1, count, 2), extent.expand(1, count, 2)
    no, none = torch.zeros(1, count, dtype=torch.bool), torch.full((1, count, len(JITTER)), -1)
    made = render(images, [size], *boxes, no, none, none.float(), no, no.float(), no, 1.0, mean, std, bleed=True)
    return None if made is None else made[0]


def compiled(device: torch.device) -> Render | None:
    """`render` of the compiled code for a device; None if there is none."""
    if device.type == "cpu":
        library = kernel.library()
        return functools.partial(kernel.render, library) if library else None
    render = _checked(device) if device.type == "cuda" else None
    return None if isinstance(render, str) else render


def reason_for_tensors(device: torch.device) -> str | None:
    """Why there is no compiled code for a device; None if there is, and its results were found to be correct."""
    if device.type == "cpu":
        return kernel.reason()
    checked = _checked(device) if device.type == "cuda" else f"there is no kernel for {device.type}"
    return checked if isinstance(checked, str) else None


@functools.cache
def _checked(device: torch.device) -> Render | str:
    """`render` of kernel.cu for a GPU if its results are those of tensors; else the reason why it cannot be used."""
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        return "TWOVIEWS_KERNEL=0"
    try:
        render = functools.partial(kernel_cuda.render, kernel_cuda.build(device))
        return render if _agrees(render, device) else "kernel.cu makes other views than tensors do"
    except Exception as error:  # any error of a driver, or of a private function of torch
        return f"kernel.cu, {type(error).__name__}: {error}".splitlines()[0]


CHECKED = {  # every operation, in crops that are enlarged and that are reduced
    "size": 40,
    **dict.fromkeys(("flip", "blur"), 0.5),
    **dict.fromkeys(("brightness", "contrast", "saturation", "grayscale", "hue", "solarize"), 0.3),
    "jitter": 0.9,
}
MAX_ERROR = 1e-4  # in standard deviations, here of a quarter of the range


@torch.no_grad()
def _agrees(render: Render, device: torch.device) -> bool:
    """Whether the views of `render` on a device are those of tensors on the CPU, which has no TF32, in all forms."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 3, 64, 64), dtype=torch.uint8, generator=random)
    originals = torch.randint(32, 97, (96, 2), generator=random).double()
    recipes, sides = [View(**CHECKED), View(**{**CHECKED, "size": 20})], (CHECKED["size"], 20)
    numbers = torch.rand(len(recipes), len(originals), NUMBERS_PER_IMAGE, generator=random)
    draws = draw(distributions(recipes), numbers, originals)
    statistics, there = (torch.full((3,), 0.5), torch.full((3,), 0.25)), images.to(device)
    made = render(there, sides, *arguments(images, draws), *statistics)
    boxes, size = on_canvas(images, draws[0]), sides[0]
    whole = render_boxes(render, there, *boxes, size, *statistics)
    if made is None or whole is None:
        return False
    for x, drawn, recipe in zip(made, draws, recipes, strict=True):
        differ = _differ(x, in_tensors(images, drawn, recipe, x.shape[-1], *statistics))
        # A px on the threshold of solarize may fall to either side.
        if differ[~drawn.solarize].any() or differ[drawn.solarize].float().mean().item() >= 1e-3:
            return False
    if _differ(whole, normalise(pixels.resample(images, *boxes, size, bleed=True), *statistics)).any():
        return False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            form = {"dtype": dtype, "memory_format": memory_format}
            again = render(there, sides, *arguments(images, draws), *statistics, **form)
            for x, y in zip(made, again or [], strict=True):
                if not (y.equal(x.to(dtype)) and y.is_contiguous(memory_format=memory_format)):
                    return False
    return True


def _differ(x: Tensor, wanted: Tensor) -> Bool[Tensor, "B C h w"]:
    """Where two tensors differ by more than rounding, on the CPU; true where `x` is NaN."""
    return ~((x.cpu() - wanted).abs() <= MAX_ERROR)


def in_tensors(
    images: UInt8[Tensor, "B C S S"], draw: Draw, view: View, size: int, mean: Tensor, std: Tensor
) -> Float[Tensor, "B C {size} {size}"]:
    """One normalised view of each image by operations on tensors, on the device of the images."""
    boxes = on_canvas(images, draw)
    start, extent, flip = (t.to(images.device, non_blocking=True) for t in (*boxes, draw.flip))
    x = pixels.resample(images, start, extent, size, flip=flip if view.flip else None)
    for stage in draw.order.unbind(dim=1):
        for index, operation in enumerate(JITTER):
            _apply(operation, x, stage == index, draw.factors[:, index].view(-1, 1, 1, 1))
    _apply(pixels.grayscale, x, draw.grayscale)
    _apply(pixels.blur, x, draw.sigma > 0, draw.sigma)
    _apply(pixels.solarize, x, draw.solarize)
    return normalise(x, mean, std)


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`x` overwritten by (x - mean) / std of each channel; mean and std may be on another device."""
    return pixels.normalise(x, *(t.to(x.device, non_blocking=True) for t in (mean, std)))


def _apply(operation: Callable[..., Tensor], x: Tensor, chosen: Bool[Tensor, " B"], *parameters: Tensor) -> None:
    """Overwrite the chosen images of `x`. `chosen` is on the CPU, so that nothing waits for the device."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        given = [p[rows].to(x.device, non_blocking=True) for p in parameters]
        rows = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, operation(x.index_select(0, rows), *given))
