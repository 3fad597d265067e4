"""Features of whole sets: eval transform, eval mode, order."""

from dataclasses import replace

import pytest
import torch
from pretended_gpu import pretended, waits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twoviews import features
from twoviews.backbones import ResNet
from twoviews.data.images import ImageData
from twoviews.data.sources import digits
from twoviews.features import PixelEncoder, embed
from twoviews.protocols.protocol import EvaluationContext


def few(count: int) -> ImageData:
    data = digits()
    return replace(data, memory=data.memory.subset(torch.arange(count)), test=data.test.subset(torch.arange(30)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_are_the_encoders_in_eval_mode_and_the_mode_is_put_back(channels_last, monkeypatch):
    monkeypatch.setitem(features.BATCH, "cpu", 50)  # 120 images: two batches and a short one
    data = few(120)
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=4)
    encoder(torch.randn(8, 1, 32, 32) * 3)  # running statistics that differ from a batch's
    encoder.train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    found = EvaluationContext(encoder, data, torch.device("cpu"), torch.float32, channels_last).memory
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    x = (data.memory.pixels.float() / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        torch.testing.assert_close(found.x, encoder.eval()(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.y, data.memory.labels.long())
    assert len(EvaluationContext(encoder, data, torch.device("cpu"), torch.float32).test.x) == 30
    assert not encoder.training


def test_features_are_computed_once():
    data = few(60)
    context = EvaluationContext(PixelEncoder(1, 32), data, torch.device("cpu"), torch.float32)
    assert context.test is context.test
    assert context.memory.x.shape == (60, 1024)
    assert context.test.x.shape == (30, 1024)


def test_half_precision_features_come_out_in_float32():
    data = few(20)
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=4)
    exact = EvaluationContext(encoder, data, torch.device("cpu"), torch.float32).memory.x
    rounded = EvaluationContext(encoder, data, torch.device("cpu"), torch.bfloat16).memory.x
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05)


class Casts(TorchDispatchMode):
    """Counts casts of parameters, by their shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape and kwargs.get("dtype"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learning", [False, True])
def test_weights_are_cast_once(learning, monkeypatch):
    monkeypatch.setitem(features.BATCH, "cpu", 20)
    data, network = few(60), nn.Sequential(nn.Flatten(), nn.Linear(1024, 7, bias=False)).requires_grad_(learning)
    with Casts(network[1].weight.shape) as casts:
        x = embed(network, data.memory, data, torch.device("cpu"), torch.bfloat16)
    assert casts.count == 1 and network[1].weight.requires_grad == learning and not x.requires_grad
    monkeypatch.setitem(features.BATCH, "cpu", 60)
    torch.testing.assert_close(
        x, embed(network, data.memory, data, torch.device("cpu"), torch.bfloat16), rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize("size", [20, 50, 80])
def test_a_gpu_is_waited_for_once(size, monkeypatch):
    """At the end, to see that all features are finite. The last batch is filled up there, and nobody sees it."""
    monkeypatch.setitem(features.BATCH, "cuda", size)
    data, encoder = few(70), ResNet(1, 32, "basic", [1, 1], width=4)
    images = replace(data.memory, pixels=data.memory.pixels.clone())
    here = embed(encoder, images, data, torch.device("cpu"), torch.float32)
    with pretended():
        device, batches = torch.device("cuda", 0), []
        encoder.to(device).register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
        on_device = replace(data, memory=images).to(device).memory
        waits.clear()
        there = embed(encoder, on_device, data, device, torch.float32, channels_last=True)
        assert len(waits) == 1 and set(batches) == {min(size, 70)}
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
