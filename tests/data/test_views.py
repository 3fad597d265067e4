"""The batched augmentation against torchvision's, on patches of two photographs."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import STRONG
from torch import Tensor

from twoviews import compiled
from twoviews.data import kernel, pixels
from twoviews.data.draws import Draw, View
from twoviews.data.rendering import JITTER
from twoviews.data.views import Views, eval_view
from twoviews.errors import BadInput

FAMILIES = sorted((Path(__file__).parents[2] / "conf" / "augmentation").glob("*.yaml"))
MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.21, 0.22)


@pytest.fixture(autouse=True, params=["compiled", "tensors"])
def form(request, monkeypatch) -> str:
    """Both forms of the augmentation have to pass everything here."""
    compiled.library.cache_clear()
    monkeypatch.setenv("TWOVIEWS_KERNEL", "1" if request.param == "compiled" else "0")
    assert (kernel.library() is None) == (request.param == "tensors"), "no C compiler: cc"
    yield request.param
    compiled.library.cache_clear()


@cache
def photographs(count: int, height: int, width: int) -> Tensor:
    """uint8 [count, 3, height, width], cut from scikit-learn's two photographs at fixed places."""
    from sklearn.datasets import load_sample_images

    where = np.random.default_rng(0)
    cut = []
    for picture in (load_sample_images().images * count)[:count]:
        top, left = where.integers(picture.shape[0] - height), where.integers(picture.shape[1] - width)
        cut.append(picture[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def sizes_of(images: Tensor) -> Tensor:
    return torch.tensor(images.shape[2:]).expand(len(images), 2)


def make(recipe: dict, size: int = 32, channels: int = 3, mean=MEAN, std=STD) -> Views:
    return Views({"only": recipe}, size=size, channels=channels, mean=mean, std=std)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_torchvision(image: Tensor, draw: Draw, size: int) -> Tensor:
    """The view of one image, with torchvision's operations one after another."""
    import torchvision.transforms.functional as F

    x = image.float() / 255
    x = F.resized_crop(x, *map(int, draw.box[0].tolist()), [size, size], antialias=True)
    if draw.flip[0]:
        x = F.hflip(x)
    operations = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for index in draw.order[0].tolist():
        if index >= 0:
            x = operations[index](x, float(draw.factors[0, index]))
    if draw.grayscale[0]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if draw.sigma[0] > 0:
        x = F.gaussian_blur(x, [max(3, 2 * (size // 20) + 1)] * 2, [float(draw.sigma[0])] * 2)
    if draw.solarize[0]:
        x = F.solarize(x, 128 / 255)
    return F.normalize(x, list(MEAN), list(STD))


def close(ours: Tensor, theirs: Tensor, solarized: Tensor) -> bool:
    """Equal to rounding; where solarisation flips, a px on the threshold may fall to either side."""
    differ = (ours - theirs).abs().amax(dim=1) > 3e-5
    return not differ[~solarized].any() and differ[solarized].float().mean().nan_to_num() < 1e-3


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_family_gives_torchvisions_pixels(path):
    side = 64 if path.stem.startswith("moco") else 32
    images = photographs(24, side, side)
    recipes = yaml.safe_load(path.read_text())["views"]
    views = Views(recipes, size=side, channels=3, mean=MEAN, std=STD)
    draws = views.draw(sizes_of(images), generator(1))
    ours = views(images, draws)
    assert len(ours) == len(views) == len(draws)
    for x, draw, size in zip(ours, draws, views.sizes, strict=True):
        rows = [slice(i, i + 1) for i in range(len(images))]
        theirs = torch.stack([by_torchvision(images[i], draw[rows[i]], size) for i in range(len(images))])
        assert x.shape == theirs.shape == (24, 3, size, size)
        assert x.dtype == torch.float32
        assert not x.requires_grad
        assert close(x, theirs, draw.solarize)


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_file_names_every_number(path):
    """So that any of them can be overridden on the command line without a plus."""
    for recipe in yaml.safe_load(path.read_text())["views"].values():
        assert list(recipe) == [field.name for field in fields(View)]


@pytest.mark.parametrize("size", [16, 32, 48, 7])
def test_crops_that_grow_and_shrink(size):
    from torchvision.transforms.functional import hflip, resized_crop

    images = photographs(40, 32, 32)
    draw = make({"scale": [0.01, 1], "flip": 0.5}).draw(sizes_of(images), generator(2))[0]
    ours = pixels.resample(images, draw.box[:, :2], draw.box[:, 2:], size, flip=draw.flip)
    for image, x, box, flip in zip(images, ours, draw.box.int().tolist(), draw.flip, strict=True):
        theirs = resized_crop(image / 255, *box, [size, size], antialias=True)
        torch.testing.assert_close(x, hflip(theirs) if flip else theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("index", range(4), ids=[operation.__name__ for operation in JITTER])
def test_jitter_operation(index):
    import torchvision.transforms.functional as F

    theirs = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue][index]
    x = photographs(32, 32, 32) / 255
    x[0], x[1], x[2] = 0, 1, 0.3  # grey pixels have no hue
    x[3, :, 0], x[4, :2] = x[3, :1, 0], 0.5  # two channels equal
    factor = torch.linspace(-0.5, 0.5, 32) if index == 3 else torch.linspace(0, 3, 32)
    ours = JITTER[index](x, factor.view(-1, 1, 1, 1))
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(x, factor, strict=True)])
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("side", [8, 32, 96])
def test_blur(side):
    from torchvision.transforms.functional import gaussian_blur

    x = photographs(8, side, side) / 255
    sigma = torch.linspace(0.1, 2, 8)
    kernel = {8: 3, 32: 3, 96: 9}[side]
    expected = [gaussian_blur(image, [kernel] * 2, [float(s)] * 2) for image, s in zip(x, sigma, strict=True)]
    torch.testing.assert_close(pixels.blur(x, sigma), torch.stack(expected), atol=2e-6, rtol=0)


def test_solarize_is_that_of_8_bits():
    from torchvision.transforms.functional import solarize

    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (pixels.solarize(levels / 255) * 255).round().byte().equal(solarize(levels, 128))


@pytest.mark.parametrize("height, width", [(32, 32), (375, 500), (60, 20), (20, 90), (3, 5)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_boxes_have_torchvisions_distribution(height, width, scale):
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    count = 3000
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(count)])
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    ours = make({"scale": list(scale)}).draw(sizes, generator(0))[0].box
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= sizes).all()

    def quantities(box: Tensor) -> list[Tensor]:
        top, left, h, w = box.double().T
        return [top, left, h, w, h * w, (w / h).log(), top + h, left + w, top * left]

    for a, b in zip(quantities(ours), quantities(theirs), strict=True):
        assert ks_2samp(a, b, method="asymp").pvalue > 1e-4  # 9 x 10 comparisons, always the same numbers


def test_statistics_of_the_pixels_are_those_of_torchvisions_pipeline():
    from scipy.stats import ks_2samp
    from torchvision import transforms as T

    images = photographs(50, 32, 32).repeat(30, 1, 1, 1)
    pipeline = T.Compose(
        [
            T.RandomResizedCrop(32),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(3, (0.1, 2.0))], 0.5),
            T.RandomSolarize(128 / 255, 0.2),
        ]
    )
    torch.manual_seed(0)
    theirs = torch.stack([pipeline(image) for image in images / 255])
    views = make(STRONG, mean=(0, 0, 0), std=(1, 1, 1))
    ours = views(images, views.draw(sizes_of(images), generator(0)))[0]

    def quantities(x: Tensor) -> list[Tensor]:
        grey, colour = x.mean(1), x.amax(1) - x.amin(1)
        edges = (grey[:, :, 1:] - grey[:, :, :-1]).abs()
        halves = grey[:, :, :16].mean((1, 2)) - grey[:, :, 16:].mean((1, 2))
        warmth = (x[:, 0] - x[:, 2]).mean((1, 2))
        return [grey.mean((1, 2)), grey.std((1, 2)), colour.mean((1, 2)), edges.mean((1, 2)), halves, warmth]

    for a, b in zip(quantities(ours), quantities(theirs), strict=True):
        assert ks_2samp(a, b, method="asymp").pvalue > 1e-3


def test_random_choices_have_their_probabilities_and_are_independent():
    count = 20000
    draw = make(STRONG).draw(torch.full((count, 2), 32), generator(3))[0]
    jittered = draw.order[:, 0] >= 0
    choices = torch.stack((draw.flip, jittered, draw.grayscale, draw.sigma > 0, draw.solarize)).double()
    expected = torch.tensor([0.5, 0.8, 0.2, 0.5, 0.2], dtype=torch.float64)
    assert (choices.mean(1) - expected).abs().max() < 0.015
    factors = draw.factors.T.double()
    everything = torch.cat((choices, factors, draw.box.T.double()[:2]))
    assert (torch.corrcoef(everything) - torch.eye(len(everything))).abs().triu(1)[:9].max() < 0.03
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    assert ((draw.factors >= low) & (draw.factors <= high)).all()
    assert ((draw.factors.mean(0) - (low + high) / 2).abs() < 0.01).all()
    _, times = draw.order[jittered].unique(dim=0, return_counts=True)
    assert len(times) == 24
    assert ((times / times.sum() * 24 - 1).abs() < 0.2).all()
    blurred = draw.sigma[draw.sigma > 0]
    assert blurred.min() >= 0.1
    assert blurred.max() <= 2
    assert abs(blurred.mean() - 1.05) < 0.02


def test_an_operation_of_strength_0_is_never_drawn():
    draw = make({"jitter": 1.0, "brightness": 0.4, "hue": 0.1}).draw(torch.full((200, 2), 32), generator(0))[0]
    assert set(draw.order.unique().tolist()) == {-1, 0, 3}
    assert ((draw.order >= 0).sum(1) == 2).all()


def test_a_process_gets_its_rows_of_the_global_batch():
    images = photographs(32, 32, 32)
    views = Views({"a": STRONG, "b": STRONG | {"size": 0.5}}, size=32, channels=3, mean=MEAN, std=STD)
    draws = views.draw(sizes_of(images), generator(5))
    whole = views(images, draws)
    for rank in range(2):
        own = images[rank::2]
        part = views.draw(sizes_of(own), generator(5), rank=rank, processes=2)
        for field in fields(Draw):
            assert getattr(part, field.name).equal(getattr(draws, field.name)[:, rank::2]), field.name
        for x, y in zip(whole, views(own, part), strict=True):
            torch.testing.assert_close(x[rank::2], y, atol=1e-5, rtol=0)


def test_the_same_generator_gives_the_same_views_and_another_does_not():
    images = photographs(16, 32, 32)
    views = make(STRONG | {"count": 2})
    one, two, other = (views(images, views.draw(sizes_of(images), generator(seed))) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    assert not one[0].equal(one[1])
    assert not one[0].equal(other[0])


def test_an_image_is_not_changed_by_its_neighbours_and_the_input_not_at_all():
    images = photographs(16, 32, 32).clone()
    before = images.clone()
    views = make(STRONG)
    draws = views.draw(sizes_of(images), generator(4))
    x = views(images, draws)[0]
    assert images.equal(before)
    images[1:] = 255 - images[1:]
    torch.testing.assert_close(views(images, draws)[0][0], x[0], atol=1e-5, rtol=0)


def test_crops_of_a_canvas_are_those_of_the_original_picture():
    """The canvas here holds every px of the original 2 x 2 times, so boxes on either are the same squares."""
    original = photographs(16, 32, 32)
    canvas = original.repeat_interleave(2, 2).repeat_interleave(2, 3)
    views = make({"scale": [0.3, 1], "size": 8})
    draws = views.draw(sizes_of(original), generator(0))
    torch.testing.assert_close(views(canvas, draws)[0], views(original, draws)[0], atol=0.15, rtol=0)
    assert (views(canvas, draws)[0] - views(original, draws)[0]).abs().mean() < 0.02


def test_no_view_is_the_whole_picture_and_of_an_oblong_one_the_central_square():
    square, oblong = photographs(4, 32, 32), photographs(4, 60, 40)
    views = make({"scale": [1, 1], "ratio": [1, 1]})
    x = views(square, views.draw(sizes_of(square), generator(0)))[0]
    torch.testing.assert_close(x, eval_view(square, sizes_of(square), size=32, crop=1.0, mean=MEAN, std=STD))
    assert views.draw(sizes_of(oblong), generator(0))[0].box.tolist() == [[10, 0, 40, 40]] * 4


def test_eval_view_of_a_whole_square_is_the_normalised_picture():
    images = photographs(8, 32, 32)
    x = eval_view(images, sizes_of(images), size=32, crop=1.0, mean=MEAN, std=STD)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-6)
    # Beside one that has to be cropped it is resampled, to the same.
    sizes = torch.cat([sizes_of(images)[:7], torch.tensor([[32, 48]])])
    torch.testing.assert_close(eval_view(images, sizes, size=32, crop=1.0, mean=MEAN, std=STD)[:7], x[:7])


@pytest.mark.parametrize("resized, size", [(64, 56), (36, 32), (128, 112)])
def test_eval_view_is_resize_and_center_crop(resized, size):
    from torchvision.transforms.functional import center_crop, normalize, resize

    images = photographs(6, 72, 72)
    expected = normalize(center_crop(resize(images / 255, [resized], antialias=True), [size]), list(MEAN), list(STD))
    ours = eval_view(images, sizes_of(images), size=size, crop=size / resized, mean=MEAN, std=STD)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_eval_view_of_a_canvas_keeps_the_aspect_ratio():
    from torchvision.transforms.functional import center_crop, normalize, resize

    oblong = photographs(6, 120, 180)
    canvas = (resize(oblong / 255, [128, 128], antialias=True) * 255).round().byte()
    expected = normalize(center_crop(resize(oblong / 255, [36], antialias=True), [32]), list(MEAN), list(STD))
    ours = eval_view(canvas, sizes_of(oblong), size=32, crop=32 / 36, mean=MEAN, std=STD)
    assert (ours - expected).abs().mean() < 0.05  # in standard deviations: the canvas has been resampled once
    squeezed = normalize(resize(canvas / 255, [32, 32], antialias=True), list(MEAN), list(STD))
    assert (squeezed - expected).abs().mean() > 0.3


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts(channels):
    images = photographs(8, 32, 32)[:, [0, 1, 2, 0, 1][:channels]]
    recipe = {key: STRONG[key] for key in STRONG if key not in ("saturation", "hue", "grayscale")}
    views = make(recipe, channels=channels, mean=[0.5] * channels, std=[0.2] * channels)
    x = views(images, views.draw(sizes_of(images), generator(0)))[0]
    assert x.shape == (8, channels, 32, 32)
    assert x.isfinite().all()


def test_colour_operations_refuse_images_that_are_not_rgb():
    with pytest.raises(BadInput) as error:
        make(STRONG, channels=5)
    assert str(error.value) == (
        "augmentation uses saturation, hue and grayscale, which need RGB images, but the data has 5 channels: "
        "use augmentation=no_color."
    )
    with pytest.raises(BadInput, match="uses grayscale, which needs RGB images, but the data has 1 channel: use"):
        make({"grayscale": 0.1}, channels=1)
    make({"saturation": 0.4, "jitter": 0.0}, channels=1, mean=[0.5], std=[0.2])  # never applied


@pytest.mark.parametrize(
    "recipe, message",
    [
        (
            {"blurr": 0.5},
            "blurr is no number of a view. Did you mean 'views.only.blur'? Known: count, size",
        ),
        ({"blur": 1.5}, "blur=1.5 is out of range: it must be at least 0 and at most 1."),
        ({"hue": 0.6}, "hue=0.6 is out of range: it must be at least 0 and at most 0.5."),
        ({"count": 0}, "count=0 is out of range: it must be at least 1 and at most 200."),
        ({"count": 1.5}, "count=1.5 is not a whole number."),
        ({"flip": "often"}, "flip=often is not a number."),
        ({"flip": True}, "flip=true is not a number."),
        ({"flip": None}, "flip=null is not a number."),
        ({"jitter": float("nan")}, "jitter=nan is out of range: it must be at least 0 and at most 1 and finite."),
        ({"scale": 0.2}, "scale=0.2 is not a list, two numbers, such as [0.1,1]."),
        ({"scale": [0, 1]}, "scale=[0, 1] is out of range: it must be above 0 and at most 1."),
        ({"sigma": [2, 1]}, "sigma=[2, 1] has the larger number first: use [1,2]."),
        ({"size": -3}, "size=-3 is out of range: it must be above 0."),
    ],
)
def test_bad_numbers_end_in_a_sentence(recipe, message):
    with pytest.raises(BadInput) as error:
        make(recipe)
    assert str(error.value).startswith(f"views.only.{message}")


def test_sizes_of_views():
    views = Views({"a": {"count": 2}, "b": {"size": 96}, "c": {"size": 3 / 7}}, size=32, channels=3, mean=MEAN, std=STD)
    assert views.sizes == (32, 32, 96, 14)
    assert views.recipes[0] == View(count=2)
    assert views.scaled_sizes(0.5) == (16, 16, 48, 8) and views.scaled_sizes(1) == views.sizes
    assert views.cost(0.5) == (2 * 16**2 + 48**2 + 8**2) / (2 * 32**2 + 96**2 + 14**2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_cpus_views():
    images = photographs(64, 96, 96)
    views = make(STRONG, size=96)
    draws = views.draw(sizes_of(images), generator(0))
    cpu, gpu = views(images, draws)[0], views(images.cuda(), draws)[0]
    assert gpu.is_cuda
    assert close(gpu.cpu(), cpu, draws[0].solarize)


@pytest.mark.parametrize("side, size, channels", [(32, 24, 3), (96, 96, 3), (256, 224, 3), (64, 20, 1), (30, 17, 5)])
def test_both_forms_agree(side, size, channels, form, monkeypatch):
    images = photographs(6, 256, 256)[:, [0, 1, 2, 0, 1][:channels], :side, :side]
    recipe = STRONG if channels == 3 else {key: STRONG[key] for key in ("scale", "flip", "jitter", "contrast", "blur")}
    statistics = {"mean": [0.4, 0.5, 0.6, 0.5, 0.5][:channels], "std": [0.2, 0.3, 0.25, 0.2, 0.2][:channels]}
    views = make({**recipe, "size": size}, size=side, channels=channels, **statistics)
    draws = views.draw(sizes_of(images), generator(3))
    found = []
    for switch in "10":
        monkeypatch.setenv("TWOVIEWS_KERNEL", switch)
        compiled.library.cache_clear()
        found.append(views(images, draws)[0])
    # In standard deviations. A pixel may fall on the other side of what is solarised.
    assert ((found[0] - found[1]).abs() > 2e-5).float().mean() < 1e-4


def test_threads_share_the_images(form):
    images, before = photographs(9, 32, 32), torch.get_num_threads()
    views = make(STRONG)
    draws = views.draw(sizes_of(images), generator(0))
    try:
        torch.set_num_threads(1)
        one = views(images, draws)[0]
        torch.set_num_threads(4)
        torch.testing.assert_close(views(images, draws)[0], one, rtol=0, atol=0 if form == "compiled" else 1e-5)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_or_with_a_broken_one_tensors_do_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TWOVIEWS_KERNEL", "1")
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", compiler)
        compiled.library.cache_clear()
        assert kernel.library() is None
        images = photographs(2, 32, 32)
        views = make(STRONG)
        assert views(images, views.draw(sizes_of(images), generator(0)))[0].isfinite().all()
    assert not list(tmp_path.rglob("*.so"))
