"""Learning-rate multipliers at the places where papers and their code state them."""

import math

import pytest

from twoviews.schedule import Constant, Cosine, Step


def test_moco_demo_counts_epochs_from_one():
    """lr 0.06 and 200 epochs: 0.059996 in the first epoch, exactly 0 in the last (notebook of facebookresearch/moco)."""
    schedule = Cosine(epochs=200, every="epoch_from_1")
    assert 0.06 * schedule(0.0) == pytest.approx(0.059996, abs=5e-7)
    assert 0.06 * schedule(96 / 97) == 0.06 * schedule(0.0)
    assert schedule(199.0) == 0.0
    assert schedule(99.0) == pytest.approx(0.5)
    for epoch in range(1, 201):
        assert schedule(epoch - 1 + 0.5) == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 200)), abs=1e-12)


def test_epoch_counts_from_zero_and_holds():
    schedule = Cosine(epochs=100, every="epoch")
    assert schedule(0.99) == 1.0
    assert schedule(50.5) == pytest.approx(0.5)
    assert schedule(99.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_step_follows_the_curve():
    schedule = Cosine(epochs=10)
    assert [schedule(0), schedule(5), schedule(10)] == pytest.approx([1, 0.5, 0])
    assert schedule(2.5) == pytest.approx((1 + 2**-0.5) / 2)
    assert schedule(11) == 0.0


def test_warmup_is_linear_and_the_cosine_takes_the_rest():
    schedule = Cosine(epochs=100, warmup_epochs=10, warmup_start=0.0625, final=0.001)  # SwAV: 0.3, 4.8 and 0.0048
    assert 4.8 * schedule(0) == pytest.approx(0.3)
    assert 4.8 * schedule(5) == pytest.approx((0.3 + 4.8) / 2)
    assert 4.8 * schedule(10) == pytest.approx(4.8)
    assert 4.8 * schedule(55) == pytest.approx((4.8 + 0.0048) / 2)
    assert 4.8 * schedule(100) == pytest.approx(0.0048)
    assert schedule(10 - 1e-9) == pytest.approx(schedule(10), abs=1e-6)


def test_a_training_that_is_all_warmup_ends_at_the_full_rate():
    assert [Cosine(epochs=4, warmup_epochs=4)(epoch) for epoch in (0, 2, 4)] == [0, 0.5, 1]


def test_step_at_milestones():
    schedule = Step(milestones=[120, 160], factor=0.1)
    assert [schedule(epoch) for epoch in (0, 119.99, 120, 159.99, 160, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_constant():
    assert Constant()(0.0) == Constant()(123.4) == 1.0
