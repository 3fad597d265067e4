"""ResNets against torchvision's, and what the constructors refuse."""

import os
import subprocess
import sys

import pytest
import torch
import torchvision

from twoviews.backbones import BasicBlock, Bottleneck, Encoder, ResNet, Timm
from twoviews.errors import BadInput
from twoviews.unseen_pixels import unseen, unseen_pixels_note

SHAPES = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_imagenet_stem_is_torchvisions(name):
    """Names and shapes of the state, and the features on the same weights, in both modes."""
    torch.manual_seed(0)
    block, depths = SHAPES[name]
    theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = torch.nn.Identity()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = ResNet(3, 64, block, depths, stem="imagenet")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.bn1.running_mean, theirs.bn1.running_mean)
    assert ours.out_dim == {"basic": 512, "bottleneck": 2048}[block]


@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet18", "imagenet", 11_176_512),  # torchvision's 11,689,512 less the classifier's 513,000
        ("resnet18", "cifar", 11_168_832),
        ("resnet34", "imagenet", 21_284_672),
        ("resnet50", "imagenet", 23_508_032),
    ],
)
def test_parameter_counts(name, stem, parameters):
    block, depths = SHAPES[name]
    assert count(ResNet(3, 64, block, depths, stem=stem)) == parameters


@pytest.mark.parametrize(
    ("stem", "sides"), [("cifar", [32, 32, 16, 8, 4]), ("strided", [16, 16, 8, 4, 2]), ("imagenet", [32, 16, 8, 4, 2])]
)
def test_sides_of_the_maps(stem, sides):
    """CIFAR stem on 32 px: 32-32-16-8-4, as MoCo's demo; ImageNet stem on 64 px: 32 after the convolution."""
    size = 64 if stem == "imagenet" else 32
    encoder = ResNet(3, size, "basic", [1, 1, 1, 1], width=4, stem=stem)
    seen = []
    for module in (encoder.conv1, encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    features = encoder(torch.randn(2, 3, size, size))
    assert seen == sides
    assert features.shape == (2, encoder.out_dim) == (2, 32)


def test_features_are_the_mean_over_places():
    encoder = ResNet(1, 16, "basic", [1, 1], width=4).eval()
    maps = []
    encoder.layer2.register_forward_hook(lambda module, inputs, output: maps.append(output))
    x = encoder(torch.randn(3, 1, 16, 16))
    for image in range(3):
        for channel in range(8):
            values = maps[0][image, channel].flatten().tolist()
            assert x[image, channel].item() == pytest.approx(sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_init_residual_makes_each_block_its_shortcut(block):
    name = "basic" if block is BasicBlock else "bottleneck"
    for zero in (True, False):
        encoder = ResNet(3, 16, name, [2], width=4, zero_init_residual=zero)
        x = torch.rand(2, encoder.out_dim, 4, 4)  # not negative, so the last ReLU changes nothing
        assert torch.equal(encoder.layer1[1](x), x) is zero


def test_convolutions_start_as_he_et_al():
    torch.manual_seed(0)
    encoder = ResNet(3, 16, "basic", [1], width=64)
    assert encoder.layer1[0].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


@pytest.mark.parametrize(("stem", "stages", "smallest"), [("cifar", 4, 9), ("strided", 3, 9), ("imagenet", 4, 33)])
def test_refuses_images_that_shrink_to_one_pixel(stem, stages, smallest):
    ResNet(3, smallest, "basic", [1] * stages, width=4, stem=stem)
    with pytest.raises(BadInput, match=f"shrinks {smallest - 1}x{smallest - 1} images {smallest - 1}-fold"):
        ResNet(3, smallest - 1, "basic", [1] * stages, width=4, stem=stem)


def test_timm_gives_pooled_features_at_any_size():
    encoder = Timm(1, 32, "vit_tiny_patch16_224", drop_path_rate=0.1)
    assert encoder.out_dim == 192
    assert encoder.training
    assert encoder(torch.randn(2, 1, 32, 32)).shape == (2, 192)
    encoder = Timm(3, 48, "resnet10t")
    assert encoder(torch.randn(2, 3, 48, 48)).shape == (2, encoder.out_dim)


@pytest.mark.parametrize(
    ("name", "size", "rate", "message"),
    [
        ("resnet10", 32, 0.0, "is not a model of timm .* Did you mean 'resnet1"),
        ("vit_tiny_patch16_224", 8, 0.0, "cannot take 8x8 images"),
        ("vgg11", 32, 0.1, "drop_path_rate=0.1 is not for vgg11"),
        ("xcit_nano_12_p16_224", 35, 0.0, "cannot take 35x35 images .*divide"),
        ("vit_tiny_r_s16_p8_224", 35, 0.0, r"cannot take 35x35 images \(AssertionError\)"),
    ],
)
def test_timm_refuses_in_one_sentence(name, size, rate, message):
    with pytest.raises(BadInput, match=message):
        Timm(3, size, name, rate)


def test_a_model_for_one_size_refuses_views_of_another():
    encoder = Timm(1, 32, "vit_tiny_patch16_224")
    assert encoder(torch.zeros(2, 1, 32, 32)).shape == (2, 192)
    with pytest.raises(BadInput, match=r"24x24 px.*size=null"):
        encoder(torch.zeros(2, 1, 24, 24))


def test_vision_transformers_take_crops_of_whole_patches():
    encoder = Timm(1, 64, "vit_tiny_patch16_224")
    for size in (32, 48, 64):
        assert encoder(torch.zeros(2, 1, size, size)).shape == (2, 192)
    with pytest.raises(BadInput, match="40x40 px"):
        encoder(torch.zeros(2, 1, 40, 40))


def test_the_cifar_stem_is_drawn_as_torch_draws_it():
    """Uniform within 1 / sqrt(fan in), as where a stem replaces that of an initialised network."""
    encoder = ResNet(3, 32, "basic", [1, 1], width=64)
    bound = (3 * 9) ** -0.5
    assert 0.95 * bound < encoder.conv1.weight.abs().max() <= bound
    assert encoder.conv1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    strided = ResNet(3, 32, "basic", [1, 1], width=64, stem="strided")
    assert strided.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def by_pixels(encoder, channels: int, size: int) -> list[int]:
    """Rows of which no pixel reaches a feature, found by making each of them NaN in turn."""
    x, rows = torch.zeros(1, channels, size, size), []
    for row in range(size):
        x[:, :, row] = torch.nan
        with torch.no_grad():
            rows += [] if encoder.eval()(x).isnan().any() else [row]
        x[:, :, row] = 0
    return rows


@pytest.mark.parametrize(
    ("name", "size", "missing"),
    [
        ("vit_tiny_patch16_224", 35, 3),
        ("vit_tiny_patch16_224", 32, 0),
        ("swin_tiny_patch4_window7_224", 33, 1),
        ("convnext_atto", 39, 3),
        ("convmixer_768_32", 36, 1),
        ("resnet10t", 33, 0),
    ],
)
def test_pixels_that_patches_or_strides_leave_over_are_said(name, size, missing):
    encoder = Timm(1, size, name)
    rows, columns = unseen(encoder, 1, size)
    assert rows == columns == by_pixels(encoder.eval(), 1, size) == [*range(size - missing, size)]
    encoder.train()
    sentence = unseen_pixels_note(encoder, 1, size)
    assert encoder.training
    if missing:
        assert f"{size}x{size} px, {missing} row(s) and {missing} column(s)" in sentence and name in sentence
        assert f"images of {size - missing} px have none" in sentence
        assert unseen_pixels_note(Timm(1, size - missing, name), 1, size - missing) is None
    else:
        assert sentence is None


def test_gaps_between_patches_are_said():
    class Sparse(Encoder):
        recipe = {}

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 2, stride=4)

        def forward(self, images):
            return self.conv(images).mean((2, 3))

    sentence = unseen_pixels_note(Sparse(), 1, 16)
    assert "8 row(s) and 8 column(s) of pixels are not seen by Sparse" in sentence and "another backbone" in sentence


@pytest.mark.parametrize("stem", ["cifar", "strided", "imagenet"])
def test_resnets_see_every_pixel(stem):
    for size in range(33, 50, 3):
        block = "bottleneck" if size % 2 else "basic"
        encoder = ResNet(1, size, block, [1, 1, 1, 1], width=4, stem=stem, zero_init_residual=True)
        assert unseen(encoder, 1, size) == ([], [])


NARROW = """
import torch
from twoviews.backbones import ResNet
torch.manual_seed(0)
encoder = ResNet(1, 16, "basic", [1, 1], width=4)
images = [torch.randn(size, 1, 16, 16) for size in (8, 12, 32)]
gradients = []
for format in (torch.contiguous_format, torch.channels_last):
    encoder.to(memory_format=format)
    for _ in range(20):
        for batch in images:
            encoder.zero_grad()
            encoder(batch.to(memory_format=format)).square().sum().backward()
    gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
for one, other in zip(*gradients, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
"""


def test_fewer_channels_than_a_register_has():
    """With AVX2, torch alone ends here with a damaged heap; in a process of its own, because that kills it."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", NARROW], env=environment, check=True, timeout=300)
