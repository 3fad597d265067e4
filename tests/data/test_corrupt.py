"""The corruptions against slow loops, closed forms, scipy and torchvision, on photographs; their repeatability."""

import colorsys
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch.nn import functional as nnf
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import resize

from twoviews.data import corruption_effects as effects
from twoviews.data import corruptions
from twoviews.data.corruptions import CORRUPTIONS, corrupt
from twoviews.data.sources import digits
from twoviews.errors import BadInput


@cache
def photographs(side: int) -> torch.Tensor:
    """Four squares of scikit-learn's temple and flower, uint8 [4, 3, side, side]."""
    both = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images])
    return resize(torch.cat([both[..., :427], both[..., -427:]]), [side, side], antialias=True)


def pixels(side: int) -> np.ndarray:
    return photographs(side).numpy().astype(float)


def draws(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, number)) for number in range(count)]


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x.float() - y.float()).abs().mean().item()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_batch_changes_nothing(name, monkeypatch):
    x, index = photographs(32), torch.tensor([7, 0, 5, 1])
    together = corrupt(x, index, name, 4, seed=3)
    alone = torch.cat([corrupt(x[i : i + 1], index[i : i + 1], name, 4, seed=3) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(corrupt(x.flip(0), index.flip(0), name, 4, seed=3).flip(0), together)
    monkeypatch.setattr(corruptions, "CHUNK", 3 * 32 * 32 * 3)
    assert torch.equal(corrupt(x, index, name, 4, seed=3), together)
    assert together.dtype == torch.uint8 and together.shape == x.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_ones_follow_seed_and_index_and_the_others_do_not(name):
    x = photographs(32)
    here = corrupt(x, torch.arange(4), name, 3, seed=0)
    same = [
        torch.equal(here, corrupt(x, torch.arange(4), name, 3, seed=1)),
        torch.equal(here, corrupt(x, torch.arange(4) + 1, name, 3, seed=0)),
    ]
    fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert same == [name in fixed] * 2


# The authors' elastic_transform warps less and ripples more as severity grows: not more in pixels.
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "elastic_transform"])
@pytest.mark.parametrize("side", [32, 96])
def test_severity_5_changes_more_than_1(name, side):
    x = photographs(side)
    one, five = (distance(x, corrupt(x, torch.arange(4), name, severity, seed=0)) for severity in (1, 5))
    assert 0.5 < one < 0.95 * five


def test_larger_images_get_the_numbers_of_imagenet_c():
    for side, std in ((84, 0.1), (85, 0.38)):
        grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
        noisy = corrupt(grey, torch.tensor([0]), "gaussian_noise", 5, seed=0).double() / 255
        inside = noisy[(noisy > 0) & (noisy < 1)]
        z = 0.5 / std  # a normal variable cut at +-z has this standard deviation
        density, share = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erf(z / math.sqrt(2))
        assert inside.std().item() == pytest.approx(std * math.sqrt(1 - 2 * z * density / share), rel=0.03)


def test_shot_noise_has_poissons_variance():
    flat = np.full((1, 1, 200, 200), 100.0)
    noisy = effects.shot_noise(flat, 50, draws(1))
    assert noisy.mean() == pytest.approx(100, rel=0.01)
    assert noisy.var() == pytest.approx(100 * 255 / 50, rel=0.03)


def test_impulse_noise_is_half_salt_half_pepper():
    flat = np.full((1, 3, 200, 200), 100.0)
    noisy = effects.impulse_noise(flat, 0.1, draws(1))
    assert set(np.unique(noisy)) == {0, 100, 255}
    assert (noisy == 0).mean() == pytest.approx(0.05, rel=0.05)
    assert (noisy == 255).mean() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("radius", "alias"), [(0.5, 0.6), (1.5, 0.1), (6, 0.5), (10, 0.5)])
def test_defocus_is_a_convolution_with_a_disc(radius, alias):
    half, taps = max(8, math.ceil(radius)), 2 if radius > 8 else 1
    disc = torch.zeros(2 * half + 1, 2 * half + 1, dtype=torch.double)
    for i in range(2 * half + 1):
        for j in range(2 * half + 1):
            disc[i, j] = (i - half) ** 2 + (j - half) ** 2 <= radius**2
    gauss = torch.tensor([math.exp(-(t**2) / 2 / alias**2) for t in range(-taps, taps + 1)], dtype=torch.double)
    window = nnf.pad((disc / disc.sum())[None, None], (taps,) * 4, "reflect")
    kernel = nnf.conv2d(window, torch.outer(gauss, gauss)[None, None] / gauss.sum() ** 2)
    x = torch.from_numpy(pixels(64))
    expected = nnf.conv2d(nnf.pad(x.flatten(0, 1)[:, None], (half,) * 4, "reflect"), kernel).view_as(x)
    np.testing.assert_allclose(effects.defocus_blur(pixels(64), (radius, alias), ()), expected, atol=1e-6)


@pytest.mark.parametrize("glass", [(0.0, 1, 1), (0.4, 1, 2), (0.7, 2, 1)])
def test_glass_blur_is_the_authors_swap_of_views(glass):
    sigma, reach, times = glass
    x = pixels(32)[:2]
    found = effects.glass_blur(x, glass, draws(2))
    for image, draw, ours in zip(x, draws(2), found, strict=True):
        y = np.uint8(np.stack([ndimage.gaussian_filter(c, sigma, mode="nearest") for c in image], axis=-1))
        shift = draw.integers(-reach, reach, (times, 32 - 2 * reach, 32 - 2 * reach, 2))
        for again in range(times):
            for i, h in enumerate(range(32 - reach, reach, -1)):
                for j, w in enumerate(range(32 - reach, reach, -1)):
                    dx, dy = shift[again, i, j]
                    y[h, w], y[h + dy, w + dx] = y[h + dy, w + dx], y[h, w]
        expected = np.stack([ndimage.gaussian_filter(y[..., c].astype(float), sigma, mode="nearest") for c in range(3)])
        np.testing.assert_allclose(ours, expected, atol=1e-9)


@pytest.mark.parametrize("angle", [0, 30, -45, -135, 90])
def test_motion_blur_by_a_loop(angle):
    image, radius, sigma = pixels(32)[0, 0], 4, 2.0
    weights = [math.exp(-(t**2) / 2 / sigma**2) for t in range(2 * radius + 1)]
    expected = np.zeros_like(image)
    for y in range(32):
        for x in range(32):
            for t, weight in enumerate(weights):
                dx, dy = (math.ceil(t * f(math.radians(angle)) - 0.5) for f in (math.cos, math.sin))
                expected[y, x] += weight * image[min(max(y + dy, 0), 31), min(max(x + dx, 0), 31)]
    np.testing.assert_array_equal(effects._streak(image, radius, sigma, angle), np.rint(expected / sum(weights)))


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.25, 2.25, 4.5])
@pytest.mark.parametrize("side", [32, 45])
def test_zoom_is_scipys(factor, side):
    x = pixels(side)[0, 0]
    crop = math.ceil(side / factor)
    start = (side - crop) // 2
    large = ndimage.zoom(x[start : start + crop, start : start + crop], factor, order=1)
    trim = (len(large) - side) // 2
    expected = large[trim : trim + side, trim : trim + side]
    np.testing.assert_allclose(effects._zoomed(x, factor), expected, atol=1e-9)


def test_zoom_blur_of_a_flat_image_is_the_image():
    flat = np.full((1, 3, 32, 32), 77.0)
    np.testing.assert_allclose(effects.zoom_blur(flat, (1.26, 0.01), ()), flat)


def test_plasma_by_a_loop():
    size, decay = 16, 1.7
    noise = np.random.default_rng(5).uniform(-1, 1, (size, size))
    height, step, wibble = np.zeros((size, size)), size, 100.0
    while step > 1:
        half = step // 2
        for y in range(half, size, step):
            for x in range(half, size, step):
                four = [height[(y + dy) % size, (x + dx) % size] for dy in (-half, half) for dx in (-half, half)]
                height[y, x] = sum(four) / 4 + wibble**2 * noise[y, x]
        for y in range(0, size, half):
            for x in range(half if y % step == 0 else 0, size, step):
                four = [
                    height[(y + half) % size, x],
                    height[y - half, x],
                    height[y, (x + half) % size],
                    height[y, x - half],
                ]
                height[y, x] = sum(four) / 4 + wibble**2 * noise[y, x]
        step, wibble = half, wibble / decay
    expected = (height - height.min()) / (height.max() - height.min())
    np.testing.assert_allclose(effects.plasma(13, decay, [np.random.default_rng(5)])[0], expected[:13, :13], atol=1e-12)


def test_fog_keeps_the_brightest_value_and_lightens_black():
    x = pixels(32)
    fogged = effects.fog(x, (1.5, 1.75), draws(4))
    cloud = effects.plasma(32, 1.75, draws(4))[:, None]
    for image, one, layer in zip(x, fogged, cloud, strict=True):
        np.testing.assert_allclose(one, (image + 255 * 1.5 * layer) * image.max() / (image.max() + 255 * 1.5))
        assert one.max() <= image.max() + 1e-9
    assert cloud.min() == 0 and cloud.max() == 1


def test_snow_on_black_is_the_same_upside_down():
    snowed = effects.snow(np.zeros((2, 3, 32, 32)), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8), draws(2))
    np.testing.assert_array_equal(snowed, snowed[..., ::-1, ::-1])
    flakes = snowed - 0.2 * 127.5
    assert flakes.min() >= -1e-9 and 20 < flakes.max() <= 2 * 255
    assert np.ptp(snowed, axis=1).max() == 0  # without colour
    # As many flakes as noise above the threshold: the mean that a normal variable has there, from both sides.
    many = effects.snow(np.zeros((8, 1, 300, 300)), (0.3, 0.3, 1, 0.65, 14, 12, 0.8), draws(8)) - 0.2 * 127.5
    above = np.clip(np.random.default_rng(0).normal(0.3, 0.3, 10**6), 0, 1)
    assert many.mean() == pytest.approx(2 * 255 * (above * (above >= 0.65)).mean(), rel=0.05)


def test_frost_lays_the_same_ice_over_every_image():
    x = pixels(32)
    keep, ice = 0.75, 0.45
    frosted = [effects.frost(image[None], (keep, ice), draws(1)) - keep * image for image in x]
    for other in frosted[1:]:
        np.testing.assert_allclose(other, frosted[0], atol=1e-9)
    assert 0.25 * 255 * ice * 0.85 - 1e-9 <= frosted[0].min() < frosted[0].max() <= 255 * ice + 1e-9
    assert (frosted[0][0, 2] >= frosted[0][0, 0]).all()  # bluish
    assert "substitute" in effects.frost.__doc__


def test_brightness_is_colorsys_value():
    x = pixels(32)[:1]
    x[0, :, 0, 0] = 0
    found = effects.brightness(x, 0.2, ())
    for y in range(32):
        for column in range(32):
            hue, saturation, value = colorsys.rgb_to_hsv(*(x[0, :, y, column] / 255))
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
            np.testing.assert_allclose(found[0, :, y, column] / 255, expected, atol=1e-9)


def test_contrast_keeps_means_and_scales_deviations():
    x = pixels(32)
    found = effects.contrast(x, 0.3, ())
    np.testing.assert_allclose(found.mean((2, 3)), x.mean((2, 3)))
    np.testing.assert_allclose(found.std((2, 3)), 0.3 * x.std((2, 3)))


def test_elastic_transform_moves_the_three_points():
    # Without displacement it is the affine map alone: scipy's own, by the inverse of the map fitted to the points.
    x, reach = pixels(64)[:1], 0.08
    found = effects.elastic_transform(x, (0, 0.1, reach), draws(1))
    points = np.array([(53, 53), (53, 11), (11, 11)])  # 32 +- 21, x before y
    moved = points + draws(1)[0].uniform(-reach * 64, reach * 64, (3, 2))
    matrix = np.linalg.solve(np.c_[points, np.ones(3)], moved).T  # [2, 3], from image to result
    forward = np.vstack([matrix[::-1][:, [1, 0, 2]], [0, 0, 1]])  # y before x
    back = np.linalg.inv(forward)
    for channel in range(3):
        expected = ndimage.affine_transform(x[0, channel], back[:2, :2], back[:2, 2], order=1, mode="mirror")
        np.testing.assert_allclose(found[0, channel], expected, atol=1e-6)


def test_elastic_displacement_is_smooth_and_scaled():
    x = np.tile(np.arange(96.0), (1, 1, 96, 1))  # each px says its column
    still, moved = (effects.elastic_transform(x, (a, 0.03, 0), draws(1))[0, 0] for a in (0, 0.1))
    np.testing.assert_allclose(still, x[0, 0], atol=1e-9)
    draw = draws(1)[0]
    draw.uniform(size=(3, 2))
    dx = 9.6 * ndimage.gaussian_filter(draw.uniform(-1, 1, (96, 96)), 0.03 * 96, truncate=3)
    np.testing.assert_allclose((moved - still)[5:-5, 5:-5], dx[5:-5, 5:-5], atol=1e-6)


def test_pixelate_by_half_is_the_mean_of_four():
    x = photographs(96)
    found = corrupt(x, torch.arange(4), "pixelate", 2, seed=0)
    expected = nnf.avg_pool2d(x.float(), 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (found.float() - expected).abs().max() <= 1  # rounded after the rows and after the columns
    assert distance(found, expected) < 0.6 < distance(found, x)


@pytest.mark.parametrize(("side", "severity", "quality"), [(32, 1, 80), (32, 5, 40), (96, 5, 7)])
def test_jpeg_is_torchvisions(side, severity, quality):
    x = photographs(side)
    found = corrupt(x, torch.arange(4), "jpeg_compression", severity, seed=0)
    theirs = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in x])
    assert distance(found, theirs) < 0.1 < distance(found, x)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_images(name):
    data = digits()
    x = data.test.pixels[:3]
    changed = corrupt(x, torch.arange(3), name, 5, seed=0)
    assert changed.shape == x.shape and distance(x, changed) > 0.5


def test_refusals_are_sentences():
    with pytest.raises(BadInput, match="Did you mean 'fog'"):
        corrupt(photographs(32), torch.arange(4), "fogg", 1, seed=0)
    four = photographs(32)[:, [0, 1, 2, 0]]
    with pytest.raises(BadInput, match="4 channels"):
        corrupt(four, torch.arange(4), "jpeg_compression", 1, seed=0)
    for name in CORRUPTIONS:
        if name != "jpeg_compression":
            assert corrupt(four, torch.arange(4), name, 1, seed=0).shape == four.shape
