"""Pictures of a run: views.png with what the method sees, curves.png with how it learns."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twoviews.data.images import Images
from twoviews.data.views import Views, eval_view
from twoviews.errors import printable
from twoviews.figures import BASELINES, draw_baselines, drawing, save_sheet
from twoviews.protocols.units import KNN_TOP1
from twoviews.randomness import generator

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

SHOWN_SIDE = 96  # px; smaller views are enlarged to at least this, pixel by pixel
LARGEST_SIDE = 128  # px; larger images on a sheet are reduced to it
IMAGES = 10
GAP = 8  # px, between images on a sheet
TEXT = 16  # px
HEADING_PX, LINE_PX = 66, TEXT + 6  # heights, of a sheet's heading and of a line below a picture
GREY, RED, GREEN = (110, 110, 110), (220, 40, 40), (0, 130, 60)
COLUMNS = 2  # of curves.png
PANELS = {  # of curves.png
    "train/loss": "loss",
    KNN_TOP1: "kNN accuracy, %",
    "train/spread": "spread of the projections (1 even, 0 collapsed)",
    "lr": "learning rate",
}


def draw_views(path: Path, images: Images, views: Views, seed: int) -> None:
    """Draw some training images, a row each: the stored image, then its views as the method gets them.

    All columns have the same scale, so that a view of fewer pixels is smaller, as it is for the network.
    """
    from PIL import Image, ImageDraw

    chosen = torch.randperm(len(images), generator=generator(seed, "picture"))[:IMAGES]
    pixels, sizes, _ = next(iter(images.batches(len(chosen), chosen)))
    pixels = pixels.cpu()
    made = views(pixels, views.draw(sizes, generator(seed, "picture of views")))
    mean, std = views.mean[:, None, None], views.std[:, None, None]
    columns = [pixels.float() / 255, *(view * std + mean for view in made)]
    side = max(column.shape[-1] for column in columns)
    factor = max(1, -(-SHOWN_SIDE // side))
    headings = ["image", *(f"view {number}" for number in range(1, len(columns)))]
    left, top, step = GAP, 2 * (TEXT + 6), side * factor + GAP
    face, bold = font("DejaVuSans"), font("DejaVuSans-Bold")
    # A wider gap sets the image apart from its views.
    sheet = Image.new("RGB", (left + len(columns) * step + 2 * GAP, top + len(chosen) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for heading, column in zip(headings, columns, strict=True):
        draw.text((left, 2), fitted(heading, bold, step), "black", bold)
        draw.text((left, TEXT + 4), fitted(f"{column.shape[-1]} px", face, step), GREY, face)
        for row, image in enumerate(column):
            sheet.paste(Image.fromarray(enlarged(image, factor).numpy()), (left, top + row * step))
        left += step + (2 * GAP if heading == "image" else 0)
    save_sheet(sheet, path)


def enlarged(image: Float[Tensor, "C H W"], factor: int) -> UInt8[Tensor, "h w 3"]:
    """An image with values in [0, 1] as RGB, enlarged by a whole factor; other than three channels become their grey mean."""
    colour = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    large = colour.clamp(0, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return (large * 255).round().byte().permute(1, 2, 0)


def squares(images: Images, index: list[int]) -> "dict[int, Image]":
    """The central square of each image, which is what the encoder sees, at most LARGEST_SIDE px large, by index."""
    from PIL import Image

    pictures, chosen = {}, torch.tensor(index)
    for canvases, sizes, batch in images.batches(64, chosen):
        channels, side = canvases.shape[1], canvases.shape[-1]
        whole = eval_view(canvases.cpu(), sizes, size=side, crop=1.0, mean=(0.0,) * channels, std=(1.0,) * channels)
        for image, square in zip(batch.tolist(), whole, strict=True):
            picture = Image.fromarray(enlarged(square, max(1, -(-SHOWN_SIDE // side))).numpy())
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            pictures[image] = picture
    return pictures


def titled_sheet(title: str, explanation: str, width: int, height: int) -> "tuple[Image, ImageDraw]":
    """A white sheet under two lines of text, HEADING_PX high; at least `width` px wide, below the text `height` px high."""
    from PIL import Image, ImageDraw

    face, bold = font("DejaVuSans"), font("DejaVuSans-Bold")
    text_width = max(bold.getlength(title), face.getlength(explanation))
    sheet = Image.new("RGB", (max(width, round(text_width) + 2 * GAP), HEADING_PX + height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, "black", bold)
    draw.text((GAP, 34), explanation, GREY, face)
    return sheet, draw


def draw_frame(draw: "ImageDraw", left: int, top: int, width: int, height: int) -> None:
    """Draw a red frame around pictures, as of an image of another class."""
    draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline=RED, width=3)


def font(name: str, size: int = TEXT) -> "FreeTypeFont":
    """A font of those that matplotlib brings, which have Greek and Cyrillic letters too; `size` in px."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def fitted(text: str, face: "FreeTypeFont", width: float, keep_end: bool = False) -> str:
    """`text` with all characters printable, cut to `width` px; names of files are told apart by their ends."""
    text = printable(text)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text}…"


def draw_curves(path: Path, lines: Iterable[Mapping[str, float]], title: str) -> None:
    """Draw loss, kNN accuracy with its baselines, spread and learning rate over epochs.

    What was measured once is a point with its value; the baselines have their values in the legend.

    Args:
        path: of the picture.
        lines: of metrics.jsonl.
        title: above the panels.
    """
    lines = list(lines)
    last = max((line["epoch"] for line in lines), default=0)
    baselines = {name: [line[name]] for line in lines for name in BASELINES if name in line}
    with drawing(path, 1.6, panels=(-(-len(PANELS) // COLUMNS), COLUMNS), title=title) as (_, axes):
        for axis in axes[len(PANELS) :]:
            axis.set_axis_off()
        for axis, (name, heading) in zip(axes, PANELS.items(), strict=False):
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            axis.set(title=heading, xlabel="epoch", xlim=(0, 1.03 * last or 1))
            if not points:
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
                axis.set_axis_off()
                continue
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3)
            if len(points) == 1:
                style: Any = {"xytext": (-4, 5), "textcoords": "offset points", "ha": "right"}
                axis.annotate(f"{points[0][1]:.4g}", points[0], **style)
            if name == "train/spread":
                axis.set_ylim(0, max(1.02, axis.get_ylim()[1]))
            if name == KNN_TOP1 and baselines:
                values = [
                    *(value for _, value in points),
                    *(value for accuracies in baselines.values() for value in accuracies),
                ]
                axis.set_ylim(min(values) - 2, max(values) + 2)
                draw_baselines(axis, baselines)
                axis.legend()
