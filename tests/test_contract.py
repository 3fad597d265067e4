"""What holds for every method: each method is built and trained for a few steps.

That two processes compute what one does is in test_distributed.py.
"""

import io

import pytest
import torch
from assembled import BATCH, DIFFERENT_CODE, batch_of, build, config, step


@pytest.fixture(params=DIFFERENT_CODE)
def name(request) -> str:
    return request.param


def test_loss_is_a_finite_scalar_that_reaches_every_weight(name):
    parts = build(config(name))
    batch = batch_of(parts, 0)
    assert [tuple(view.shape) for view in batch.views] == [(BATCH, 1, 24, 24)] * 2  # three quarters of the side
    output = parts.method(batch.views, batch.index)
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    for metric in output.metrics.values():
        assert metric.shape == ()
        assert not metric.requires_grad
    output.loss.backward()
    for key, parameter in parts.method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), key
        else:
            assert parameter.grad is None, key
    assert all(parameter.requires_grad for parameter in parts.method.encoder.parameters())


def test_e_step_forward_and_backward_change_no_parameter(name):
    """Checkpoints are copied meanwhile."""
    parts = build(config(name, "data.train_images=256"))
    for number in range(len(parts.loader)):  # a whole epoch, which DeepCluster-v2 clusters
        step(parts, number)
    before = {key: parameter.detach().clone() for key, parameter in parts.method.named_parameters()}
    parts.method.before_epoch(1, parts.embed, seed=1)
    batch = batch_of(parts, 0)
    parts.method(batch.views, batch.index).loss.backward()
    for key, parameter in parts.method.named_parameters():
        assert torch.equal(parameter, before[key]), key


def test_each_trainable_parameter_is_in_exactly_one_group(name):
    method = build(config(name)).method
    grouped = [id(parameter) for group in method.param_groups() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}


def test_a_checkpoint_goes_on_bit_for_bit(name):
    parts = build(config(name))
    for number in range(2):
        step(parts, number)
    file = io.BytesIO()
    torch.save([parts.method.state_dict(), parts.optimizer.state_dict()], file)
    expected = [step(parts, number) for number in (2, 3)]
    file.seek(0)
    other = build(config(name, "seed=1"))
    other.loader = parts.loader
    for part, state in zip((other.method, other.optimizer), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    found = [step(other, number) for number in (2, 3)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    state = other.method.state_dict()
    for key, value in parts.method.state_dict().items():
        assert torch.equal(state[key], value), key


def test_it_learns(name):
    """On one batch over and over, the loss falls."""
    parts = build(config(name, "optimizer.lr=0.5", "optimizer.weight_decay=0"))
    if hasattr(parts.method, "queue"):
        parts.method.queue.push = lambda z: None  # or the batch would become its own negatives
    losses = [step(parts, 0).item() for _ in range(8)]
    assert min(losses[-3:]) < losses[0] - min(0.02, losses[0] / 5)


def test_an_e_step_sees_images_at_the_size_of_the_views():
    parts = build(config("pcl"))
    seen = []

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape[1:])
        return images.mean((2, 3))

    module = torch.nn.Module()
    module.forward = look
    assert len(parts.embed(module)) == len(parts.data.train)
    assert set(seen) == {(1, 24, 24)}
