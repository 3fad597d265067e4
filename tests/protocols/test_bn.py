"""Prediction-time batch norm, and what all adaptations promise: a table beside no adaptation, an untouched encoder."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from adapting import LINEAR, assert_same, context, probe, state, views, without_batch_norm
from torch import nn

from twoviews.batch_norms import SyncBatchNorm, split_batch_norms
from twoviews.errors import BadInput
from twoviews.protocols import adaptation
from twoviews.protocols.adaptation import Model
from twoviews.protocols.bn import BN
from twoviews.protocols.protocol import EvaluationContext
from twoviews.protocols.t3a import T3A
from twoviews.protocols.tent import Tent
from twoviews.protocols.tsd import TSD

STREAMS = {
    "linear": LINEAR,
    "corruptions": ["contrast"],
    "severities": [5],
    "images": None,
    "batch_size": 50,
    "seed": 0,
}
ALL = {
    "bn": partial(BN, **STREAMS, every_epochs=0),
    "tent": partial(Tent, **STREAMS, lr=1e-3, every_epochs=0),
    "t3a": partial(T3A, **STREAMS, per_class=20, every_epochs=0),
    "tsd_mended": partial(
        TSD, **STREAMS, lr=1e-4, update="all", per_class=20, neighbours=3, lam=0.1, as_released=False, every_epochs=0
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_a_table_beside_no_adaptation_and_an_untouched_encoder(name):
    encoder = context().encoder.train()
    next(encoder.parameters()).requires_grad_(False)
    before = state(encoder)
    try:
        result, again = (ALL[name]()(context()) for _ in range(2))
        assert_same(before, state(encoder))
    finally:
        encoder.eval().requires_grad_(True)
    assert result.values == again.values
    table = result.tables["adaptation"]
    assert [(row["method"], row["corruption"]) for row in table] == [
        (method, corruption) for corruption in ("none", "contrast", "mean") for method in ("none", name)
    ]
    values = result.values
    assert values["top1"] == table[3]["accuracy"] and values["unadapted"] == table[2]["accuracy"]
    assert values["gain"] == pytest.approx(values["top1"] - values["unadapted"])
    for key in ("top1", "unadapted", "gain"):
        assert values[f"{key}_low"] <= values[key] <= values[f"{key}_high"]
    if name != "t3a":  # contrast is what batch statistics undo
        assert values["gain_low"] > 0


@pytest.mark.parametrize("name", ALL)
def test_an_exception_leaves_the_encoder_as_it_was(name, monkeypatch):
    before, calls = state(context().encoder), []

    def failing(*_):
        calls.append(name)
        if len(calls) == 8:  # the second batch that is adapted to; the six before it went to the row of no adaptation
            raise RuntimeError("out of memory")
        return nullcontext()

    monkeypatch.setattr(adaptation, "autocast", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        ALL[name]()(context())
    assert_same(before, state(context().encoder))


def test_equals_the_encoder_in_train_mode():
    model = Model(context(), probe())
    classify = BN(**STREAMS, every_epochs=0).start(model)
    reference = copy.deepcopy(context().encoder).train()
    for images in views(context(), "fog", 5, 50):
        with torch.no_grad():
            expected = probe()(reference(images))
        torch.testing.assert_close(classify(images), expected)
        assert not torch.allclose(expected, probe()(context().encoder(images)), atol=0.1)
    # What it learnt from the batches before does not matter.
    torch.testing.assert_close(classify(images), expected)


@pytest.mark.parametrize("kind", ["split", "sync"])
def test_batch_norms_of_training_see_the_whole_batch(kind):
    images = views(context(), "fog", 5, 50)[0]
    encoder = copy.deepcopy(context().encoder)
    if kind == "split":
        split_batch_norms(encoder, 7)  # which does not divide 50
    else:
        for module in encoder.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    new = SyncBatchNorm(child.num_features)
                    new.load_state_dict(child.state_dict())
                    setattr(module, name, new)
    other = EvaluationContext(encoder.eval(), context().data, torch.device("cpu"), torch.float32)
    bn = BN(**STREAMS, every_epochs=0)
    found, expected = (bn.start(Model(one, probe()))(images) for one in (other, context()))
    torch.testing.assert_close(found, expected)


def test_dropout_stays_off():
    encoder = nn.Sequential(context().encoder, nn.Dropout(0.5))
    other = EvaluationContext.__new__(EvaluationContext)
    other.__dict__.update({**vars(context()), "encoder": encoder})
    images = views(context(), "fog", 5, 50)[0]
    found, expected = (BN(**STREAMS, every_epochs=0).start(Model(one, probe()))(images) for one in (other, context()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bn", "tent"])
def test_an_encoder_without_batch_norm_is_refused(name):
    with pytest.raises(BadInput, match=f"protocol={name} .* has none; use protocol=t3a"):
        ALL[name]()(without_batch_norm())
