"""One optimizer step: forward and backward pass, optimizer and moving averages; on a GPU, captured once and replayed.

An eager step launches hundreds of kernels from Python, which takes longer than a GPU needs to run them. A CUDA graph
launches the same kernels on the same memory in one call. So a captured step reads everything that changes between steps
from tensors on the device: images, learning rates, progress; random numbers come from the device's generator, whose seed a
graph reads at each replay. It is compared with the eager step before it is used.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from twoviews import distributed
from twoviews.cuda_graph import Captured, CaptureDiffers, capture
from twoviews.data.loader import Batch
from twoviews.errors import BadInput
from twoviews.methods.method import Method, Output, Progress
from twoviews.runtime import Runtime, autocast

EAGER_STEPS = 3  # before a capture: kernels are compiled and chosen, and the optimizer's state is made

Values = dict[str, Tensor]  # "loss" and the method's metrics: float32 scalars on the device


def eager_reason(runtime: Runtime, device: torch.device) -> str | None:
    """Why the steps of a training are not captured as a CUDA graph; None if they are."""
    if device.type != "cuda":
        return "on a CPU"
    if not runtime.cuda_graph:
        return "cuda_graph=false"
    if distributed.processes() > 1:
        return f"{distributed.processes()} processes"
    if runtime.dtype(device) == torch.float16:
        return "loss scaling of fp16 decides on the host whether to update"
    return None


class TrainStep:
    """Trains a method on one batch at a time.

    Args:
        method: what is trained; several processes share their gradients.
        optimizer: of the method's parameters; its lr is the base rate, which `lr_factor` multiplies.
        runtime: precision, memory format, micro-batches, and whether steps are captured.
        device: of method and batches.
        say: takes a sentence for the user, where a captured step cannot be used.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.method, self.optimizer, self.runtime, self.device = method, optimizer, runtime, device
        self.dtype = runtime.dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.lrs = list(self.base_lrs)  # of the last step, of each parameter group
        self.before_update: Callable[[], None] = lambda: None  # called before an eager step changes weights
        self._say = say
        self._wrapped: Any = method
        if distributed.processes() > 1:
            self._wrapped = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._progress = Progress(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)))
        self._captures = eager_reason(runtime, device) is None
        self._key: Hashable = None  # what decides on the operations of a step
        self._eager_steps = 0  # with that key
        self._graph: Captured | None = None
        if self._captures:
            self._lr_tensors = [torch.tensor(lr, dtype=torch.float32, device=device) for lr in self.base_lrs]

    def __call__(self, batch: Batch, *, seed: int, lr_factor: float, step: int, steps: int, epochs: int) -> Values:
        """Update the method once.

        Args:
            batch: views and indices.
            seed: of all random numbers of this step in this process.
            lr_factor: multiplier of the learning rates, but of groups with "fixed_lr".
            step: optimizer steps done before.
            steps: of an epoch.
            epochs: of the training.
        """
        progress = (step + 1) / steps, (step + 1) / (steps * epochs)
        torch.manual_seed(seed)
        self._set_lrs_and_progress(lr_factor, *progress)
        phase = self.method.phase(step / steps)
        views = [self._on_device(view) for view in batch.views]
        index = batch.index.to(self.device)
        if not self._captures:
            return self._run(views, index, phase)
        key = (phase, *(view.shape for view in views))
        if key != self._key:
            self._key, self._eager_steps, self._graph = key, 0, None  # a graph holds the memory of a whole step
            torch.cuda.empty_cache()
        if self._graph is None and self._eager_steps == EAGER_STEPS:
            self._graph = self._capture(views, index, phase, seed)
            torch.manual_seed(seed)
            self._set_lrs_and_progress(lr_factor, *progress)
        if self._graph is None:
            self._eager_steps += 1
            return self._run(views, index, phase)
        return self._graph(views, index)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over an optimizer's state from a checkpoint, in the form (fused or not) that suits this device."""
        own = [
            {key: group[key] for key in ("lr", "fused", "foreach", "capturable") if key in group}
            for group in self.optimizer.param_groups
        ]
        groups = [{**saved, **kept} for saved, kept in zip(state["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state for a checkpoint, with learning rates as numbers."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": lr} for group, lr in zip(state["param_groups"], self.lrs, strict=True)]
        return {**state, "param_groups": groups}

    def _set_lrs_and_progress(self, lr_factor: float, epoch: float, fraction: float) -> None:
        """What changes between steps besides the batch: numbers for eager steps, tensors for captured ones."""
        groups = self.optimizer.param_groups
        fixed = [group.get("fixed_lr") for group in groups]
        self.lrs = [lr if keep else lr * lr_factor for lr, keep in zip(self.base_lrs, fixed, strict=True)]
        for number, (group, lr) in enumerate(zip(groups, self.lrs, strict=True)):
            group["lr"] = self._lr_tensors[number].fill_(lr) if self._captures else lr
        self._progress.epoch.fill_(epoch)
        self._progress.fraction.fill_(fraction)

    def _on_device(self, view: Tensor) -> Tensor:
        form = torch.channels_last if self.runtime.channels_last else torch.contiguous_format
        return view.to(self.device, memory_format=form, non_blocking=True)

    def _run(self, views: Sequence[Tensor], index: Tensor, phase: Hashable) -> Values:
        """The step itself, in `accumulate` micro-batches, whose loss and metrics are averaged.

        They are of one size and follow one another in the batch, so that they hold the same images for any number of
        processes. `after_step` gets the rows of the whole batch once.
        """
        parts, values, rows = self.runtime.accumulate, [], []
        for part in range(parts):
            with ExitStack() as stack:
                if distributed.processes() > 1 and part < parts - 1:
                    stack.enter_context(self._wrapped.no_sync())
                with autocast(self.device, self.dtype):
                    output = self._wrapped([view.chunk(parts)[part] for view in views], index.chunk(parts)[part])
                _check_output(output, self.method)
                self.scaler.scale(output.loss / parts).backward()
            values.append({"loss": output.loss.detach().float(), **{k: v.float() for k, v in output.metrics.items()}})
            rows.append(output.rows)
        self.before_update()
        self.method.before_optimizer_step(phase)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        everyone = {name: distributed.gather(torch.cat([part[name] for part in rows])) for name in rows[0]}
        self.method.after_step(self._progress, everyone)
        if parts == 1:
            return values[0]
        return {name: torch.stack([of_part[name] for of_part in values]).mean() for name in values[0]}

    def _capture(self, views: Sequence[Tensor], index: Tensor, phase: Hashable, seed: int) -> Captured | None:
        """This step as a CUDA graph; None, after a message, if it cannot be captured, and then no other step is tried."""
        optimizer = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        state = [*self.method.parameters(), *self.method.buffers(), *optimizer]

        def prepare(trial: int) -> None:
            torch.manual_seed(seed + trial)
            self._set_lrs_and_progress(lr_factor=0.5 + trial, epoch=0.25 + trial, fraction=0.25 + trial / 2)

        try:
            return capture(self._run, (views, index, phase), state, prepare)
        except (RuntimeError, CaptureDiffers) as error:
            self._captures = False
            self._say(f"step      eager (no CUDA graph: {str(error).splitlines()[0]})")
            return None
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def _check_output(output: Any, method: Method) -> None:
    """Check that a forward pass gave what the contract of methods asks for.

    Raises:
        BadInput: it did not, which whoever writes a method can put right.
    """
    name = f"{type(method).__module__}.{type(method).__name__}"
    if not isinstance(output, Output):
        raise BadInput(
            f"{name}.forward returned {type(output).__name__}, and a method returns Output(loss, metrics) of "
            "twoviews.methods.method."
        )
    if not isinstance(output.loss, Tensor) or output.loss.ndim or not output.loss.requires_grad:
        what = f"of shape {[*output.loss.shape]}" if isinstance(output.loss, Tensor) else type(output.loss).__name__
        raise BadInput(f"{name}.forward returned a loss ({what}) that is no scalar tensor with a gradient.")
