"""Parts that two or more methods share: heads, queues and moving averages."""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import ResNet, all_norms_in_blocks
from twoviews.errors import BadInput
from twoviews.fused_norm import reason_for_plain, separate_views


def mlp(
    dims: list[int], *, norm: bool = True, last_norm: bool = False, last_affine: bool = True, last_bias: bool = True
) -> nn.Sequential:
    """Linear layers of the widths `dims` with ReLU between them.

    Args:
        dims: input, hidden and output widths.
        norm: batch norm after each hidden layer (which then has no bias).
        last_norm: batch norm after the last layer as well, without ReLU.
        last_affine: whether that last norm has a scale and an offset.
        last_bias: whether the last layer has a bias, where no norm follows it.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(dims[:-2], dims[1:-1], strict=True):
        layers.append(nn.Linear(inputs, outputs, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias and not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=last_affine))
    return nn.Sequential(*layers)


def encode_crops(encoder: nn.Module, views: Sequence[Float[Tensor, "B C _h _w"]]) -> Float[Tensor, "VB F"]:
    """Features of all views, view after view; neighbours of one size go through the encoder as one batch."""
    groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-2:])]
    return torch.cat([encoder(torch.cat(group)) for group in groups])


def encode_views(encoder: nn.Module, views: Sequence[Float[Tensor, "B C _h _w"]]) -> list[Float[Tensor, "B F"]]:
    """Features of each view, whose batch norms have statistics of its own, as if it had gone through the encoder alone.

    Where fused norms can keep them apart, views of one size are one batch, which takes less time.
    """
    first = views[0]
    if not (
        type(encoder) is ResNet
        and encoder.training
        and all_norms_in_blocks(encoder)
        and first.is_contiguous(memory_format=torch.channels_last)
        and all(view.shape == first.shape for view in views)
        and distributed.processes() == 1  # norms of several are not fused
        and reason_for_plain(first.device) is None
    ):
        return [encoder(view) for view in views]
    with separate_views(len(views)):
        return list(encoder(torch.cat(list(views))).chunk(len(views)))


def spread(z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """sqrt(D) times the mean over dimensions of the standard deviation of z / |z| over the batch.

    About 1 when embeddings fill the sphere evenly and 0 when all are equal (collapse): the statistic of fig. 2 of
    SimSiam, arXiv:2011.10566, scaled so that its healthy value does not depend on D.
    """
    unit = nnf.normalize(z.detach().float(), dim=1)
    deviations = (unit - unit.mean(0)).square().mean(0).sqrt()  # std(0) takes ten times as long on a CPU
    return deviations.mean() * unit.shape[1] ** 0.5


def centred(z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Rows minus the mean row of the batch of all processes, with gradient through that mean."""
    return z - distributed.sum_with_gradient(z.sum(0)) / (len(z) * distributed.processes())


@torch.no_grad()
def ema_update(target: nn.Module, online: Iterable[nn.Module], momentum: float | Float64[Tensor, ""]) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameters only: running statistics stay each network's own."""
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = [parameter for module in online for parameter in module.parameters()]
    if not isinstance(momentum, Tensor):
        torch._foreach_lerp_(targets, sources, 1 - momentum)
    else:  # a momentum that changes between steps stays on the device
        steps = torch._foreach_sub(sources, targets)
        torch._foreach_mul_(steps, (1 - momentum).to(targets[0].dtype))
        torch._foreach_add_(targets, steps)


def rising_momentum(momentum: float, fraction: Float64[Tensor, ""]) -> Float64[Tensor, ""]:
    """From `momentum` to 1 with a cosine: 1 - (1 - momentum) (cos(pi fraction) + 1) / 2.

    Args:
        momentum: at the start.
        fraction: share of the training done, 0 to 1.
    """
    return 1 - (1 - momentum) * (torch.cos(math.pi * fraction) + 1) / 2


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that starts with the same weights and gets no gradients."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def targets(frozen: nn.Module, views: Sequence[Float[Tensor, "B C _h _w"]]) -> list[Float[Tensor, "B D"]]:
    """The output of a frozen network for each view, without gradient, in float32.

    Under autocast its weights are cast once for all views: autocast itself caches casts only of weights with gradients.
    """
    weights: dict[str, Tensor] = {}
    if torch.is_autocast_enabled(views[0].device.type):
        dtype = torch.get_autocast_dtype(views[0].device.type)
        kinds = (
            nn.Linear,
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
        )  # other parameters, such as tokens, autocast leaves as they are
        modules = ((name, module) for name, module in frozen.named_modules() if isinstance(module, kinds))
        weights = {f"{name}.weight".lstrip("."): module.weight.to(dtype) for name, module in modules}
    return [torch.func.functional_call(frozen, weights, (view,)).float() for view in views]


class Queue(nn.Module):
    """The last `size` embeddings as unit rows, oldest overwritten first; part of the checkpoint."""

    rows: Float[Tensor, "K D"]
    position: Tensor  # [], where the next embedding goes

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.size = size
        self.register_buffer("rows", nnf.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def check(self, batch_size: int, per_image: int, train_images: int) -> None:
        """Check that it can be a queue of negatives for steps that push `per_image` rows for each image.

        Raises:
            BadInput: it would hold an image's own older keys, or not even the rows of one step.
        """
        keys = batch_size * per_image
        if self.size > train_images:
            raise BadInput(
                f"queue_size={self.size} is larger than the {train_images} training images, so an image would be "
                f"contrasted with its own older keys; use at most {train_images}, for example "
                f"queue_size={max(keys, train_images // 2 // keys * keys)}."
            )
        if self.size < keys:
            raise BadInput(
                f"queue_size={self.size} is smaller than the {keys} keys of one step; use "
                f"queue_size={4 * keys} or batch_size={max(1, self.size // per_image)}."
            )

    @torch.no_grad()
    def push(self, z: Float[Tensor, "B D"]) -> None:
        """Overwrite the oldest B rows, B <= size; wraps around at the end, whatever B is."""
        place = (self.position + torch.arange(len(z), device=z.device)) % self.size
        self.rows[place] = z.to(self.rows.dtype)
        self.position.copy_((self.position + len(z)) % self.size)


def without_duplicates(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The trainable parameters of some modules, each once, in order."""
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return list(seen.values())
