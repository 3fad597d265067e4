"""How different images are from those that a classifier learnt from, by their features.

Shapes: n images, M test images, N bank, B kept of it, F features.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.classifier_file import Head
from twoviews.errors import counted
from twoviews.protocols.knn import neighbours
from twoviews.randomness import generator

NEAREST = 10  # bank images whose mean distance is taken
FAR_PERCENTILE = 99.0  # of the distances of test images: from there on an image is far from the bank
KEPT = 2_000  # bank images that a file of a classifier has, of 2 to 8 kB each


@torch.no_grad()
def distances(x: Float[Tensor, "n F"], bank: Float[Tensor, "N F"]) -> Float[Tensor, " n"]:
    """Mean of 1 - cosine, in [0, 2], to the `NEAREST` most similar bank images.

    Images that are far from the training images are probably of another kind: Sun et al., "Out-of-Distribution Detection
    with Deep Nearest Neighbors", arXiv:2204.06507, who take the distance to the k-th neighbour.
    """
    chunks = [1 - cosines.mean(1) for _, cosines, _ in neighbours(x, bank, NEAREST)]
    return torch.cat([x.new_empty(0), *chunks])


def percentiles(distance: Float[Tensor, " n"], test: Float[Tensor, " M"]) -> Float[Tensor, " n"]:
    """The percentage of test images that are nearer to the bank than each image, by the distances of both."""
    return 100 * torch.searchsorted(test.sort().values, distance).float() / len(test)


def kept(images: int) -> Int[Tensor, " B"]:
    """Which of so many memory images are the bank in a file: `KEPT` that are drawn at random."""
    return torch.randperm(images, generator=generator("bank"))[:KEPT]


def with_bank(head: Head, bank: Float[Tensor, "B F"], test: Float[Tensor, "M F"]) -> Head:
    """The head with features of memory images, and the distances of test images from these."""
    return replace(head, reference=(bank, distances(test, bank)))


def far_notes(percentile: Float[Tensor, " n"], test_images: int, column: str = "") -> list[str]:
    """A sentence for the user if more images are far from the bank than it is usual for test images."""
    count = int((percentile >= FAR_PERCENTILE).sum())
    if count <= len(percentile) * (1 - FAR_PERCENTILE / 100):
        return []
    are = f"{count:,} of {counted(len(percentile), 'picture')} {'are' if count > 1 else 'is'}"
    return [
        f"{are} farther from the training images than {FAR_PERCENTILE:g} % of the {test_images:,} test images{column}: "
        "such a picture may show none of the classes, whatever the probability."
    ]
