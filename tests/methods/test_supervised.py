"""Cross-entropy by labels that are looked up by index."""

import math

import pytest
import torch

from twoviews.backbones import ResNet
from twoviews.methods.supervised import Supervised

LABELS = torch.tensor([2, 0, 1, 1, 2, 0, 0], dtype=torch.int32)


def small() -> Supervised:
    torch.manual_seed(0)
    return Supervised(ResNet(3, 16, "basic", [1, 1], width=4), LABELS, classes=3)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_mean_over_views_against_a_loop(views):
    method = small()
    images, index = [torch.randn(4, 3, 16, 16) for _ in range(views)], torch.tensor([6, 2, 0, 4])
    total = 0.0
    for x in images:
        for row, image in zip(method.classifier(method.encoder(x)).tolist(), index.tolist(), strict=True):
            total += math.log(sum(math.exp(value) for value in row)) - row[int(LABELS[image])]
    loss = method(images, index).loss
    assert loss.item() == pytest.approx(total / (4 * views), rel=1e-4)


def test_views_may_differ_in_size():
    loss = small()([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)], torch.arange(4)).loss
    assert loss.isfinite()


def test_labels_are_no_part_of_the_weights():
    """A checkpoint of other data can be loaded."""
    assert "labels" not in small().state_dict()
