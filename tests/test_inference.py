"""Networks for inference compute what the trained ones do."""

import pytest
import torch
from torch import nn

from twoviews.backbones import ResNet
from twoviews.inference import _Block, folded


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("block", "stem"), [("basic", "cifar"), ("bottleneck", "strided"), ("basic", "imagenet")])
def test_folded_networks_compute_the_same_and_leave_the_original(block, stem, fuse, memory_format) -> None:
    torch.manual_seed(0)
    encoder = ResNet(3, 32, block, [2, 1], width=8, stem=stem).to(memory_format=memory_format)
    images = torch.randn(16, 3, 32, 32).to(memory_format=memory_format)
    encoder(images)  # running statistics and, below, scales other than 1
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    before, given = {name: value.clone() for name, value in encoder.state_dict().items()}, images.clone()
    inference = folded(nn.Sequential(encoder, nn.Linear(encoder.out_dim, 4)), fuse)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in inference.modules())
    assert any(isinstance(module, _Block) for module in inference.modules()) == fuse
    with torch.no_grad():
        found = inference[0](images)
    assert torch.equal(images, given)
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    torch.testing.assert_close(found, encoder.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", ["conv1.weight", "bn1.running_var"])
def test_what_is_no_number_is_seen(broken: str) -> None:
    encoder = ResNet(3, 32, "basic", [1, 1], width=8)
    encoder.state_dict()[broken].fill_(torch.nan)
    assert folded(encoder, fuse=True)(torch.randn(2, 3, 32, 32)).isnan().all()


def test_without_the_operators_nothing_is_fused(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inference = folded(ResNet(3, 32, "basic", [1, 1], width=8), fuse=True)
    assert not any(isinstance(module, _Block) for module in inference.modules())
