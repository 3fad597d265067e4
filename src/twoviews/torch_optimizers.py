"""torch's optimizers without its shields against torch.compile, which sees no optimizer here.

The shields import torch._dynamo at the first call of each method, which takes as long as the import of all other torch. There
is no public way around them; tests/test_optim.py fails when a release makes them otherwise.
"""

import inspect
from collections.abc import Callable

import torch


class Optimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer, unshielded."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Optimizer, torch.optim.SGD):
    """torch.optim.SGD, unshielded."""

    _step = inspect.unwrap(torch.optim.SGD.step)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have gradients."""
        for group in self.param_groups:
            for weight in group["params"] if group["fused"] and group["momentum"] else ():
                # The fused kernel takes all buffers or none; from zero, the first step makes of one what torch makes of none.
                if weight.grad is not None and "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self._step(closure)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW, unshielded."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class LBFGS(Optimizer, torch.optim.LBFGS):
    """torch.optim.LBFGS, unshielded."""
