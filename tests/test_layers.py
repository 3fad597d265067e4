"""Heads, moving averages, the queue and the batch norms, against slow loops and against torch's own."""

import copy
import math
import random
from collections import deque

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twoviews.backbones import ResNet, Timm
from twoviews.batch_norms import SplitBatchNorm, SyncBatchNorm, split_batch_norms, sync_batch_norms
from twoviews.layers import Queue, ema_update, frozen_copy, mlp, rising_momentum, spread, targets, without_duplicates


def layout(head: nn.Sequential) -> list[str]:
    """Each layer by its kind; "+" where it has a bias or is affine."""
    names = []
    for layer in head:
        plus = "+" if getattr(layer, "bias", None) is not None else ""
        names.append(f"{type(layer).__name__}{plus}")
    return names


def test_mlp_layouts():
    assert layout(mlp([4, 8, 3])) == ["Linear", "BatchNorm1d+", "ReLU", "Linear+"]
    assert layout(mlp([4, 8, 3], norm=False)) == ["Linear+", "ReLU", "Linear+"]
    assert layout(mlp([4, 3], norm=False)) == ["Linear+"]
    assert layout(mlp([4, 8, 8, 3], last_norm=True, last_affine=False)) == (
        ["Linear", "BatchNorm1d+", "ReLU", "Linear", "BatchNorm1d+", "ReLU", "Linear", "BatchNorm1d"]
    )
    assert layout(mlp([4, 3], last_norm=True)) == ["Linear", "BatchNorm1d+"]
    widths = [(layer.in_features, layer.out_features) for layer in mlp([4, 8, 5, 3]) if isinstance(layer, nn.Linear)]
    assert widths == [(4, 8), (8, 5), (5, 3)]


def test_spread_against_a_loop():
    torch.manual_seed(0)
    z = torch.randn(7, 5)
    rows = [[value / sum(v * v for v in row) ** 0.5 for value in row] for row in z.tolist()]
    deviations = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        deviations.append((sum((value - mean) ** 2 for value in column) / len(column)) ** 0.5)
    assert spread(z).item() == pytest.approx(5**0.5 * sum(deviations) / 5, rel=1e-5)


def test_spread_is_one_on_an_even_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert spread(torch.randn(4000, 64)).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.randn(1, 64).expand(9, 64) * torch.rand(9, 1)).item() == pytest.approx(0, abs=1e-5)


def test_ema_moves_parameters_and_leaves_buffers():
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
    target = frozen_copy(nn.Sequential(first, second))
    with torch.no_grad():
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    first[1].running_mean.fill_(7.0)
    sources = [*first.parameters(), *second.parameters()]
    expected = [0.9 * t + 0.1 * s for t, s in zip(target.parameters(), sources, strict=True)]
    ema_update(target, (first, second), 0.9)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    assert target[0][1].running_mean.eq(0).all()


@pytest.mark.parametrize(("fraction", "expected"), [(0, 0.996), (0.25, None), (0.5, 0.998), (1, 1.0)])
def test_momentum_rises_with_a_cosine_to_one(fraction, expected):
    expected = expected or 1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2
    assert rising_momentum(0.996, torch.tensor(fraction, dtype=torch.float64)).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_frozen_copy_is_equal_apart_and_without_gradients():
    module = nn.Linear(3, 2)
    copy = frozen_copy(module)
    assert torch.equal(copy.weight, module.weight)
    assert copy.weight.data_ptr() != module.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_are_what_the_network_makes_of_each_view_with_weights_cast_once(dtype):
    torch.manual_seed(0)
    network = frozen_copy(nn.Sequential(ResNet(3, 16, "basic", [1, 1], width=4), mlp([8, 8, 4])))
    same, views = copy.deepcopy(network), [torch.randn(4, 3, 16, 16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            expected = [same(view).float() for view in views]
        with Casts() as casts:
            found = targets(network, views)
    assert all(map(torch.equal, found, expected)) and not any(z.requires_grad for z in found)
    assert all(map(torch.equal, network.state_dict().values(), same.state_dict().values()))
    weights = [tuple(weight.shape) for weight in network.parameters() if weight.ndim > 1]
    assert all(casts.shapes.count(shape) <= weights.count(shape) for shape in weights)
    assert bool(casts.shapes) == (dtype == torch.bfloat16)


def test_targets_leave_tokens_of_a_transformer_in_fp32():
    """As autocast does, which casts the weights of convolutions and linear layers alone."""
    network = frozen_copy(Timm(3, 32, "vit_tiny_patch16_224"))
    seen: list[torch.dtype] = []
    network.model.blocks[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = network(view := torch.randn(2, 3, 32, 32)).float()
        (found,) = targets(network, [view])
    assert seen[0] == seen[1] and torch.equal(found, expected)


class Casts(TorchDispatchMode):
    """Shapes of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_queue_starts_with_unit_rows_and_saves_all_of_itself():
    queue = Queue(50, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    queue.push(torch.randn(30, 8))
    other = Queue(50, 8)
    other.load_state_dict(queue.state_dict())
    more = torch.randn(40, 8)
    queue.push(more)
    other.push(more)
    assert torch.equal(queue.rows, other.rows)
    assert queue.position.item() == other.position.item() == 20


def test_queue_holds_the_newest_rows_oldest_overwritten_first():
    size, picked = 13, random.Random(0)
    queue, model, number = Queue(size, 1), deque(maxlen=size), 0
    for _ in range(30):
        rows = [float(number + i) for i in range(picked.randint(1, size))]
        number += len(rows)
        queue.push(torch.tensor(rows)[:, None])
        model.extend(rows)
        if len(model) == size:
            # From `position` on, around the end: oldest to newest.
            assert queue.rows.flatten().roll(-queue.position.item()).tolist() == list(model)
    assert number > 5 * size


def test_queue_does_not_keep_the_graph():
    queue = Queue(8, 2)
    queue.push(torch.ones(3, 2, requires_grad=True) * 2)
    assert not queue.rows.requires_grad


def split_norm(channels: int, splits: int) -> SplitBatchNorm:
    norm = SplitBatchNorm(channels)
    norm.splits = splits
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels) + 0.5)
        norm.bias.copy_(torch.randn(channels))
        norm.running_mean.copy_(torch.randn(channels))
        norm.running_var.copy_(torch.rand(channels) + 0.5)
    return norm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_against_a_loop_over_parts(memory_format):
    """Image i is in part i % S; running statistics are the mean over the parts (methods.md of MoCo's CIFAR demo)."""
    torch.manual_seed(0)
    splits, channels = 3, 4
    norm = split_norm(channels, splits)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    scale = torch.arange(1.0, 13.0)[:, None, None, None]  # every image with statistics of its own
    for _ in range(2):
        x = (torch.randn(12, channels, 2, 3) * scale).to(memory_format=memory_format)
        y = norm(x)
        assert y.is_contiguous(memory_format=memory_format)
        means, variances = [], []
        for part in range(splits):
            mine = x[part::splits]
            m, v = mine.mean((0, 2, 3)), mine.var((0, 2, 3), correction=0)
            expected = (mine - m.view(-1, 1, 1)) / (v.view(-1, 1, 1) + norm.eps).sqrt()
            expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
            torch.testing.assert_close(y[part::splits], expected, rtol=1e-4, atol=1e-5)
            means.append(0.9 * mean + 0.1 * m)
            variances.append(0.9 * var + 0.1 * mine.var((0, 2, 3), correction=1))
        mean, var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked.item() == 0


def test_split_batch_norm_gradients_are_those_of_separate_norms():
    torch.manual_seed(0)
    norm, plain = split_norm(3, 2), nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(8, 3, 2, 2)
    goal = torch.randn(8, 3, 2, 2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (norm(a) * goal).sum().backward()
    (sum((plain(b[part::2]) * goal[part::2]).sum() for part in range(2))).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-5)


def test_split_batch_norm_is_an_ordinary_one_in_eval_mode_and_with_one_part():
    torch.manual_seed(0)
    norm, plain = split_norm(3, 2), nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    norm.splits = 1
    assert torch.equal(norm.train()(x), plain.train()(x))
    assert torch.equal(norm.running_var, plain.running_var)


def test_split_batch_norms_replaces_all_and_changes_no_state():
    torch.manual_seed(0)
    encoder = ResNet(3, 16, "basic", [1, 1], width=4)
    encoder.bn1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    split_batch_norms(encoder, 4)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, SplitBatchNorm) and norm.splits == 4 for norm in norms)
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not encoder.bn1.weight.requires_grad
    assert encoder.layer1[0].bn1.weight.requires_grad


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (4, 3, 2, 5))])
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_in_one_process_is_torchs(kind, shape, affine):
    """What it does in several is in test_distributed.py."""
    torch.manual_seed(0)
    plain = kind(3, affine=affine)
    if affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    mine = sync_batch_norms(nn.Sequential(plain), torch.device("cpu"))[0]
    assert isinstance(mine, SyncBatchNorm)
    plain = kind(3, affine=affine)
    plain.load_state_dict(mine.state_dict())
    for _ in range(2):
        x, goal = torch.randn(shape) * 3 + 1, torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = mine(a), plain(b)
        (y * goal).sum().backward()
        (expected * goal).sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value)
    torch.testing.assert_close(mine.eval()(x), plain.eval()(x))


def test_sync_batch_norms_leaves_split_norms_and_modes():
    module = nn.Sequential(nn.BatchNorm2d(2), SplitBatchNorm(2), nn.BatchNorm1d(2).eval())
    sync_batch_norms(module, torch.device("cpu"))
    assert [type(child) for child in module] == [SyncBatchNorm, SplitBatchNorm, SyncBatchNorm]
    assert [child.training for child in module] == [True, True, False]


def test_without_duplicates_keeps_trainable_ones_once_in_order():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.bias.requires_grad_(False)
    found = without_duplicates([first, second, first])
    assert [id(parameter) for parameter in found] == [id(first.weight), id(first.bias), id(second.weight)]
