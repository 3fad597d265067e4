"""The map: images with similar features are close, and the same features give the same picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness

from twoviews import figures as figure_files
from twoviews.data.sources import digits
from twoviews.errors import BadInput
from twoviews.protocols import map as module
from twoviews.protocols.map import Map, draw_map
from twoviews.protocols.neighbours import Neighbours
from twoviews.randomness import generator


def test_map_keeps_neighbours_and_is_the_same_twice(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "MAX_IMAGES", 250)
    save = figure_files.save_figure
    monkeypatch.setattr(figure_files, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    x, y = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    for name in ("one.png", "two.png"):
        draw_map(tmp_path / name, x.float(), y.long(), list("0123456789"), "digits", seed=3)
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "two.png"))
    assert np.array_equal(one, two) and one.std() > 5
    points = figures[-1].axes[0].collections[0]
    rows = torch.randperm(len(x), generator=generator(3, "map"))[:250]
    plane, unit = np.asarray(points.get_offsets()), torch.nn.functional.normalize(x[rows], dim=1)
    assert [tuple(c) for c in points.get_facecolors()] == [module._colours(10)[n] for n in y[rows].tolist()]
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == list("0123456789")
    assert trustworthiness(unit.numpy(), plane, n_neighbors=5) > 0.9
    draw_map(tmp_path / "few.png", x[:5].float(), None, (), "five images without labels")


def test_a_map_fills_its_frame_and_names_what_colours_cannot_tell_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(figure_files, "save_figure", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(module, "_in_the_plane", lambda x, algorithm, state: x[:, :2])
    made = torch.Generator().manual_seed(0)
    for count, longest in ((10, 5), (100, 18)):
        y = torch.arange(600) % count
        names = [f"{n:02} a_name_of_a_class"[:longest] for n in range(count)]
        wide = torch.randn(600, 2, generator=made) * torch.tensor([3.0, 2.0])
        draw_map(tmp_path / "map.png", wide, y, names, "title")
        figure = figures[-1]
        figure.canvas.draw()
        axis = figure.axes[0]
        for low, high, values in ((*axis.get_xlim(), wide[:, 0]), (*axis.get_ylim(), wide[:, 1])):
            assert (values.max() - values.min()) / (high - low) > 0.9
        box = axis.get_position()
        assert box.width > 0.85, "the frame takes the width of the page"
        assert len({tuple(handle.get_facecolor()[0]) for handle in axis.collections[1:]}) == count
        assert [text.get_text() for text in axis.texts] == (names if count == 100 else [])
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_training_images_in_place_of_a_split_are_said():
    data = digits()
    assert Map("test", 0, 0).notes(data) == []
    said = "split=test: digits has no test images, so the map is of its training images."
    unlabelled = replace(data, memory=None, test=None)
    assert Map("test", 0, 0).notes(unlabelled) == [said]
    neighbours = Neighbours(images=None, k=10, sample=20, seed=0, every_epochs=0)
    said = "digits has no test images, so the sample is of its training images, each without itself."
    assert neighbours.notes(data) == [] and neighbours.notes(unlabelled) == [said]


def test_umap_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="algorithm=umap needs umap-learn; run `pip install umap-learn`, or use"):
        Map("test", 0, 0, "umap")
