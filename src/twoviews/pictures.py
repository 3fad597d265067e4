"""Pictures of a run: views.png with what the method sees, curves.png with how it learns."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twoviews.data.images import Images
from twoviews.data.views import Views, eval_view
from twoviews.errors import printable
from twoviews.files import open_atomic
from twoviews.randomness import generator

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SHOWN_SIDE = 96  # px; smaller views are enlarged to at least this, pixel by pixel
LARGEST_SIDE = 128  # px; larger images on a sheet are reduced to it
IMAGES = 10
GAP = 8  # px, between images on a sheet
TEXT = 16  # px
GREY, RED = (110, 110, 110), (220, 40, 40)


def draw_views(path: Path, images: Images, views: Views, seed: int) -> None:
    """Draw some training images, a row each: the stored image first, then its views as the method gets them."""
    from PIL import Image

    chosen = torch.randperm(len(images), generator=generator(seed, "picture"))[:IMAGES]
    pixels, sizes, _ = next(iter(images.batches(len(chosen), chosen)))
    pixels = pixels.cpu()
    made = views(pixels, views.draw(sizes, generator(seed, "picture of views")))
    mean, std = views.mean[:, None, None], views.std[:, None, None]
    columns = [pixels.float() / 255, *(view * std + mean for view in made)]
    tiles = [torch.stack([enlarged(image) for image in column]) for column in columns]
    side = max(tile.shape[1] for tile in tiles)
    gap = 4
    sheet = torch.full(
        (len(chosen) * (side + gap) + gap, len(tiles) * (side + gap) + 3 * gap, 3), 255, dtype=torch.uint8
    )
    for x, column in enumerate(tiles):
        for y, tile in enumerate(column):
            # A wider gap sets the original apart from its views.
            top, left = gap + y * (side + gap), gap + x * (side + gap) + (2 * gap if x else 0)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    with open_atomic(path) as file:
        Image.fromarray(sheet.numpy()).save(file, format="PNG")


def enlarged(image: Float[Tensor, "C H W"]) -> UInt8[Tensor, "h w 3"]:
    """An image with values in [0, 1] as RGB, enlarged by a whole factor; other than three channels become their grey mean."""
    colour = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    factor = max(1, -(-SHOWN_SIDE // image.shape[1]))
    large = colour.clamp(0, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return (large * 255).round().byte().permute(1, 2, 0)


def squares(images: Images, index: list[int]) -> "dict[int, Image]":
    """The central square of each image, which is what the encoder sees, at most LARGEST_SIDE px large, by index."""
    from PIL import Image

    found, chosen = {}, torch.tensor(index)
    for canvases, sizes, batch in images.batches(64, chosen):
        channels, side = canvases.shape[1], canvases.shape[-1]
        whole = eval_view(canvases.cpu(), sizes, size=side, crop=1.0, mean=(0.0,) * channels, std=(1.0,) * channels)
        for image, square in zip(batch.tolist(), whole, strict=True):
            picture = Image.fromarray(enlarged(square).numpy())
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            found[image] = picture
    return found


def font(name: str) -> "FreeTypeFont":
    """A font of those that matplotlib brings, which have Greek and Cyrillic letters too."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", TEXT)


def fitted(text: str, face: "FreeTypeFont", width: float) -> str:
    """`text` with all characters printable, cut to `width` px."""
    text = printable(text)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def draw_curves(path: Path, lines: Iterable[Mapping[str, float]]) -> None:
    """Draw loss, kNN accuracy with its baselines, spread and learning rate over epochs, from lines of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(lines)

    def curve(name: str) -> tuple[list[float], list[float]]:
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        return [x for x, _ in points], [y for _, y in points]

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    panels = {
        "train/loss": "loss",
        "knn/top1": "kNN accuracy, %",
        "train/spread": "spread (1 even, 0 collapsed)",
        "lr": "learning rate",
    }
    last = max((line["epoch"] for line in lines), default=0)
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        x, y = curve(name)
        axis.plot(x, y, marker="o" if len(x) < 30 else None, markersize=3)
        axis.set(title=title, xlabel="epoch", xlim=(0, 1.03 * last if last else None))
        axis.grid(alpha=0.3)
    for name, style, label in (
        ("baseline/untrained_knn_top1", ":", "untrained encoder"),
        ("baseline/pixels_knn_top1", "--", "raw pixels"),
    ):
        _, values = curve(name)
        if values:
            axes[1].axhline(values[0], color="grey", linestyle=style, label=label)
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend()
    axes[2].set_ylim(0, max(1.02, axes[2].get_ylim()[1]))
    with open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
