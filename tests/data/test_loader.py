import pytest
import torch
from PIL import Image
from pretended_gpu import pretended

from twoviews.data.decoding import Decoded
from twoviews.data.images import Images
from twoviews.data.loader import Loader
from twoviews.data.views import Views
from twoviews.errors import BadInput

RECIPE = {
    "count": 2,
    "size": None,
    "scale": [0.2, 1.0],
    "ratio": [0.75, 1.33],
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.2,
    "blur": 0.0,
    "sigma": [0.1, 2.0],
    "solarize": 0.0,
}
PIXELS = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loader(pixels=PIXELS, **changes):
    views = Views({"both": RECIPE}, size=16, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    images = Images(pixels, torch.full((len(pixels), 2), 16), None)
    return Loader(images, views, **{"batch_size": 8, "seed": 1, "device": "cpu", **changes})


def same(one, other):
    return torch.equal(one.index, other.index) and all(map(torch.equal, one.views, other.views))


def test_an_epoch_has_each_image_at_most_once_in_batches_of_one_size():
    batches = list(loader())
    assert len(batches) == len(loader()) == 3
    assert loader().left_over == 6
    assert len(torch.cat([batch.index for batch in batches]).unique()) == 24
    assert all(len(batch.views) == 2 and batch.views[0].shape == (8, 3, 16, 16) for batch in batches)


def test_epochs_and_seeds_differ_and_repeat():
    loaded = loader()
    first = list(loaded)
    loaded.set_epoch(1)
    second = list(loaded)
    assert not torch.equal(first[0].index, second[0].index)
    assert not torch.equal(first[0].index, next(iter(loader(seed=2))).index)
    loaded.set_epoch(0)
    assert all(map(same, first, loaded))


def test_views_of_the_first_epochs_are_the_same_crops_at_a_smaller_size():
    small, whole = loader(small_epochs=2, small_scale=0.5), loader()
    half = Views({"both": {**RECIPE, "size": 8}}, size=16, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    alike = Loader(whole.images, half, batch_size=8, seed=1, device="cpu")
    for each in (small, whole, alike):
        each.set_epoch(1)
    assert all(map(same, small, alike))
    assert next(iter(small)).views[0].shape == (8, 3, 8, 8)
    for each in (small, whole):
        each.set_epoch(2)
    assert all(map(same, small, whole))


def test_starting_in_the_middle_gives_the_rest_of_the_epoch():
    loaded = loader()
    loaded.set_epoch(3)
    whole = list(loaded)
    loaded.set_epoch(3, start=2)
    (last,) = loaded
    assert same(last, whole[2])


def test_the_global_random_numbers_are_not_touched():
    state = torch.get_rng_state()
    list(loader())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_same_batches_and_views(processes):
    whole = list(loader())
    shares = [list(loader(rank=rank, processes=processes)) for rank in range(processes)]
    for step, batch in enumerate(whole):
        for rank in range(processes):
            assert torch.equal(shares[rank][step].index, batch.index[rank::processes])
            for ours, all_rows in zip(shares[rank][step].views, batch.views, strict=True):
                assert torch.allclose(ours, all_rows[rank::processes], atol=1e-5)


def test_decoding_on_demand_gives_the_same_batches(tmp_path):
    paths = [str(tmp_path / f"{row}.png") for row in range(len(PIXELS))]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    resident = loader()
    for workers in (0, 2):
        on_demand = loader(Decoded(paths, size=16, channels=3, workers=workers))
        for epoch, start in ((0, 0), (1, 1)):
            resident.set_epoch(epoch, start)
            on_demand.set_epoch(epoch, start)
            assert all(same(*pair) for pair in zip(resident, on_demand, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_in_the_form_that_a_run_computes_with(dtype):
    for ours, plain in zip(loader(dtype=dtype, channels_last=True), loader(), strict=True):
        for x, y in zip(ours.views, plain.views, strict=True):
            assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
            assert y.dtype == torch.float32 and y.is_contiguous()
            assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_does_not_wait_for_the_gpu(resident):
    """From its order on; and it has the batches of a CPU."""
    with pretended() as waits:
        on_gpu = loader(PIXELS.to("cuda") if resident else PIXELS, device="cuda")
        waits.clear()
        found = list(on_gpu)
        assert not waits
        found = [(batch.index.cpu(), *(view.cpu() for view in batch.views)) for batch in found]
    for ours, plain in zip(found, loader(), strict=True):
        for x, y in zip(ours, (plain.index, *plain.views), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="batch_size=31 is larger than the 30 training images"):
        loader(batch_size=31)
    with pytest.raises(BadInput, match="batch_size=10 is not a multiple of 4 processes: use 8 or 12"):
        loader(batch_size=10, processes=4)
    with pytest.raises(BadInput, match="use 4"):
        loader(batch_size=2, processes=4)
    assert loader(batch_size=30).left_over == 0
