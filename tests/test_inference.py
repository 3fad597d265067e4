"""Networks for inference compute what the trained ones do."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GPU
from interpreted import interpreted
from pretended_gpu import pretended, waits
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import features, fused_norm_triton, inference
from twoviews.backbones import ResNet
from twoviews.data.sources import digits
from twoviews.features import embed
from twoviews.inference import PREFERRED_BACKENDS, _Block, choose_backend, fold_batchnorm

CPU = torch.device("cpu")
FORMS = [("basic", "cifar"), ("bottleneck", "strided"), ("basic", "imagenet")]


def relu(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """As cuDNN's operator, with its demands."""
    assert bias is not None and x.dtype == weight.dtype == bias.dtype and x.shape[1] % 8 == 0
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in (x, weight))
    return nnf.conv2d(x, weight, bias, *settings).relu()


def add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *settings: Any) -> Tensor:
    """As cuDNN's operator."""
    assert bias is not None and x.dtype == weight.dtype == bias.dtype == z.dtype
    return (nnf.conv2d(x, weight, bias, *settings) + alpha * z).relu()


@contextlib.contextmanager
def operators(backend: str | None) -> Iterator[None]:
    """Those of a GPU, on the CPU."""
    if backend == "triton" and GPU:
        pytest.skip("Triton has no interpreter beside a GPU")
    with pytest.MonkeyPatch.context() as patch, interpreted() if backend == "triton" else contextlib.nullcontext():
        patch.setattr(torch, "cudnn_convolution_relu", relu)
        patch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
        patch.setattr(inference, "_reasons", {})
        yield


def trained(
    block: str, stem: str, memory_format: torch.memory_format = torch.contiguous_format, width: int = 8
) -> ResNet:
    """With statistics and scales that are no longer 0 and 1."""
    torch.manual_seed(0)
    encoder = ResNet(3, 32, block, [2, 1], width=width, stem=stem).to(memory_format=memory_format)  # type: ignore[arg-type]
    encoder(torch.randn(16, 3, 32, 32).to(memory_format=memory_format))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return encoder


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", [None, "mkldnn", "cudnn", "triton"])
@pytest.mark.parametrize(("block", "stem"), FORMS)
def test_folded_networks_compute_the_same_and_leave_the_original(block, stem, backend, memory_format) -> None:
    encoder = trained(block, stem, memory_format)
    images = torch.randn(16, 3, 32, 32).to(memory_format=memory_format)
    before, given = {name: value.clone() for name, value in encoder.state_dict().items()}, images.clone()
    with operators(backend), torch.no_grad():
        network = fold_batchnorm(nn.Sequential(encoder, nn.Linear(encoder.out_dim, 4)), backend)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        assert any(isinstance(module, _Block) for module in network.modules()) == (backend is not None)
        found = network[0](images)  # type: ignore[index]
    assert torch.equal(images, given)
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    torch.testing.assert_close(found, encoder.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "mkldnn"])
def test_folded_networks_with_few_channels_compute_the_same(backend) -> None:
    encoder, images = trained("basic", "cifar", width=4), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            fold_batchnorm(encoder, backend)(images), encoder.eval()(images), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("backend", ["mkldnn", "cudnn", "triton"])
@pytest.mark.parametrize(("block", "stem"), FORMS)
def test_fused_networks_in_bf16_are_as_exact_as_autocast(block, stem, backend) -> None:
    if backend == "mkldnn" and not inference.convolutions_fuse(torch.bfloat16):
        pytest.skip("mkldnn has no bf16 on this processor")
    encoder, images = trained(block, stem), torch.randn(16, 3, 32, 32)
    with operators(backend), torch.no_grad():
        network = fold_batchnorm(encoder, backend, torch.bfloat16)
        assert {part.weight.dtype for part in network.modules() if isinstance(part, nn.Conv2d)} == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            found, plain = network(images), fold_batchnorm(encoder)(images)
        exact = encoder.eval()(images)
    assert found.dtype == torch.bfloat16
    # Triton's interpreter cuts digits off, where a GPU rounds.
    assert (found - exact).norm() < (6 if backend == "triton" else 1.5) * (plain - exact).norm()


@pytest.mark.parametrize("backend", [None, "mkldnn", "cudnn", "triton"])
@pytest.mark.parametrize("broken", ["conv1.weight", "bn1.running_var"])
def test_what_is_no_number_is_seen(broken: str, backend: str | None) -> None:
    encoder = ResNet(3, 32, "basic", [1, 1], width=8)
    encoder.state_dict()[broken].fill_(torch.nan)
    with operators(backend), torch.no_grad():
        network = fold_batchnorm(encoder, backend)
        assert any(isinstance(module, _Block) for module in network.modules()) == (backend == "triton")
        assert network(torch.randn(2, 3, 32, 32)).isnan().all()


def test_without_the_operators_nothing_is_fused(monkeypatch) -> None:
    encoder = ResNet(3, 32, "basic", [1, 1], width=8)
    assert choose_backend(encoder, CPU, torch.float32, 32, 40) == "mkldnn"
    assert choose_backend(encoder, CPU, torch.float16, 32, 40) is None
    assert choose_backend(nn.Linear(3, 3), CPU, torch.float32, 32, 40) is None
    for supported, backend in ((True, "mkldnn"), (False, None)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert choose_backend(encoder, CPU, torch.bfloat16, 32, 40) == backend
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_backend(encoder, CPU, torch.float32, 32, 40) is None


@pytest.mark.parametrize("backend", PREFERRED_BACKENDS["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "stem"), FORMS)
def test_a_backend_is_tried_before_it_is_used(block, stem, dtype, backend, monkeypatch) -> None:
    encoder = ResNet(3, 32, block, [2, 1], width=8, stem=stem)

    def reason() -> str | None:
        inference._reasons.clear()
        return inference.reason_against(backend, encoder, CPU, dtype, 32, 40)

    with operators(backend):
        assert reason() is None
        if backend == "cudnn":
            for name, wrong in (
                ("relu", lambda *given: nnf.conv2d(*given)),  # without ReLU
                ("relu", lambda x, weight, bias, *given: nnf.conv2d(x, weight, None, *given).relu()),
                ("add_relu", lambda x, weight, z, alpha, *given: nnf.conv2d(x, weight, *given).relu()),
                ("add_relu", lambda *given: add_relu(*given).mul(torch.nan)),
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(torch, f"cudnn_convolution_{name}", wrong)
                    assert "an error of" in (reason() or "")


def test_rounding_to_tf32_is_found_in_fp32(monkeypatch) -> None:
    """An evaluation forbids it."""

    def rounded(x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        bits = [(one.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for one in (x, weight)]
        return relu(*bits, *settings).contiguous(memory_format=torch.channels_last)

    encoder = ResNet(3, 32, "basic", [2, 1], width=8)
    with operators("cudnn"):
        monkeypatch.setattr(torch, "cudnn_convolution_relu", rounded)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert inference.reason_against("cudnn", encoder, CPU, torch.float32, 32, 40)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert inference.reason_against("cudnn", encoder, CPU, torch.float32, 32, 40) is None


def test_the_next_backend_serves_where_one_fails_and_the_last_is_plain_with_one_warning(monkeypatch) -> None:
    """Tried on the CPU, where cuDNN's operators raise."""
    if GPU:
        pytest.skip("Triton has no interpreter beside a GPU")
    encoder, there = ResNet(3, 32, "basic", [1, 1], width=8), torch.device("cuda", 0)
    monkeypatch.setattr(inference, "_reasons", {})
    monkeypatch.setattr(inference, "_warned", set())
    monkeypatch.setattr(inference, "_error", lambda *given, error=inference._error: error(*given[:2], CPU, *given[3:]))
    with interpreted():
        assert choose_backend(encoder, there, torch.float32, 32, 40) == "triton"

    def missing() -> None:
        raise ImportError("no Triton")

    inference._reasons.clear()
    monkeypatch.setattr(fused_norm_triton, "kernels", missing)
    with pytest.warns(UserWarning, match="fused convolutions are of no use.*cudnn: .*triton: ImportError: no Triton"):
        assert choose_backend(encoder, there, torch.float32, 32, 40) is None
    with warnings.catch_warnings(action="error"):
        assert choose_backend(encoder, there, torch.float32, 32, 40) is None
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    assert choose_backend(encoder, there, torch.bfloat16, 32, 40) is None
    monkeypatch.delenv("TWOVIEWS_KERNEL")
    monkeypatch.undo()
    monkeypatch.setattr(inference, "_error", lambda *given, error=inference._error: error(*given[:2], CPU, *given[3:]))
    with operators("cudnn"):
        assert choose_backend(encoder, there, torch.float32, 32, 40) == "cudnn"
        with interpreted():
            assert choose_backend(encoder, there, torch.float16, 32, 40) == "triton"  # what overflows is seen


@pytest.mark.parametrize("backend", PREFERRED_BACKENDS["cuda"])
def test_features_by_the_backends_of_a_gpu(backend, monkeypatch) -> None:
    """On the pretended one: the backend is found, nothing is waited for but whether weights are finite, once."""
    monkeypatch.setitem(features.BATCH, "cuda", 40)
    monkeypatch.setitem(inference.PREFERRED_BACKENDS, "cuda", (backend,))
    torch.manual_seed(0)
    data, encoder = digits(), ResNet(1, 32, "basic", [1, 1], width=8, stem="strided")
    encoder(torch.randn(16, 1, 32, 32))
    images = data.train.subset(torch.arange(100))
    here = embed(encoder, images, data, CPU, torch.float32)
    with pretended(), operators(backend):
        monkeypatch.setenv("TWOVIEWS_KERNEL", "1")
        device = torch.device("cuda", 0)
        images = replace(images, pixels=images.pixels.to(device))  # type: ignore[union-attr]
        network = nn.Sequential(encoder.to(device), nn.Identity())
        for _ in range(2):
            waits.clear()
            there = embed(network, images, data, device, torch.float32, channels_last=True)
        assert list(inference._reasons.values()) == [None]
        assert len(waits) == 1 + (backend == "cudnn"), waits  # to see that weights and features are finite
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_backends_of_a_gpu_agree(dtype, monkeypatch) -> None:
    device, data = torch.device("cuda", 0), digits()
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=32)
    encoder(torch.randn(64, 1, 32, 32))
    exact = embed(encoder, data.train, data, CPU, torch.float32)
    encoder = encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setitem(features.BATCH, "cuda", 512)
    for backends in ((), *((backend,) for backend in PREFERRED_BACKENDS["cuda"])):
        monkeypatch.setattr(inference, "_reasons", {})
        monkeypatch.setitem(inference.PREFERRED_BACKENDS, "cuda", backends)
        with warnings.catch_warnings(action="ignore"):  # cuDNN may have no such operator for this GPU
            found = embed(encoder, data.train, data, device, dtype, channels_last=True).cpu()
        apart = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        assert (found - exact).norm() < apart * exact.norm()
    assert list(inference._reasons.values()) == [None]  # Triton's kernel serves on all of them
