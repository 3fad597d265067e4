"""What the tests of test-time adaptation share: a small encoder that knows digits, and states to compare."""

from dataclasses import replace
from functools import cache

import torch

from twoviews.backbones import Encoder, ResNet
from twoviews.data.images import ImageData
from twoviews.data.sources import digits
from twoviews.features import PixelEncoder
from twoviews.protocols.linear import Linear, Probe
from twoviews.protocols.protocol import EvaluationContext

LINEAR = Linear([0.01], held_out=0.2, iterations=30, every_epochs=0)


@cache
def some_digits() -> ImageData:
    """400 to learn from, 150 to classify."""
    data = digits()
    return replace(data, memory=data.memory.subset(torch.arange(400)), test=data.test.subset(torch.arange(150)))


@cache
def context() -> EvaluationContext:
    """A random ResNet whose batch norms have seen the digits; its linear probe knows about nine in ten."""
    torch.manual_seed(0)
    encoder = ResNet(channels=1, image_size=32, block="basic", depths=[1, 1], width=8, stem="strided")
    found = EvaluationContext(encoder, some_digits(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for images in views(found, "none", 0, 100):
            encoder(images)
    encoder.eval()
    return found


@cache
def probe() -> Probe:
    return LINEAR.probe(context())[0]


def views(of: EvaluationContext, name: str, severity: int, batch_size: int) -> list[torch.Tensor]:
    """The batches of a stream."""
    from twoviews.protocols.streams import Streams

    streams = Streams(of, None if name == "none" else [name], [severity or 5], None, seed=0)
    return [images for images, _ in streams.batches(name, severity, batch_size)]


def without_batch_norm() -> EvaluationContext:
    return EvaluationContext(PixelEncoder(1, 32), some_digits(), torch.device("cpu"), torch.float32)


def state(encoder: Encoder) -> dict[str, object]:
    """Weights, buffers, gradients, modes and hooks: all that an adaptation could leave behind."""
    values = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = {name: (module.training, "forward" in vars(module)) for name, module in encoder.named_modules()}
    gradients = {name: (p.requires_grad, p.grad is None) for name, p in encoder.named_parameters()}
    return {"values": values, "modes": modes, "gradients": gradients}


def assert_same(one: dict, other: dict) -> None:
    assert one["modes"] == other["modes"] and one["gradients"] == other["gradients"]
    assert one["values"].keys() == other["values"].keys()
    assert all(torch.equal(value, other["values"][name]) for name, value in one["values"].items())
