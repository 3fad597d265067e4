"""kernel.cu on a CPU: its threads as threads of the machine, against tensors; and NVRTC's word on it."""

import contextlib
import ctypes
import inspect
import re
import site
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import STRONG
from kernel_on_cpu import Block, compile_for_cpu
from torch import Tensor

from twoviews.data import kernel_cuda
from twoviews.data import rendering as module
from twoviews.data.views import Views, eval_view

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
GREY = {key: STRONG[key] for key in ("scale", "flip", "jitter", "brightness", "contrast", "blur", "solarize")}
SOURCE = kernel_cuda.SOURCE.read_text()
BARRIERS = [match.span() for match in re.finditer(r"__syncthreads\(\);", SOURCE)]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_cpu(kernel_cuda.SOURCE, tmp_path_factory.mktemp("kernel"))


@cache
def noisy(count: int, channels: int, side: int) -> Tensor:
    """uint8 [count, channels, side, side]: noise over a coarse pattern, so that blurs and means have something to do."""
    random = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, channels, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (255 * (0.7 * smooth + 0.3 * torch.rand(smooth.shape, generator=random))).byte()


def both(render: Callable, recipe: dict, size: int, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views by kernel.cu, by tensors, and which are solarized."""
    channels = images.shape[1]
    statistics = {"mean": (MEAN * 2)[:channels], "std": (STD * 2)[:channels]}
    views = Views({"only": {**recipe, "size": size}}, size=images.shape[-1], channels=channels, **statistics)
    draws = views.draw(sizes, torch.Generator().manual_seed(3))
    (ours,) = render(images, [size], *module.arguments(images, draws), views.mean, views.std) or [None]
    theirs = module.in_tensors(images, draws[0], views.recipes[0], size, views.mean, views.std)
    return ours, theirs, draws[0].solarize


def close(ours: Tensor, theirs: Tensor, solarized: Tensor) -> bool:
    """Equal to rounding, in standard deviations; of what is solarized a px may fall to the other side."""
    differ = ~((ours - theirs).abs() <= 2e-5)
    return not differ[~solarized].any() and differ[solarized].float().mean().nan_to_num() < 1e-3


def oblong(count: int) -> Tensor:
    """Heights and widths of the pictures that the canvases are of."""
    return torch.randint(40, 200, (count, 2), generator=torch.Generator().manual_seed(0))


FORMS = [(1, 1), (7, 1), (7, -1), (7, 0)]


@pytest.mark.parametrize("threads, order", FORMS, ids=["alone", "in turns", "backwards", "at once"])
@pytest.mark.parametrize(
    "side, size, channels", [(32, 32, 3), (96, 96, 3), (64, 20, 3), (20, 41, 3), (64, 24, 1), (30, 17, 5)]
)
def test_kernel_makes_the_views_of_tensors(library, side, size, channels, threads, order):
    images = noisy(12, channels, side)
    render = partial(kernel_cuda.render, Block(library, threads, order))
    recipe = STRONG if channels == 3 else GREY
    ours, theirs, solarized = both(render, recipe, size, images, oblong(len(images)))
    assert close(ours, theirs, solarized)


MIXED = {"a": {**STRONG, "count": 2}, "b": {**STRONG, "size": 20, "count": 2}, "c": {**STRONG, "blur": 0.0}}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_views_in_other_forms(library, dtype, memory_format, monkeypatch):
    """Two sizes, in three launches, with as many copies to the device as one: rounded as torch does it, bit for bit."""
    images, copies = noisy(5, 3, 32), []
    render = partial(kernel_cuda.render, Block(library, 7))
    views = Views(MIXED, size=32, channels=3, mean=MEAN, std=STD)
    draws = views.draw(oblong(len(images)), torch.Generator().manual_seed(3))
    arguments = (images, views.sizes, *module.arguments(images, draws), views.mean, views.std)
    monkeypatch.setattr(kernel_cuda, "sent", lambda x, device: copies.append(x) or x)
    made, plain = render(*arguments, dtype=dtype, memory_format=memory_format), render(*arguments)
    assert len(copies) == 2
    for x, y, draw, recipe in zip(made, plain, draws, views.recipes, strict=True):
        assert (x.dtype, x.shape) == (dtype, y.shape)
        assert x.is_contiguous(memory_format=memory_format)
        assert x.equal(y.to(dtype))
        wanted = module.in_tensors(images, draw, recipe, x.shape[-1], views.mean, views.std)
        assert close(y, wanted, draw.solarize)
    monkeypatch.setattr(module, "compiled", lambda device: render)
    last = memory_format == torch.channels_last
    assert all(map(torch.equal, made, views(images, draws, dtype=dtype, channels_last=last)))
    monkeypatch.setattr(module, "compiled", lambda device: None)
    for x, y in zip(views(images, draws, dtype=dtype, channels_last=last), made, strict=True):
        assert x.dtype == dtype and x.is_contiguous(memory_format=memory_format)
        assert (x.float() - y.float()).abs().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_of_number_is_rounded_as_torch_does_it(library, dtype):
    """Grey levels on their way to numbers that are subnormal, that are half way between two, and too large."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for std in [10.0**power for power in range(-40, 40)] + [1 / 3, 2.0**-17, 2.0**-18, 2.0**-26, 2.0**24]:
        views = Views({"only": {"scale": [1, 1], "ratio": [1, 1]}}, size=16, channels=1, mean=[0.5], std=[std])
        draws = views.draw(torch.full((1, 2), 16), torch.Generator())
        arguments = (images, [16], *module.arguments(images, draws), views.mean, views.std)
        render = partial(kernel_cuda.render, Block(library, 7))
        (plain,), (x,) = render(*arguments), render(*arguments, dtype=dtype)
        assert x.view(torch.int16).equal(plain.to(dtype).view(torch.int16)) or plain.isnan().any()
        assert x.isnan().equal(plain.isnan())


@pytest.mark.parametrize("first", ["brightness", "contrast", "saturation", "hue"])
def test_each_operation_by_itself(library, first):
    render = partial(kernel_cuda.render, Block(library, 7))
    recipe = {"jitter": 1.0, first: 0.5}
    ours, theirs, _ = both(render, recipe, 16, noisy(12, 3, 16), torch.full((12, 2), 16))
    assert (ours - theirs).abs().max() < 1e-5
    plain, *_ = both(render, {}, 16, noisy(12, 3, 16), torch.full((12, 2), 16))
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("sizes", [torch.tensor([[60, 60]]).expand(6, 2), oblong(6)], ids=["one box", "a box each"])
def test_eval_view(library, threads, sizes, monkeypatch):
    images, given = noisy(6, 3, 40), {"size": 32, "crop": 0.875, "mean": MEAN, "std": STD}
    monkeypatch.setattr(module, "compiled", lambda device: partial(kernel_cuda.render, Block(library, threads)))
    ours = eval_view(images, sizes, **given)
    monkeypatch.setattr(module, "compiled", lambda device: None)
    torch.testing.assert_close(ours, eval_view(images, sizes, **given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", range(len(BARRIERS)))
def test_every_barrier_is_needed(number, tmp_path):
    begin, end = BARRIERS[number]
    source = tmp_path / "without.cu"
    source.write_text(SOURCE[:begin] + SOURCE[end:])
    library = compile_for_cpu(source, tmp_path)
    right = []
    for order in (1, -1):
        render = partial(kernel_cuda.render, Block(library, 7, order))
        right.append(close(*both(render, STRONG, 32, noisy(12, 3, 32), oblong(12))))
    assert not all(right)


def test_there_is_room_for_all_taps(library):
    """Boxes as large as the canvas, and larger by what rounding makes of them; block.cpp sees what is written behind."""
    for side, size in [(64, 5), (64, 16), (33, 33), (3, 40)]:
        images = noisy(2, 3, side)
        (start, extent), (mean, std) = torch.zeros(2, 1, 2, 2), torch.zeros(2, 3)
        extent = extent + side * (1 + 1e-6)
        no, none = torch.zeros(1, 2, dtype=torch.bool), torch.full((1, 2, 4), -1)
        applied = (no, none, none.float(), no, torch.ones(1, 2), no, 1.0, mean, std + 1)
        (x,) = kernel_cuda.render(Block(library, 7), images, [size], start, extent, *applied) or [None]
        assert x is not None
        assert x.isfinite().all()


def test_a_canvas_too_large_for_shared_memory_is_left_to_tensors(monkeypatch):
    def never(**given):
        raise AssertionError

    render, images, sizes = partial(kernel_cuda.render, never), noisy(2, 1, 3100), oblong(2)
    ours, theirs, _ = both(render, GREY, 100, images, sizes)
    assert ours is None
    views = Views({"only": {**GREY, "size": 100}}, size=3100, channels=1, mean=MEAN[:1], std=STD[:1])
    monkeypatch.setattr(module, "compiled", lambda device: render)
    assert views(images, views.draw(sizes, torch.Generator().manual_seed(3)))[0].equal(theirs)
    assert eval_view(images, sizes, size=100, crop=1.0, mean=MEAN[:1], std=STD[:1]).isfinite().all()


def test_224_px_of_256_fit():
    assert kernel_cuda.shared_bytes(256, 224, 256.0) < kernel_cuda.SHARED / 2


@pytest.fixture
def built(monkeypatch):
    """Lets `build` return something else, and forgets what was checked before."""
    module._checked.cache_clear()
    yield lambda kernel: monkeypatch.setattr(kernel_cuda, "build", lambda device: kernel)
    module._checked.cache_clear()


def test_a_right_kernel_is_used(library, built):
    built(Block(library, 7))
    render = module._checked(torch.device("cpu"))
    assert not isinstance(render, str)
    assert module._checked(torch.device("cpu")) is render


def wrong_at_one_px(kernel: Block, value: float) -> Callable:
    def launch(args: list, **given) -> None:
        kernel(args=args, **given)
        if args[-1].shape[-1] == 40:
            args[-1][-1, -1, -1, -1] += value

    return launch


def wrong_only_when_rounded(kernel: Block) -> Callable:
    def launch(args: list, **given) -> None:
        kernel(args=args, **given)
        if args[-1].dtype == torch.bfloat16:
            args[-1].view(torch.int16).add_(1)

    return launch


def broken(**given) -> None:
    raise RuntimeError("CUDA error: invalid device function\nwith more lines")


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda kernel: wrong_at_one_px(kernel, 1e-3), " makes other views than tensors do"),
        (lambda kernel: wrong_at_one_px(kernel, float("nan")), " makes other views than tensors do"),
        (lambda kernel: lambda **given: None, " makes other views than tensors do"),
        (wrong_only_when_rounded, " makes other views than tensors do"),
        (lambda kernel: broken, ", RuntimeError: CUDA error: invalid device function"),
    ],
    ids=["a px", "nan", "nothing", "rounded", "error"],
)
def test_a_wrong_kernel_is_not_used_and_that_is_said(library, built, spoil, reason):
    built(spoil(Block(library, 7)))
    assert module._checked(torch.device("cpu")) == f"kernel.cu{reason}"


def test_torch_still_has_the_private_function_that_builds_the_kernel():
    parameters = [*inspect.signature(torch.cuda._compile_kernel).parameters]
    assert parameters[:2] == ["kernel_source", "kernel_name"]


def test_what_cannot_be_built_is_left_to_tensors_and_that_is_said(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("TWOVIEWS_KERNEL", "1")
    monkeypatch.setattr(torch.cuda, "_compile_kernel", lambda *given: broken(), raising=False)
    for reason in ("kernel.cu, RuntimeError: CUDA error: invalid device function", "kernel.cu, AttributeError: "):
        module._checked.cache_clear()
        assert module.compiled(device) is None
        assert module.reason_for_tensors(device).startswith(reason)
        monkeypatch.delattr(torch.cuda, "_compile_kernel", raising=False)
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    module._checked.cache_clear()
    assert module.compiled(device) is None and module.reason_for_tensors(device) == "TWOVIEWS_KERNEL=0"
    module._checked.cache_clear()


def nvrtc() -> ctypes.CDLL:
    for folder in site.getsitepackages():
        for path in sorted(Path(folder).glob("nvidia/**/libnvrtc.so.*"), reverse=True):
            return ctypes.CDLL(str(path))
    pytest.skip("NOT COMPILED FOR A GPU: there is no libnvrtc.so; torch's CUDA packages bring it.")


def test_torch_compiles_it_also_without_cudas_headers(monkeypatch):
    """With the options that torch gives to NVRTC; only what loads it into a GPU is left out."""
    from torch.cuda import _utils
    from torch.utils import cpp_extension

    made = []

    def compile_kernel(source: str, name: str) -> Callable:
        made.append(_utils._nvrtc_compile(source, name, compute_capability="80"))
        return broken

    nvrtc()
    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert kernel_cuda.build(torch.device("cuda", 0)) is broken
    assert len(made) == 1
    assert made[0][1] == "render"
    assert cpp_extension.CUDA_HOME is None


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90", "sm_80", "sm_90"])
def test_nvrtc_compiles_it(architecture):
    """To PTX, and to the machine code of the chip, as torch asks for it, within the registers of 512 threads."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    kind = "CUBIN" if architecture.startswith("sm") else "PTX"
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    assert library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"kernel.cu", 0, None, None) == 0
    code = library.nvrtcCompileProgram(program, len(options), options)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert (code, log.value.decode().strip()) == (0, "")
    getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    assert size.value > 1000
    made = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{kind}")(program, made)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert b"render" in made.raw


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("side, size", [(32, 32), (256, 224)])
def test_on_a_gpu(side, size):
    built = kernel_cuda.build(torch.device("cuda", 0))

    def render(images: Tensor, *given) -> list[Tensor]:
        return [x.cpu() for x in kernel_cuda.render(built, images.cuda(), *given)]

    assert close(*both(render, STRONG, size, noisy(64, 3, side), oblong(64)))
    assert module.reason_for_tensors(torch.device("cuda", 0)) is None
