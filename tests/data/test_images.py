import pytest
import torch

from twoviews.data.images import ImageData, Images, stratified


def some(count=10, labels=True):
    pixels = torch.arange(count * 3 * 4 * 4).remainder(256).to(torch.uint8).view(count, 3, 4, 4)
    sizes = torch.arange(2 * count).view(count, 2)
    return Images(pixels, sizes, torch.arange(count) % 3 if labels else None)


def data(train, memory=None, test=None):
    return ImageData("some", train, memory, test, (), 3, 4, (0.5,) * 3, (0.2,) * 3, "digest", ())


def test_batches_keep_the_last_short_one():
    images = some()
    batches = list(images.batches(4))
    assert [len(index) for _, _, index in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([pixels for pixels, _, _ in batches]), images.pixels)
    assert torch.equal(torch.cat([sizes for _, sizes, _ in batches]), images.sizes)
    assert torch.equal(torch.cat([index for _, _, index in batches]), torch.arange(10))


def test_batches_follow_the_index():
    images, index = some(), torch.tensor([7, 1, 1, 9, 0])
    batches = list(images.batches(2, index))
    assert [part.tolist() for _, _, part in batches] == [[7, 1], [1, 9], [0]]
    assert all(torch.equal(pixels, images.pixels[part]) for pixels, _, part in batches)
    assert list(images.batches(2, index[:0])) == []


def test_subset_takes_pixels_sizes_and_labels():
    images, index = some(), torch.tensor([5, 2])
    few = images.subset(index)
    assert len(few) == 2
    assert torch.equal(few.pixels, images.pixels[index])
    assert torch.equal(few.sizes, images.sizes[index])
    assert few.labels.tolist() == [2, 2]
    assert some(labels=False).subset(index).labels is None


def test_to_moves_what_fits_and_keeps_one_copy_of_what_is_the_same(monkeypatch):
    train, test = some(), some(4)
    moved = data(train, train, test).to("cpu")
    assert moved.train is moved.memory
    assert moved.train.pixels is not train.pixels
    assert torch.equal(moved.test.pixels, test.pixels)
    assert moved.resident_bytes == train.pixels.nbytes + test.pixels.nbytes
    monkeypatch.setattr("twoviews.data.images.RAM_LIMIT", train.pixels.nbytes)
    tight = data(train, train, test).to("cpu")
    assert tight.train is not train
    assert tight.test is test and tight.resident_bytes == train.pixels.nbytes


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_stratified_keeps_the_shares_of_the_classes(count):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    index = stratified(labels, 100, count)
    assert len(index) == count == len(index.unique())
    assert torch.equal(index, index.sort().values)
    assert torch.equal(index, stratified(labels, 100, count))
    shares = torch.bincount(labels[index], minlength=3)
    assert (shares - torch.tensor([0.5, 0.3, 0.2]) * count).abs().max() < 1


def test_stratified_without_labels_is_a_fixed_sample():
    index = stratified(None, 1000, 100)
    assert len(index.unique()) == 100
    assert torch.equal(index, stratified(None, 1000, 100))
    assert index.float().mean() == pytest.approx(500, abs=90)
