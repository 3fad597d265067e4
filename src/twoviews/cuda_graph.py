"""Functions of tensors as CUDA graphs, compared with what they do without one.

Such a function takes the views of a batch, the indices of its images and a key, and returns scalars by name.
"""

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor], Tensor, Hashable], dict[str, Tensor]]
Inputs = tuple[Sequence[Tensor], Tensor, Hashable]
# How far a replay may be apart from the function, as a share of what that changes: each tensor, and all together.
TENSOR_TOLERANCE, TOTAL_TOLERANCE = 0.25, 0.02
EAGER_TOLERANCE = 0.1  # how far two runs of the function may be apart, all tensors together
ROUNDING = 1e-6  # of the numbers themselves


class CaptureDiffers(Exception):
    """A replay does not do what the function does; the message says what is different."""


class Captured:
    """A function captured once, with memory of its own for its inputs.

    Args:
        function: uses nothing but its inputs and tensors that stay where they are; it is run once, to record its kernels.
        inputs: of which the key is kept.
    """

    def __init__(self, function: Function, inputs: Inputs):
        views, index, key = inputs
        self.views, self.index = [view.clone() for view in views], index.clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Other threads, such as that which writes checkpoints, may use the device meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.values = function(self.views, self.index, key)
        except BaseException:
            # torch.cuda.graph does not clean up where it fails: the stream and the generator would stay with the capture.
            torch.cuda.set_stream(stream)
            _recover()
            raise

    def __call__(self, views: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        """What the function returns; the next call overwrites it."""
        for own, view in zip((*self.views, self.index), (*views, index), strict=True):
            own.copy_(view, non_blocking=True)
        self.graph.replay()
        return self.values


def capture(function: Function, inputs: Inputs, state: Sequence[Tensor], prepare: Callable[[int], None]) -> Captured:
    """The captured function, once a replay was seen to do what the function does; the state is left as it was.

    The function runs three times: as it is; with every wait for the device being an error, which also shows how far two
    runs are apart on this device; and as a replay.

    Args:
        function: to be captured.
        inputs: for the trials.
        state: all tensors that the function changes.
        prepare: sets the seed and the tensors from which the function reads its numbers, to other values for each argument;
            called with 1 before each trial and with 0 before the capture, so that a number which the graph has kept shows.

    Raises:
        CaptureDiffers: a replay does something else.
        RuntimeError: the function waits for the device, or does what a graph cannot record.
    """
    before = _copies(state)

    def restore() -> None:
        for tensor, old in zip(state, before, strict=True):
            tensor.detach().copy_(old)

    try:
        prepare(1)
        values = {name: value.clone() for name, value in function(*inputs).items()}
        after = _copies(state)
        changed, size = _distances(after, before), _distances(after, [torch.zeros_like(x) for x in after])
        restore()
        prepare(1)
        with _waiting_is_an_error():
            again = function(*inputs)
        noise = _distances(state, after)
        noise_of_values = {name: (again[name] - value).abs() for name, value in values.items()}
        if not noise.norm() <= EAGER_TOLERANCE * changed.norm() + ROUNDING * size.norm():
            raise CaptureDiffers("two eager steps from the same state differ")
        restore()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph cannot use the memory that is kept for other work
        prepare(0)
        captured = Captured(function, inputs)
        restore()
        prepare(1)
        replayed = captured(*inputs[:2])
        apart = _distances(state, after)
        if (apart > TENSOR_TOLERANCE * changed + ROUNDING * size + 3 * noise).logical_or(apart.isnan()).any():
            raise CaptureDiffers("a replay changes a tensor otherwise than the step")
        if not apart.norm() <= TOTAL_TOLERANCE * changed.norm() + ROUNDING * size.norm() + 3 * noise.norm():
            raise CaptureDiffers("a replay changes weights otherwise than the step")
        for name, value in values.items():
            if (
                not (replayed[name] - value).abs()
                <= TOTAL_TOLERANCE * value.abs() + ROUNDING + 3 * noise_of_values[name]
            ):
                raise CaptureDiffers(f"{name} of a replay is {replayed[name]:.5g}, and of the step {value:.5g}")
        return captured
    finally:
        restore()


def _recover() -> None:
    """Let go of errors that were not reported yet, and of a generator that takes itself for captured."""
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
    device = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", device))
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _distances(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(one.detach().float() - other.float()).norm() for one, other in zip(some, others, strict=True)])


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Calls that wait for the device raise RuntimeError: within a capture such an error could not be recovered from."""

    def switch(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode(mode)

    switch("error")
    try:
        yield
    finally:
        switch("default")
