"""Health against loops and closed forms, and on encoders that are known to be ill."""

import math
from dataclasses import replace

import pytest
import torch
from test_configs import composed
from torch import nn

from twoviews.backbones import Encoder, ResNet
from twoviews.data.sources import digits
from twoviews.features import PixelEncoder
from twoviews.protocols.health import Health, advice, alignment, rankme, similarities, uniformity
from twoviews.protocols.protocol import EvaluationContext

NAMES = {"spread", "rankme", "alignment", "uniformity", "positive_similarity", "negative_similarity"}
WELL = {
    "spread": 0.5,
    "rankme": 50.0,
    "alignment": 0.2,
    "uniformity": -1.0,
    "positive_similarity": 0.9,
    "negative_similarity": 0.7,
}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(encoder: Encoder, count: int = 200, labels: bool = True) -> EvaluationContext:
    data = digits()
    data = replace(data, train=data.train.subset(torch.arange(count)))
    if not labels:
        data = replace(data, train=replace(data.train, labels=None), memory=None, test=None, classes=())
    return EvaluationContext(encoder, data, torch.device("cpu"), torch.float32)


def network() -> ResNet:
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=8)
    encoder(torch.randn(16, 1, 32, 32))  # running statistics that differ from a batch's
    return encoder


def test_rankme_in_closed_form():
    assert rankme(torch.linalg.qr(numbers(40, 8)).Q) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.linalg.qr(numbers(40, 8)).Q * 1000) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.linalg.qr(numbers(40, 3)).Q @ numbers(3, 3) @ torch.zeros(3, 8).fill_diagonal_(1)) <= 3.01
    assert rankme(numbers(1, 8).expand(40, 8)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(40, 8)) == pytest.approx(1, abs=1e-3)
    values = torch.tensor([4.0, 2, 1, 1])
    entropy = 1 / 2 * math.log(2) + 1 / 4 * math.log(4) + 2 / 8 * math.log(8)
    assert rankme(torch.linalg.qr(numbers(30, 4)).Q * values) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_uniformity_in_closed_form_and_by_a_loop():
    assert uniformity(numbers(1, 8).expand(20, 8)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6) * 3) == pytest.approx(-4)  # squared distances of 2
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    x = numbers(30, 5)
    u = (x / x.norm(dim=1, keepdim=True)).tolist()
    pairs = [math.exp(-2 * math.dist(u[i], u[j]) ** 2) for i in range(30) for j in range(i)]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_alignment_and_similarities_by_a_loop():
    x, y = numbers(20, 5), numbers(20, 5, seed=1)
    u, v = [(z / z.norm(dim=1, keepdim=True)).double() for z in (x, y)]
    cosines = u @ v.T
    positive, negative = similarities(x, y)
    assert positive == pytest.approx(sum(cosines[i, i].item() for i in range(20)) / 20, rel=1e-5)
    others = [cosines[i, j].item() for i in range(20) for j in range(20) if i != j]
    assert negative == pytest.approx(sum(others) / len(others), rel=1e-4)
    assert alignment(x, y) == pytest.approx(sum(math.dist(u[i], v[i]) ** 2 for i in range(20)) / 20, rel=1e-5)
    assert alignment(x, y) == pytest.approx(2 - 2 * positive, rel=1e-5)
    assert alignment(x, 7 * x) == pytest.approx(0, abs=1e-6)


def test_it_needs_no_labels_and_leaves_the_encoder_as_it_was():
    encoder = network().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    health = Health(images=120, scale=(0.2, 1.0), flip=0.5, every_epochs=1)
    found = health(context(encoder, labels=False))
    assert found.values.keys() == NAMES and all(math.isfinite(value) for value in found.values.values())
    assert found.probabilities is None
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert health(context(encoder)).values == found.values  # equal bits, with labels or without
    assert 1 < found.values["rankme"] <= encoder.out_dim


def test_views_that_differ_in_nothing_are_aligned():
    same = Health(images=50, scale=(1.0, 1.0), flip=0.0, every_epochs=0)(context(PixelEncoder(1, 32))).values
    cropped = Health(images=50, scale=(0.2, 0.5), flip=0.0, every_epochs=0)(context(PixelEncoder(1, 32))).values
    # A crop has a drawn shape even of the whole area; no shape but the square fits, so the centre is taken.
    assert same["alignment"] < cropped["alignment"] and same["positive_similarity"] > 0.7
    assert same["uniformity"] == cropped["uniformity"]


def test_crops_and_flips_are_those_of_the_training():
    (health,) = composed("protocol=[health]").protocol.values()
    assert (list(health.scale), health.flip) == ([0.6, 1], 0)  # of digits
    (health,) = composed(
        "protocol=[health]", "data=cifar10", "augmentation.views.both.scale=[0.3,0.9]"
    ).protocol.values()
    assert (list(health.scale), health.flip) == ([0.3, 0.9], 0.5)
    (health,) = composed("protocol=[health]", "run=x", name="evaluate").protocol.values()
    assert (list(health.scale), health.flip) == ([0.2, 1], 0.5)
    views = {"small": {"scale": [0.05, 0.2], "flip": 0.5}, "large": {"scale": [0.3, 1], "flip": 0}}
    found = Health(2, (0.2, 1.0), 0.5, 0).settings_from_run({"augmentation": {"views": views}})
    assert found == {"scale": [0.3, 1.0], "flip": 0.0}


class Constant(Encoder):
    """Collapsed: whatever the image, the same features but for the last digits."""

    def __init__(self):
        super().__init__()
        self.out_dim, self.weight = 16, nn.Parameter(torch.ones(16))

    def forward(self, images):
        return self.weight + 1e-3 * images.mean((1, 2, 3))[:, None]


def test_advice_of_measured_encoders():
    health = Health(images=150, scale=(0.2, 1.0), flip=0.0, every_epochs=0)
    collapsed = advice(health(context(Constant())).values)
    assert collapsed and "collapsed" in collapsed
    torch.manual_seed(0)
    untrained = advice(health(context(ResNet(1, 32, "basic", [1, 1, 1, 1], width=8))).values)
    assert untrained and "learnt little" in untrained


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"negative_similarity": 0.999, "positive_similarity": 1.0}, "all but equal"),
        ({"rankme": 1.5}, "all but equal"),
        ({"rankme": 3.0}, "only 3.0 effective dimensions"),
        ({"spread": 0.16}, "as of an untrained network"),
        ({"positive_similarity": 0.75}, ""),  # views can be as hard as one likes
    ],
)
def test_advice(change, said):
    sentence = advice({**WELL, **change})
    assert sentence == "" if said == "" else said in sentence
