"""What tests of protocols share: a small network and some digits, as an evaluation has them."""

from dataclasses import replace

import torch

from twoviews.backbones import ResNet
from twoviews.data.sources import digits
from twoviews.protocols.protocol import EvaluationContext


def small(memory: int = 200, test: int = 100, seed: int = 0) -> EvaluationContext:
    """A network of random weights, with running statistics of its own, and some digits."""
    data = digits()
    memory_images, test_images = data.memory.subset(torch.arange(memory)), data.test.subset(torch.arange(test))
    data = replace(data, train=memory_images, memory=memory_images, test=test_images)
    torch.manual_seed(seed)
    encoder = ResNet(1, 32, "basic", [1, 1], width=8, stem="strided")
    with torch.no_grad():
        encoder(torch.randn(64, 1, 32, 32) * 2)
    return EvaluationContext(encoder, data, torch.device("cpu"), torch.float32)
