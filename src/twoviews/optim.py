"""Optimizers and the learning rate that a batch size implies.

Every optimizer takes `param_groups` as `Method.param_groups` gives them, `batch_size` over all processes, and `lr` as the
paper states it, with the rule (`lr_scaling`) that makes the learning rate of this batch size from it.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from twoviews.errors import BadInput
from twoviews.ranges import Count, Decay, Fraction, LrScaling, Range, Rate
from twoviews.torch_optimizers import SGD, AdamW, Optimizer


def scaled_lr(lr: float, scaling: LrScaling, batch_size: int) -> float:
    """The learning rate for `batch_size` images: lr, lr * batch_size / 256, or lr * sqrt(batch_size)."""
    return {"none": lr, "linear": lr * batch_size / 256, "sqrt": lr * batch_size**0.5}[scaling]


def _excluding(groups: list[dict], exclude: bool, **changes) -> list[dict]:
    """Each group in two, the second with `changes`: norm scales, offsets and biases, the parameters of one axis."""
    if not exclude:
        return groups
    split = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        split.append({**rest, "params": [p for p in group["params"] if p.ndim > 1]})
        split.append({**rest, **changes, "params": [p for p in group["params"] if p.ndim <= 1]})
    return [group for group in split if group["params"]]


def is_fused(groups: list[dict]) -> bool:
    """Whether one kernel shall update many parameters: on GPUs, where it takes learning rates from the device, too."""
    return groups[0]["params"][0].is_cuda


def sgd(
    param_groups: list[dict],
    batch_size: Count,
    lr: Rate,
    lr_scaling: LrScaling,
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
    weight_decay: Decay,
    exclude_norm_and_bias: bool,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent; weight decay on everything, or all but norms and biases.

    Raises:
        BadInput: Nesterov's form without momentum.
    """
    if nesterov and momentum == 0:
        raise BadInput("nesterov=true needs a momentum above 0; use for example momentum=0.9.")
    groups = _excluding(param_groups, exclude_norm_and_bias, weight_decay=0.0)
    return SGD(
        groups,
        lr=scaled_lr(lr, lr_scaling, batch_size),
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=is_fused(groups),
    )


def adamw(
    param_groups: list[dict],
    batch_size: Count,
    lr: Rate,
    lr_scaling: LrScaling,
    beta1: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
    beta2: Annotated[float, Range(at_least=0, below=1, usual="0.95 to 0.999")],
    weight_decay: Decay,
    exclude_norm_and_bias: bool,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on everything, or all but norms and biases."""
    groups = _excluding(param_groups, exclude_norm_and_bias, weight_decay=0.0)
    return AdamW(
        groups,
        lr=scaled_lr(lr, lr_scaling, batch_size),
        betas=(float(beta1), float(beta2)),
        weight_decay=weight_decay,
        fused=(fused := is_fused(groups)),
        capturable=fused,
    )


class LARS(Optimizer):
    """Layer-wise adaptive rates, You et al., arXiv:1708.03888, as google-research/simclr has them.

    For each layer with weights w and gradient g (weight decay added):
    v <- momentum * v + lr * trust_coefficient * |w| / |g| * g;  w <- w - v.
    Layers with `adapt` False or a zero norm take the plain step.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, trust_coefficient: float):
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, {"lr": lr, **defaults, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have gradients."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                ratios = _trust_ratios(
                    torch._foreach_norm(weights), torch._foreach_norm(gradients), group["trust_coefficient"]
                )
                gradients = torch._foreach_mul(gradients, ratios)
            steps = torch._foreach_mul(gradients, group["lr"])
            _momentum_step(self.state, weights, steps, group["momentum"], lr=1.0)


class LARC(Optimizer):
    """LARS in the form of apex's LARC around SGD: SwAV uses it without `clip`, solo-learn, under the name LARS, with it.

    For each layer with weights w and gradient g:
    g' <- trust_coefficient * |w| / (|g| + weight_decay * |w|) * (g + weight_decay * w), if both norms are non-zero, else g;
    v <- momentum * v + g';  w <- w - lr * v.
    With `clip` the factor before the bracket is divided by lr and at most 1: the layer's rate is then never above lr.
    All parameters are adapted, norms and biases too, unless a group has `adapt` False.
    """

    def __init__(
        self, params, lr: float, momentum: float, weight_decay: float, trust_coefficient: float, clip: bool = False
    ):
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, {"lr": lr, **defaults, "clip": clip, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have gradients."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            decay, gradients = group["weight_decay"], [p.grad for p in weights]
            if group["adapt"]:
                w, g = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
                usable = (w > 0) & (g > 0)
                ratios = group["trust_coefficient"] * w / (g + decay * w + 1e-8)
                if group["clip"]:
                    ratios = (ratios / group["lr"]).clamp(max=1.0)
                ratios = torch.where(usable, ratios, 1.0)
                decays = torch.where(usable, decay, 0.0)
                decayed = torch._foreach_mul(weights, list(decays.to(weights[0].dtype).unbind()))
                gradients = torch._foreach_mul(torch._foreach_add(gradients, decayed), list(ratios.unbind()))
            _momentum_step(self.state, weights, gradients, group["momentum"], lr=group["lr"])


def _trust_ratios(weights: Sequence[Tensor], gradients: Sequence[Tensor], coefficient: float) -> list[Tensor]:
    w, g = torch.stack(list(weights)), torch.stack(list(gradients))
    return list(torch.where((w > 0) & (g > 0), coefficient * w / g, 1.0).unbind())


def _momentum_step(
    state: dict, weights: Sequence[Tensor], steps: Sequence[Tensor], momentum: float, lr: float | Tensor
) -> None:
    """v <- momentum * v + step; w <- w - lr * v."""
    for weight in weights:
        if "momentum_buffer" not in state[weight]:
            state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    buffers = [state[weight]["momentum_buffer"] for weight in weights]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, list(steps))
    if isinstance(lr, Tensor):  # as a number it would have to leave the device
        torch._foreach_sub_(list(weights), torch._foreach_mul(buffers, lr))
    else:
        torch._foreach_add_(list(weights), buffers, alpha=-lr)


def lars(
    param_groups: list[dict],
    batch_size: Count,
    lr: Rate,
    lr_scaling: LrScaling,
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
    weight_decay: Decay,
    trust_coefficient: Fraction,
    exclude_norm_and_bias: bool,
) -> torch.optim.Optimizer:
    """LARS; norms and biases take plain steps without weight decay if excluded, as SimCLR and BYOL have it."""
    groups = _excluding(param_groups, exclude_norm_and_bias, weight_decay=0.0, adapt=False)
    return LARS(groups, scaled_lr(lr, lr_scaling, batch_size), momentum, weight_decay, trust_coefficient)


def larc(
    param_groups: list[dict],
    batch_size: Count,
    lr: Rate,
    lr_scaling: LrScaling,
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
    weight_decay: Decay,
    trust_coefficient: Fraction,
    exclude_norm_and_bias: bool,
    clip: bool,
) -> torch.optim.Optimizer:
    """LARC; SwAV excludes nothing and does not clip, solo-learn's CIFAR recipes do both."""
    groups = _excluding(param_groups, exclude_norm_and_bias, weight_decay=0.0, adapt=False)
    return LARC(groups, scaled_lr(lr, lr_scaling, batch_size), momentum, weight_decay, trust_coefficient, clip)


def parameter_count(module: nn.Module) -> int:
    """Number of weights that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
