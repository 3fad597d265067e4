"""The map: images with similar features are close, and the same features give the same picture."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness

from twoviews.figures import save_figure
from twoviews.protocols import map as module
from twoviews.protocols.map import draw_map
from twoviews.randomness import generator


def test_map_keeps_neighbours_and_is_the_same_twice(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "MAX_IMAGES", 250)
    monkeypatch.setattr(module, "save_figure", lambda figure, path: (figures.append(figure), save_figure(figure, path)))
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
