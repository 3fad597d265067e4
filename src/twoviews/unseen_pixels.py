"""Pixels of an image that an encoder does not see."""

import torch

from twoviews.backbones import Encoder, ResNet, first_line
from twoviews.errors import BadInput


def unseen(encoder: Encoder, channels: int, size: int) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels that no feature depends on.

    Args:
        encoder: on the CPU; afterwards in the mode that it was in.
        channels: C of the images.
        size: H = W in px.
    """
    training = encoder.training
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    try:
        features = encoder.eval()(x)
    finally:
        encoder.train(training)
    # NaN goes everywhere that a gradient can go, past weights that begin at 0 too, as those of residual branches do.
    gradient = torch.autograd.grad(features, x, torch.full_like(features, torch.nan))[0]
    seen = (gradient != 0).any(1)[0]  # [H, W]
    rows, columns = ((~seen.any(axis)).nonzero()[:, 0].tolist() for axis in (1, 0))
    return rows, columns


def unseen_pixels_note(encoder: Encoder, channels: int, size: int) -> str | None:
    """A sentence about the pixels of an image that no feature depends on; None if there are none.

    There are some where the side of the image is no multiple of a vision transformer's patches, and where strided
    convolutions without padding end before the image does. Those of a ResNet have padding and reach every pixel.

    Args:
        encoder: on the CPU.
        channels: C of the images.
        size: H = W in px.

    Raises:
        BadInput: the encoder cannot take images of this size.
    """
    if isinstance(encoder, ResNet):
        return None
    name = encoder.recipe.get("name", type(encoder).__name__)
    try:
        rows, columns = unseen(encoder, channels, size)
    except RuntimeError as error:
        raise BadInput(
            f"{name} cannot take {size}x{size} images ({first_line(error)}); choose another backbone or size."
        ) from error
    if not rows and not columns:
        return None
    fitting = size - len(rows)
    at_the_end = rows == columns == [*range(fitting, size)]
    remedy = f"images of {fitting} px have none" if at_the_end else "choose another backbone"
    return (
        f"warning: of images of {size}x{size} px, {len(rows)} row(s) and {len(columns)} column(s) of pixels are not seen by "
        f"{name}, whose patches or strides leave them over; {remedy}."
    )
