"""Fused batch norms against plain modules in float64: C, and Triton's in its interpreter, or compiled where there is a GPU."""

import contextlib
import copy
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from conftest import GPU
from interpreted import SMALL, interpreted
from torch import Tensor, nn

from twoviews import compiled, fused_norm, fused_norm_check, fused_norm_triton
from twoviews.backbones import ResNet
from twoviews.batch_norms import SplitBatchNorm, SyncBatchNorm, split_batch_norms
from twoviews.fused_norm import batch_norm_act, reason_for_plain, separate_views
from twoviews.fused_norm_check import CASES
from twoviews.fused_norm_cpu import SOURCE, Compiled
from twoviews.fused_norm_triton import BLOCKS, Triton
from twoviews.layers import encode_views

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if GPU else CPU
FUSED = "_BatchNormActBackward"
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # the interpreter rounds towards zero


@pytest.fixture(scope="module", params=["triton", "c"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[Triton | Compiled]:
    """Who makes the passes in a test."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if request.param == "c":
            patch.setattr(sys.modules[__name__], "DEVICE", CPU)
            patch.setenv("TWOVIEWS_KERNEL", "1")
        elif not GPU:
            stack.enter_context(interpreted(SMALL))
        assert reason_for_plain(DEVICE) is None
        passes = fused_norm._passes(DEVICE)
        assert isinstance(passes, Compiled if request.param == "c" else Triton)
        yield passes


@pytest.fixture
def triton(kernels: Triton | Compiled) -> None:
    """Of a test of Triton's kernels."""
    if not isinstance(kernels, Triton):
        pytest.skip("about Triton's kernels")


@pytest.fixture
def c(kernels: Triton | Compiled) -> Compiled:
    """Of a test of the compiled C."""
    if not isinstance(kernels, Compiled):
        pytest.skip("about the compiled C")
    return kernels


def make_norm(channels: int, splits: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels) if splits == 1 else SplitBatchNorm(channels)
    if isinstance(norm, SplitBatchNorm):
        norm.splits = splits
    random = torch.Generator().manual_seed(channels)
    weight, bias, mean, var = 0.5 + torch.rand((4, channels), generator=random)
    norm.load_state_dict(
        {**norm.state_dict(), "weight": weight, "bias": -bias, "running_mean": mean, "running_var": var}
    )
    return norm.to(DEVICE)


def make_x(*shape: int, dtype: torch.dtype = torch.float32, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Each image with a size of its own, so that it is seen which part it is in."""
    random = torch.Generator().manual_seed(seed)
    x = shift + torch.randn(shape, generator=random) * torch.linspace(0.5, 2, shape[0])[:, None, None, None]
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def close(found: Tensor | None, expected: Tensor | None, coarse: float) -> None:
    assert found is not None and expected is not None
    apart, size = (found.double() - expected).abs(), expected.abs() + expected.abs().mean()
    assert (apart <= coarse * size).all(), f"{(apart / size).max():.1e}"


def compare(
    splits: int, shape: tuple[int, ...], relu: bool, with_residual: bool, dtype: torch.dtype, views: int = 1
) -> None:
    norm, x = make_norm(shape[1], splits), make_x(*shape, dtype=dtype).requires_grad_()
    residual = make_x(*shape, dtype=dtype, seed=1).requires_grad_() if with_residual else None
    exact = copy.deepcopy(norm).double()
    inputs = [t.detach().double().requires_grad_() for t in (x, residual) if t is not None]
    act = nn.ReLU(inplace=True) if relu else None
    expected = torch.cat([exact(view) for view in inputs[0].chunk(views)]) + (inputs[1] if with_residual else 0)
    grad = make_x(*shape, dtype=dtype, seed=2)
    if relu:
        grad = grad.where(expected.abs() > 1e-3, 0)  # on either side of the kink, rounding decides
        expected = expected.relu()
    expected.backward(grad.double())
    with separate_views(views):
        y = batch_norm_act(norm, x, act, residual)
    assert type(y.grad_fn).__name__ == FUSED and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(grad)
    coarse = CLOSE[dtype]
    close(y, expected, coarse)
    close(norm.running_mean, exact.running_mean, 1e-5)
    close(norm.running_var, exact.running_var, 1e-5)
    assert norm.num_batches_tracked == exact.num_batches_tracked == (views if splits == 1 else 0)
    close(x.grad, inputs[0].grad, coarse)
    close(norm.weight.grad, exact.weight.grad, 1e-4)
    close(norm.bias.grad, exact.bias.grad, 1e-4)
    if residual is not None:
        close(residual.grad, inputs[1].grad, coarse)


AFTER = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("relu", "with_residual"), AFTER)
@pytest.mark.parametrize("shape", [(16, 3, 7, 7), (48, 5, 1, 1), (16, 48, 3, 2)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_outputs_statistics_and_gradients_are_those_of_modules(splits, shape, relu, with_residual):
    compare(splits, shape, relu, with_residual, torch.float32)


@pytest.mark.parametrize(("relu", "with_residual"), AFTER)
@pytest.mark.parametrize(("splits", "shape"), [(1, (4, 16, 7, 5)), (3, (9, 5, 5, 4)), (8, (16, 130, 2, 2))])
def test_so_they_are_in_bf16(splits, shape, relu, with_residual):
    compare(splits, shape, relu, with_residual, torch.bfloat16)


@pytest.mark.parametrize(("relu", "with_residual"), AFTER)
@pytest.mark.parametrize(("splits", "shape", "views"), [(1, (12, 5, 3, 3), 3), (2, (16, 48, 3, 2), 2)])
def test_views_have_statistics_of_their_own(splits, shape, views, relu, with_residual):
    compare(splits, shape, relu, with_residual, torch.float32, views)


@pytest.mark.parametrize("splits", [1, 2])
def test_plain_modules_see_one_view_at_a_time_too(splits, monkeypatch):
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    norm, x, residual = make_norm(5, splits), make_x(12, 5, 3, 3).requires_grad_(), make_x(12, 5, 3, 3, seed=1)
    other = copy.deepcopy(norm)
    with separate_views(3):
        y = batch_norm_act(norm, x, nn.ReLU(), residual)
    assert type(y.grad_fn).__name__ != FUSED
    expected = [(other(view) + its).relu() for view, its in zip(x.chunk(3), residual.chunk(3), strict=True)]
    assert torch.equal(y, torch.cat(expected))
    assert torch.equal(norm.running_mean, other.running_mean) and torch.equal(norm.running_var, other.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_half_precision_and_splits_of_one_part(dtype):
    compare(8, (24, 6, 3, 3), True, False, torch.float32)
    norm, x = make_norm(4, 2), make_x(6, 4, 3, 3, dtype=dtype)
    assert isinstance(norm, SplitBatchNorm)
    norm.splits = 1
    exact = copy.deepcopy(norm).double()
    close(batch_norm_act(norm, x), exact(x.double()).detach(), 1e-3)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("splits", [1, 4])
def test_statistics_do_not_cancel_where_the_mean_is_large(splits):
    """float32 sums of squares would be wrong by about 1000^2 / 2^24 = 6 %."""
    norm, x = make_norm(6, splits), make_x(16, 6, 8, 8, shift=1000.0)
    exact = copy.deepcopy(norm).double()
    expected = exact(x.double())
    close(batch_norm_act(norm, x), expected.detach(), 2e-4)
    close(norm.running_var, exact.running_var, 1e-5)


def test_without_gradients_nothing_is_kept():
    norm, x, kept = make_norm(5, 2), make_x(4, 5, 3, 3), []
    exact = copy.deepcopy(norm).double()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        with torch.no_grad():
            y = batch_norm_act(norm, x, nn.ReLU(), x)
        assert y.grad_fn is None and not kept
        assert batch_norm_act(norm, x, nn.ReLU(), x).grad_fn is not None and kept
    close(y, (exact(x.double()) + x.double()).relu().detach(), 1e-5)


def test_frozen_inputs_and_parameters_get_no_gradients():
    norm, x, residual = make_norm(5, 2), make_x(4, 5, 3, 3), make_x(4, 5, 3, 3, seed=1).requires_grad_()
    norm.weight.requires_grad_(False)
    y = batch_norm_act(norm, x, None, residual)
    y.sum().backward()
    assert x.grad is None and norm.weight.grad is None and residual.grad is not None
    close(norm.bias.grad, torch.full_like(norm.bias, 36).double(), 1e-5)


def test_what_is_no_number_stays_so():
    norm, x = make_norm(3, 2), make_x(4, 3, 2, 2)
    x[1, 2] = float("nan")
    y = batch_norm_act(norm, x, nn.ReLU())
    assert y[1::2, 2].isnan().all() and y[::2].isfinite().all() and y[:, :2].isfinite().all()


def test_residuals_and_gradients_of_other_memory_formats():
    norm, x, residual = make_norm(4, 2), make_x(4, 4, 3, 2).requires_grad_(), make_x(4, 4, 3, 2, seed=1).contiguous()
    exact, other = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    expected = (exact(other) + residual.double()).relu().square().mean((2, 3))
    expected.sum().backward()
    y = batch_norm_act(norm, x, nn.ReLU(), residual).square().mean((2, 3))
    y.sum().backward()
    close(y, expected, 1e-5)
    close(x.grad, other.grad, 1e-5)


@pytest.mark.parametrize(("block", "splits"), [("basic", 1), ("basic", 4), ("bottleneck", 4)])
def test_a_resnet_is_what_it_is_with_plain_modules(block, splits, kernels, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network = ResNet(3, 8, block, [1, 1], width=4).to(DEVICE, memory_format=torch.channels_last)
    if splits > 1:
        split_batch_norms(network, splits)
    images, before = make_x(8, 3, 8, 8), copy.deepcopy(network)
    one, other = copy.deepcopy(network), copy.deepcopy(network).double()
    ran, name = [], "_run" if isinstance(kernels, Compiled) else "launch"
    owner = Compiled if isinstance(kernels, Compiled) else fused_norm_triton
    run = getattr(owner, name)

    def note(*arguments, **constants):
        ran.append(next(one for one in arguments if isinstance(one, str)))
        run(*arguments, **constants)

    monkeypatch.setattr(owner, name, note)
    features = one(images)
    features.square().sum().backward()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert {name: ran.count(name) for name in ran} == dict.fromkeys(
        ("statistics", "finish_statistics", "normalise", "sums", "finish_sums", "input_gradient"), norms
    )
    ran.clear()
    expected = other(images.double())
    expected.square().sum().backward()
    assert not ran
    close(features, expected, 1e-4)
    assert one.state_dict().keys() == before.state_dict().keys()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm(), name
    for (name, mine), theirs in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("block", "splits"), [("basic", 1), ("basic", 2), ("bottleneck", 1)])
def test_a_resnet_takes_all_views_at_once_as_if_one_after_another(block, splits):
    torch.manual_seed(0)
    network = ResNet(3, 8, block, [1, 1], width=4).to(DEVICE, memory_format=torch.channels_last)
    if splits > 1:
        split_batch_norms(network, splits)
    views, other, batches = [make_x(4, 3, 8, 8, seed=seed) for seed in range(3)], copy.deepcopy(network).double(), []
    network.conv1.register_forward_hook(lambda *given: batches.append(len(given[-1])))
    features, expected = encode_views(network, views), [other(view.double()) for view in views]
    assert batches == [12]
    for found in (features, expected):
        sum((v + 1) * view.square().sum() for v, view in enumerate(found)).backward()
    for found, exact in zip(features, expected, strict=True):
        close(found, exact, 1e-4)
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm(), name
    for (name, mine), theirs in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5), name


class Subclass(ResNet):
    """Whose forward pass may be another."""


@pytest.mark.parametrize("why", ["sizes", "eval", "strides", "plain", "subclass", "part"])
def test_other_views_go_through_an_encoder_one_after_another(why, monkeypatch):
    network = (Subclass if why == "subclass" else ResNet)(3, 8, "basic", [1, 1], width=4)
    network.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    views, batches = [make_x(4, 3, 8, 8), make_x(4, 3, 8, 8, seed=1)], []
    if why == "part":
        network.layer2 = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).to(DEVICE)
    if why == "sizes":
        views[1] = make_x(4, 3, 6, 6)
    if why == "strides":
        views = [view.contiguous() for view in views]
    if why == "plain":
        monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    network.train(why != "eval").conv1.register_forward_hook(lambda *given: batches.append(len(given[-1])))
    assert [len(features) for features in encode_views(network, views)] == [4, 4]
    assert batches == [4, 4]


def changed(norm: nn.BatchNorm2d, how: str) -> nn.BatchNorm2d:
    if how == "hook":
        norm.register_forward_hook(lambda *_: None)
    if how == "forward":
        norm.forward = partial(type(norm).forward, norm)  # type: ignore[method-assign]
    if how == "momentum":
        norm.momentum = None
    if how == "double":
        norm.double()
    return norm.eval() if how == "eval" else norm


@pytest.mark.parametrize("how", ["eval", "hook", "forward", "momentum", "double", "strides", "act", "sync", "switch"])
def test_all_else_is_left_to_the_modules(how, monkeypatch):
    norm, x = changed(make_norm(3, 1), how), make_x(4, 3, 2, 2)
    if how == "sync":
        norm = SyncBatchNorm(3).to(DEVICE)
    if how == "switch":
        monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
        assert reason_for_plain(DEVICE) == "TWOVIEWS_KERNEL=0"
    x = x.double() if how == "double" else x.contiguous() if how == "strides" else x
    act = nn.SiLU() if how == "act" else nn.ReLU()
    other = copy.deepcopy(norm)
    if how == "forward":
        del other.forward
    y = batch_norm_act(norm, x.requires_grad_(), act, x)
    assert type(y.grad_fn).__name__ != FUSED
    assert torch.equal(y, act(other(x) + x))


def test_what_cannot_be_divided_is_refused_by_the_module():
    with pytest.raises(ValueError, match="5 images cannot be divided into 2 parts"):
        batch_norm_act(make_norm(3, 2), make_x(5, 3, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm_act(make_norm(3, 1), make_x(1, 3, 1, 1))


@pytest.mark.parametrize("wrong", ["statistics", "normalise", "sums", "input_gradient"])
@pytest.mark.parametrize("amount", [1.03, float("nan")])
def test_wrong_kernels_are_not_used_and_that_is_said(wrong, amount, kernels, monkeypatch):
    """One pass makes its first result a little larger."""
    right = getattr(kernels, wrong)

    def spoilt(*arguments):
        found = right(*arguments)
        output = arguments[2]  # of passes that return nothing
        first = output if found is None else found[0] if isinstance(found, tuple) else found
        first.mul_(amount)
        return found

    monkeypatch.setattr(kernels, wrong, spoilt)
    fused_norm._checked.cache_clear()
    norm, x = make_norm(3, 2), make_x(4, 3, 2, 2).requires_grad_()
    other = copy.deepcopy(norm)
    y = batch_norm_act(norm, x)
    assert batch_norm_act(copy.deepcopy(norm), x).shape == x.shape
    assert (reason_for_plain(DEVICE) or "").startswith("wrong ")
    assert type(y.grad_fn).__name__ != FUSED and torch.equal(y, other(x))
    fused_norm._checked.cache_clear()


def test_without_triton_plain_norms_run_and_that_is_said(triton, monkeypatch):
    def missing(*arguments, **constants):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(fused_norm_triton, "launch", missing)
    fused_norm._checked.cache_clear()
    assert reason_for_plain(DEVICE) == "ModuleNotFoundError: No module named 'triton'"
    fused_norm._checked.cache_clear()


def test_without_a_compiler_plain_norms_run(c, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(fused_norm, "_compiled", lambda: None)
    compiled.library.cache_clear()
    assert "no C compiler no-such-compiler" in (reason_for_plain(CPU) or "")
    y = batch_norm_act(make_norm(3, 1), make_x(4, 3, 2, 2).requires_grad_())
    assert type(y.grad_fn).__name__ != FUSED
    compiled.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("splits", "shape"), [(1, (37, 19, 5, 3)), (3, (51, 70, 3, 3)), (8, (16, 48, 9, 8))])
def test_results_are_the_same_for_all_numbers_of_threads(c, splits, shape, dtype):
    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        norm, x, residual = (
            make_norm(shape[1], splits),
            make_x(*shape, dtype=dtype),
            make_x(*shape, dtype=dtype, seed=1),
        )
        leaves = [x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias]
        y = batch_norm_act(norm, x, nn.ReLU(), residual)
        assert type(y.grad_fn).__name__ == FUSED
        grads = torch.autograd.grad(y, leaves, make_x(*shape, dtype=dtype, seed=2))
        return [y, norm.running_mean, norm.running_var, *grads]

    threads = torch.get_num_threads()
    try:
        expected = results(1)
        for number in (2, 3):
            assert all(torch.equal(one, other) for one, other in zip(results(number), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("flags", ["", "-mno-avx512bf16", "-march=x86-64"])
def test_processors_without_some_instructions_round_alike(c, flags, tmp_path):
    """bf16 to the nearest, of two to the even one, and what is no number stays so."""
    built, command = tmp_path / "norm.so", [os.environ.get("CC", "cc"), *compiled.FLAGS, *flags.split()]
    if "x86" not in platform.machine():
        pytest.skip("flags of x86")
    subprocess.run([*command, str(SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True)
    x = torch.randn(3, 53, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    x[0, 0, 0, 1] = float("inf")
    weight, bias = 1 + torch.arange(53) / 64, torch.full((53,), 2.0**-9)  # products and sums are exact in float32
    moments = torch.stack((torch.zeros(1, 53), torch.ones(1, 53)))
    expected = x.float() * weight[:, None, None] + bias[:, None, None]
    found = torch.empty_like(x)
    Compiled(ctypes.CDLL(str(built))).normalise(x, None, found, weight, bias, moments, False)
    assert torch.equal(found.nan_to_num(7.0), expected.bfloat16().nan_to_num(7.0))


def test_only_their_use_imports_triton():
    code = "import sys, twoviews.backbones, twoviews.layers; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_division_by_multiplication_is_exact():
    random = torch.Generator().manual_seed(0)
    for size in [*range(1, 70), 3136, 12544, 65535, 65537, 2**20 - 1, 2**30 - 1]:
        _, multiplier, shift = fused_norm_triton.division(2, size)
        multiples = torch.randint(2**31 // size, (500,), generator=random) * size
        r = torch.cat([multiples, multiples - 1, multiples + size - 1, torch.tensor([0, 2**31 - 1])])
        r = r[(r >= 0) & (r < 2**31)]
        assert torch.equal(r * multiplier >> shift, r // size), size
    _, multiplier, shift = fused_norm_triton.division(1, 49)
    assert (2**31 - 1) * multiplier >> shift == 0


@pytest.mark.slow
def test_the_check_with_the_blocks_of_a_gpu(triton, monkeypatch):
    """Of which `interpreted` makes smaller ones."""
    monkeypatch.setattr(fused_norm_triton, "BLOCKS", BLOCKS)
    monkeypatch.setattr(fused_norm_check, "CASES", CASES)
    fused_norm_triton.plan.cache_clear()
    fused_norm._checked.cache_clear()
    assert reason_for_plain(DEVICE) is None
    fused_norm._checked.cache_clear()
    fused_norm_triton.plan.cache_clear()


@pytest.mark.gpu
def test_they_are_used_on_this_gpu(triton):
    fused_norm._checked.cache_clear()
    assert reason_for_plain(DEVICE) is None
    assert reason_for_plain(torch.device("cuda")) is None
    for relu, with_residual in AFTER:
        compare(8, (64, 64, 32, 32), relu, with_residual, torch.bfloat16)
        compare(1, (64, 512, 4, 4), relu, with_residual, torch.bfloat16)
        compare(4, (32, 48, 7, 7), relu, with_residual, torch.float32)


@pytest.mark.gpu
def test_they_can_be_captured_and_are_the_same_each_time(triton):
    norm, x = make_norm(128, 8), make_x(64, 128, 16, 16, dtype=torch.bfloat16).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = batch_norm_act(norm, x, nn.ReLU(), x.detach())
        # Detached: nodes of an earlier graph that are still alive would join its stream with that of the capture.
        return (y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, norm.weight, norm.bias)))

    start = copy.deepcopy(norm.state_dict())
    expected = [t.clone() for t in step()]
    statistics = norm.running_var.clone()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        norm.load_state_dict(start)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(norm.running_var, statistics)


@pytest.mark.gpu
def test_more_numbers_than_int32_counts(triton):
    norm, parts = make_norm(64, 4), 4
    x = torch.randn(64, 64, 736, 736, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[::parts] += 1
    with torch.no_grad():
        y = batch_norm_act(norm, x, None, x)
        for last in (-1, -parts):
            mine = x[last % parts :: parts]
            var, mean = torch.var_mean(mine.float(), (0, 2, 3), keepdim=True)
            expected = (x[last].float() - mean[0]) * (var[0] + norm.eps).rsqrt() * norm.weight[:, None, None]
            expected = expected + norm.bias[:, None, None] + x[last].float()
            assert torch.allclose(y[last].float(), expected, rtol=2**-8, atol=1e-2)
