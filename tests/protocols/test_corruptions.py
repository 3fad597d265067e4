"""Streams of corrupted test images, their table and intervals, and the protocol that leaves the classifier alone."""

import statistics
from dataclasses import replace

import pytest
import torch
from adapting import LINEAR, assert_same, context, probe, some_digits, state
from omegaconf import OmegaConf
from test_configs import composed

from twoviews.config.building import build
from twoviews.data.corruptions import CORRUPTIONS, corrupt
from twoviews.errors import BadInput
from twoviews.protocols.classification import top1
from twoviews.protocols.corruptions import Corruptions
from twoviews.protocols.protocol import EvaluationContext
from twoviews.protocols.streams import Streams
from twoviews.signatures import mismatch, signature


def test_values_and_table():
    corruptions = Corruptions(LINEAR, ["frost", "gaussian_noise"], [1, 5], None, seed=0, every_epochs=0)
    before = state(context().encoder)
    result = corruptions(context())
    assert_same(before, state(context().encoder))
    table = result.tables["corruptions"]
    names = ["none", "frost (procedural)", "frost (procedural)", "gaussian_noise", "gaussian_noise", "mean"]
    assert [row["corruption"] for row in table] == names
    assert [row["severity"] for row in table] == [0, 1, 5, 1, 5, "all"]
    for row in table:
        assert row["low"] <= row["accuracy"] <= row["high"] and row["high"] - row["low"] < 20
        assert row["ms_per_image"] > 0
    assert result.values["top1"] == pytest.approx(statistics.mean(row["accuracy"] for row in table[1:-1]))
    assert result.values["top1_low"] == table[-1]["low"] and result.values["clean"] == table[0]["accuracy"]
    assert result.values["clean"] == pytest.approx(top1(probe()(context().test.x), context().test.y))
    assert table[4]["accuracy"] < table[0]["accuracy"]
    # As by hand, in the order of the files.
    test, data = context().data.test, context().data
    noisy = corrupt(test.pixels, torch.arange(150), "gaussian_noise", 5, seed=0)
    with torch.no_grad():
        x = context().encoder((noisy.float() / 255 - data.mean[0]) / data.std[0])
    assert table[4]["accuracy"] == pytest.approx(top1(probe()(x), test.labels))


def test_again_is_the_same():
    corruptions = Corruptions(LINEAR, ["snow"], [3], 60, seed=1, every_epochs=0)
    one, two = (corruptions(context()).values for _ in range(2))
    assert one == two


def test_streams_hold_every_image_once_in_even_batches():
    streams = Streams(context(), ["fog"], [2], None, seed=0)
    batches = list(streams.batches("fog", 2, 40))
    assert [len(images) for images, _ in batches] == [38, 38, 37, 37]
    assert torch.equal(torch.cat([rows for _, rows in batches]), torch.arange(150))
    assert torch.equal(streams.index.sort().values, torch.arange(150))
    assert not torch.equal(streams.index, torch.arange(150))
    other = torch.cat([images for images, _ in streams.batches("fog", 2, 7)])
    assert torch.equal(torch.cat([images for images, _ in batches]), other)


def test_fewer_images_keep_the_shares_of_the_classes():
    streams = Streams(context(), ["fog"], [2], 50, seed=0)
    assert len(streams.index.unique()) == 50
    whole = torch.bincount(context().data.test.labels, minlength=10) / 3
    assert (torch.bincount(streams.labels, minlength=10) - whole).abs().max() < 1


def test_all_fifteen():
    streams = Streams(context(), None, [1, 5], None, seed=0)
    assert [name for name, _ in streams.names] == ["none", *(name for name in CORRUPTIONS for _ in range(2))]


def test_a_misspelt_name_is_corrected():
    names = signature("twoviews.protocols.corruptions.Corruptions")["corruptions"].annotation
    assert "did you mean 'fog'" in mismatch(["fgo"], names)


@pytest.mark.parametrize("key", ["corruptions", "severities"])
def test_nothing_to_measure_is_refused(key):
    ((_, node),) = composed("protocol=[corruptions]").protocol.items()
    with pytest.raises(BadInput, match=rf"{key}=\[\] is an empty list"):
        build({**OmegaConf.to_container(node, resolve=True), key: []})


def test_labels_are_needed():
    alone = EvaluationContext(context().encoder, replace(some_digits(), test=None), torch.device("cpu"), torch.float32)
    with pytest.raises(BadInput, match="no labelled test images"):
        Corruptions(LINEAR, None, [1], None, seed=0, every_epochs=0)(alone)
