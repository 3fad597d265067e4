"""A GPU where there is none: tensors that compute on the CPU and behave, where code can tell, as if they lay on a GPU.

They say device cuda:0; what mixes them with tensors of the CPU raises as it would there, and so does what reads their
memory. Every call for which a GPU would keep the thread waiting is written down with the line that makes it. Autograd runs
below, on the CPU. torch's own fake tensors do not serve: without a driver they have no backward pass.

What it cannot show: kernels, streams, speed, numerics, how much fits, and the operators that autocast chooses for CUDA.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_on_cpu import Block
from recorded_graph import patch_graphs
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map

import twoviews

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SOURCES = f"{Path(twoviews.__file__).parent}/"

# Their results have a size, or are a number of Python, that only the GPU knows.
ASKING = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose"),
    *(
        "nonzero",
        "argwhere",
        "unique",
        "unique_consecutive",
        "masked_select",
        "bincount",
        "repeat_interleave",
        "histc",
        "is_nonzero",
        "multinomial",
    ),
}
READING = {"numpy", "__array__", "data_ptr", "__reduce_ex__", "share_memory_", "untyped_storage", "storage"}
NOT_COMPUTING = {"_has_compatible_shallow_copy_type", "is_same_size"}
SAME_MEMORY = {
    "cat",
    "stack",
    "concatenate",
    "matmul",
    "mm",
    "bmm",
    "__matmul__",
    "linear",
    "conv2d",
}  # no numbers, either


class WrongDevice(RuntimeError):
    """What a GPU would have refused."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


waits: list[str] = []  # what kept the thread that called, "operator in file:line"
created: list[str] = []  # what made a tensor of the CPU out of none
waiting_is_an_error = False


def _sync_debug_mode(mode: str) -> None:
    global waiting_is_an_error
    waiting_is_an_error = mode == "error"


def _place() -> str:
    """The line of this project that is being run."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(SOURCES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(SOURCES)}:{frame.f_lineno}" if frame else "elsewhere"


def _wait(name: str) -> None:
    waits.append(f"{name} in {_place()}")
    if waiting_is_an_error:
        raise RuntimeError(f"called a synchronizing CUDA operation: {waits[-1]}")


def _there(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGPU)


def _there_if_tensor(value: Any) -> Any:
    return _there(value) if isinstance(value, Tensor) else value


def _tensors(*trees: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for tree in trees:  # torch's own walk through trees takes several times as long as all else here
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, tuple | list):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


def _is_there(value: Any) -> bool:
    return isinstance(value, OnGPU)


def _moved(tensor: Tensor, device: torch.device, non_blocking: bool, **given: Any) -> Tensor:
    """A copy there or here; the same if it is there already and nothing else is asked for."""
    from_there, to_there = _is_there(tensor), device.type == "cuda"
    plain = tensor.as_subclass(Tensor)
    moved = Tensor.to(plain, **{**given, "copy": given.get("copy", False) or from_there != to_there})
    if from_there != to_there and not non_blocking:
        _wait("copy")
    if from_there and not to_there and non_blocking:
        raise WrongDevice("a copy to the CPU that nobody waits for is read before it is made")
    return tensor if moved is plain else _there(moved) if to_there else moved


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy = kwargs.pop("copy", False)
    other = kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        args = (other.device, other.dtype, *args)
    device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
    given = {key: value for key, value in (("dtype", dtype), ("memory_format", form)) if value is not None}
    return _moved(tensor, device or tensor.device, non_blocking, copy=copy, **given)


def _check(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what needs all of its tensors on one device, and has them on two."""
    tensors = _tensors(args, kwargs)
    there = [one for one in tensors if _is_there(one)]
    here = [one for one in tensors if not _is_there(one)]
    if not there or not here:
        return
    if name in ("__getitem__", "__setitem__", "index_put_"):
        (into, where), values = args[:2], _tensors(args[2:])
        indices = _tensors(where)
        if not _is_there(into) and any(map(_is_there, indices)):
            raise WrongDevice("a tensor of the CPU is indexed by one on the GPU")
        if any(not _is_there(one) for one in indices):
            _wait("copy of an index")
        if name == "__setitem__" and not values and any(one.dtype != torch.bool for one in indices):
            _wait("copy of a number that is put at indices")
        if indices and any(_is_there(one) != _is_there(into) and one.ndim for one in values):
            raise WrongDevice("values of one device are put into a tensor of another")
        return
    if name == "copy_":
        if not (kwargs.get("non_blocking") or len(args) > 2 and args[2]) or not _is_there(args[0]):
            _wait("copy")
        return
    numbers = all(one.ndim == 0 for one in here) and name not in SAME_MEMORY
    written = name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor) and not _is_there(args[0])
    if not numbers or written:
        shapes = [f"{'GPU' if _is_there(one) else 'CPU'} {tuple(one.shape)}" for one in tensors]
        raise WrongDevice(f"{name} of tensors on two devices: {', '.join(shapes)}")


def call(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """What torch does, on pretended and on ordinary tensors."""
    name = getattr(func, "__name__", "")
    owner = args[0] if args and isinstance(args[0], Tensor) else None
    getter = name in ("__get__", "__set__")
    with torch._C.DisableTorchFunctionSubclass():
        if owner is not None and not getter:
            if name == "to":
                return _to(*args, **kwargs)
            if name in ("cpu", "cuda"):
                return _moved(owner, CPU if name == "cpu" else CUDA, bool(kwargs.get("non_blocking")))
            if name == "pin_memory":
                return owner  # what is pinned is still on the CPU
        if any(map(_is_there, _tensors(args, kwargs))):
            if name in READING:
                raise WrongDevice(f"{name} of a tensor on the GPU")
            if name == "__deepcopy__":
                memo = args[1]
                memo[id(owner)] = copied = _there(owner.detach().clone())  # type: ignore[union-attr]
                if hasattr(owner, "_is_param"):
                    copied._is_param = True  # as torch marks parameters of other classes
                copied.requires_grad_(owner.requires_grad)  # type: ignore[union-attr]
                return copied
            if name == "__format__" or name in ("__repr__", "__str__"):
                _wait(name)
            masks = name in ("__getitem__", "__setitem__") and any(one.dtype == torch.bool for one in _tensors(args[1]))
            if name in ASKING or masks and (name == "__getitem__" or _tensors(args[2])):
                _wait(resolve_name(func) or name)
            if not getter and name not in NOT_COMPUTING:
                _check(name, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}  # which needs a driver
        device = kwargs.get("device")
        made_there = device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"
        if made_there:
            kwargs = {**kwargs, "device": "cpu"}
            if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
                _wait(name)
        result = func(*args, **kwargs)
        if result is owner:  # it was written to where it lies
            return result
        if made_there or device is None and any(map(_is_there, _tensors(args, kwargs))):
            if isinstance(result, Tensor) and type(result) is Tensor and not (getter or result._is_view()):
                result.__class__ = OnGPU  # not a view: what a custom Function returns may be overwritten
                return result
            return _there(result) if isinstance(result, Tensor) else tree_map(_there_if_tensor, result)
        if isinstance(result, Tensor) and not _tensors(args, kwargs):
            created.append(f"{name} in {_place()}")
        return result


class _Calls(TorchFunctionMode):
    """What is called without any such tensor, but may make some."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Properties:
    total_memory, name, multi_processor_count = 140 * 10**9, "a GPU", 1


def _launching(kernel: Block) -> Callable[..., None]:
    """The kernel for pretended tensors."""

    def launch(grid: tuple, block: tuple, args: list, shared_mem: int) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            kernel(grid, block, [x.as_subclass(Tensor) if isinstance(x, Tensor) else x for x in args], shared_mem)

    return launch


@contextlib.contextmanager
def pretended(views_kernel: Block | None = None) -> Iterator[list[str]]:
    """Within it there is one GPU; gives the list of what waited for it.

    Args:
        views_kernel: kernel.cu, compiled for the CPU; without it tensors make the views.
    """
    from twoviews import inference
    from twoviews.data import kernel_cuda, rendering

    waits.clear()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "mem_get_info": (130 * 10**9, 140 * 10**9),
        "max_memory_reserved": 10**9,
        "get_device_name": "a GPU",
        "get_device_properties": _Properties(),
        "set_device": None,
        "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
    }
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, _Calls():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch_graphs(patch)
        patch.setattr(torch.cuda, "set_sync_debug_mode", _sync_debug_mode)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(kernel_cuda, "build", lambda device: _launching(views_kernel) if views_kernel else None)
        patch.setattr(inference, "_reasons", {})
        patch.setenv("TWOVIEWS_KERNEL", "1" if views_kernel else "0")
        rendering._checked.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
            rendering._checked.cache_clear()
