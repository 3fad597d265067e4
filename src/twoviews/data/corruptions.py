"""The fifteen common corruptions at five severities: what CIFAR-10-C and ImageNet-C did to their images, made on the fly.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv:1903.12261; numbers from the authors' make_cifar_c.py and imagenet_c. Images whose side is less than 85 px (the
geometric mean of 32 and 224) get the numbers of CIFAR-10-C, larger ones those of ImageNet-C; lengths are in px as
published, except in elastic_transform, whose lengths are shares of the side.

Each image draws from a generator of its own, and only operations that treat images one by one are used, so that the
company of an image changes nothing. The random numbers are not the authors', and neither are the libraries: older
OpenCV warps round positions to 1/32 px, ImageMagick blurs in 16 bits, and here both are exact; frost lacks their
photographs.

Shapes: B images, C channels, S px of side. Pixels are float64 in [0, 255] inside, and truncated to whole numbers at the
end as in the published files.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from twoviews.data import corruption_effects as effects
from twoviews.data.corruption_effects import Pixels
from twoviews.errors import BadInput, nearest
from twoviews.randomness import seed_of

SIDE = 85  # px; from here on the numbers are those of ImageNet-C
CHUNK = 2**22  # pixel values that are worked on at once

# Function, numbers of CIFAR-10-C, numbers of ImageNet-C; by severity.
CORRUPTIONS: dict[str, tuple[Callable[..., Pixels], Sequence[Any], Sequence[Any]]] = {
    "gaussian_noise": (effects.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (effects.shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (effects.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        effects.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        effects.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        effects.motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        effects.zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        effects.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        effects.frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        effects.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (effects.brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (effects.contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        effects.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        [  # the authors wrote 244 for the 224 px of the side
            tuple(244 / 224 * share for share in stretch)
            for stretch in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ],
    ),
    "pixelate": (effects.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (effects.jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def check(corruptions: Sequence[str], channels: int) -> None:
    """Refuse unknown corruptions, and those that cannot be applied to images with this number of channels.

    Raises:
        BadInput: one is unknown, or needs other images.
    """
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise BadInput(
                f"corruptions: there is no '{name}'.{nearest(name, CORRUPTIONS)} Known: {', '.join(CORRUPTIONS)}."
            )
    if "jpeg_compression" in corruptions and channels not in (1, 3):
        raise BadInput(
            f"jpeg_compression needs grey or RGB images, and these have {channels} channels; choose other corruptions, for "
            "example corruptions=[gaussian_noise,defocus_blur,contrast]."
        )


def corrupt(
    images: UInt8[Tensor, "B C S S"], index: Int[Tensor, " B"], corruption: str, severity: int, seed: int
) -> UInt8[Tensor, "B C S S"]:
    """Corrupted copies, on the CPU; equal for equal seed, corruption, severity and index, whatever the batch.

    Args:
        images: whole pictures.
        index: of each image in its data set.
        corruption: a key of CORRUPTIONS.
        severity: 1 to 5.
        seed: of the random numbers.

    Raises:
        BadInput: see `check`.
    """
    check([corruption], images.shape[1])
    change, small, large = CORRUPTIONS[corruption]
    numbers = (small if images.shape[-1] < SIDE else large)[severity - 1]
    corrupted = [torch.empty_like(images[:0], device="cpu")]
    size = max(1, CHUNK // images[0].numel())
    for chunk, rows in zip(images.split(size), index.split(size), strict=True):
        draws = [np.random.default_rng(seed_of(seed, "corruption", corruption, severity, row)) for row in rows.tolist()]
        changed = change(chunk.cpu().numpy().astype(float), numbers, draws)
        corrupted.append(torch.from_numpy(np.clip(changed, 0, 255).astype(np.uint8)))
    return torch.cat(corrupted)
