"""Muon: the momentum of each weight matrix is made orthogonal before it is applied; everything else takes AdamW's steps.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon, with weight decay
and the scale of Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982. torch.optim.Muon takes matrices only;
filters [O, I, h, w] are matrices [O, I h w] here, as in the authors' CIFAR-10 speed runs.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from twoviews.optim import is_fused, scaled_lr
from twoviews.ranges import Count, Decay, LrScaling, Range, Rate, Repeats
from twoviews.torch_optimizers import AdamW

# Of the quintic iteration x <- a x + b x^3 + c x^5, which brings singular values in (0, 1] near 1 within five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Each matrix [N, R, C] with its singular values brought near 1, from 0.7 to 1.2 after five steps.

    Args:
        matrices: as many as there are of one shape.
        steps: of the iteration.
        dtype: of its products; bf16 is enough, as the iteration corrects itself.
    """
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(AdamW):
    """Matrices and filters of groups with `orthogonal` take Muon's steps, the other groups those of AdamW.

    For each matrix W of R x C and gradient g:
    v <- momentum * v + (1 - momentum) * g;  u = momentum * v + (1 - momentum) * g (Nesterov);
    W <- (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(R, C)) * orthogonalised(u).
    The factor makes the root mean square of a step that of AdamW, so that both have one learning rate.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have gradients."""
        taken: list[tuple[Tensor, Tensor | None]] = []
        for group in self.param_groups:
            if group["orthogonal"]:
                weights = [p for p in group["params"] if p.grad is not None]
                self._orthogonal_step(group, weights)
                taken += [(p, p.grad) for p in weights]
        for weight, _ in taken:
            weight.grad = None  # AdamW leaves out what has none
        super().step()
        for weight, gradient in taken:
            weight.grad = gradient

    def _orthogonal_step(self, group: dict, weights: Sequence[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                # AdamW expects the step of each parameter that has a state when it loads one.
                empty = {"momentum_buffer": torch.zeros_like(weight), "step": torch.zeros((), device=weight.device)}
                self.state[weight].update(empty)
            by_shape.setdefault(weight.shape, []).append(weight)
        momentum = group["momentum"]
        dtype = torch.bfloat16 if weights and weights[0].is_cuda else torch.float32
        for same in by_shape.values():
            gradient = [w.grad for w in same if w.grad is not None]
            buffers = [self.state[w]["momentum_buffer"] for w in same]
            torch._foreach_lerp_(buffers, gradient, 1 - momentum)
            updates = torch.stack(torch._foreach_lerp(gradient, buffers, momentum)).flatten(2)  # [N, R, C]
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            steps = orthogonalised(updates, group["iterations"], dtype) * (scale * group["lr"])
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(same, list(steps.view(len(same), *same[0].shape).unbind()))


def muon(
    param_groups: list[dict],
    batch_size: Count,
    lr: Rate,
    lr_scaling: LrScaling,
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.95")],
    iterations: Repeats,
    beta1: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
    beta2: Annotated[float, Range(at_least=0, below=1, usual="0.95 to 0.999")],
    weight_decay: Decay,
) -> torch.optim.Optimizer:
    """Muon for weights of two and more axes, AdamW without weight decay for norms and biases."""
    groups = []
    for group in param_groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        weights = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        orthogonal = {"orthogonal": True, "momentum": momentum, "iterations": iterations}
        groups += [{**rest, "params": weights, **orthogonal}] if weights else []
        groups += [{**rest, "params": others, "orthogonal": False, "weight_decay": 0.0}] if others else []
    fused = is_fused(groups)
    return Muon(
        groups,
        lr=scaled_lr(lr, lr_scaling, batch_size),
        betas=(float(beta1), float(beta2)),
        weight_decay=weight_decay,
        fused=fused,
        capturable=fused,
    )
