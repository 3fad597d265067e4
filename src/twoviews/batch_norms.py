"""Batch norms over parts of a batch and over several processes, and functions that replace a network's batch norms."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.errors import BadInput

# The base class of torch's batch norms, which it exports under no public name; tests/test_batch_norms.py checks it.
BatchNorm = nn.modules.batchnorm._BatchNorm


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over `splits` interleaved parts of the batch: image i belongs to part i mod splits.

    The stand-in of MoCo's CIFAR demo for the separate batch norms of several GPUs, which keep a query from recognising
    its key by common statistics. Running statistics are the mean over the parts and keep the size of an ordinary batch
    norm, so that in eval mode and in exported weights this is one. With several processes each holds its share of the parts.
    """

    splits: int = 1  # over all processes
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """[B, C, H, W], B a multiple of the parts of this process.

        Raises:
            ValueError: it is none.
        """
        processes = distributed.processes()
        parts = self.splits // processes
        if not self.training or parts * processes == 1:
            return super().forward(x)
        statistics = self.running_mean, self.running_var
        y = _Split.apply(x, self.weight, self.bias, *statistics, parts, self.momentum, self.eps)
        if processes > 1:
            for statistic in statistics:
                statistic.copy_(distributed.mean_over_processes(statistic))
        return y


class _Split(torch.autograd.Function):
    """Batch norm of parts by that of torch, as one of parts * C channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        parts: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        # In the memory format of x, which the convolution behind this wants back.
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        beside = _beside(x, parts, last)
        repeated = torch.stack((running_mean, running_var, weight, bias)).repeat(1, parts)
        mean, var, scale, offset = repeated.unbind()
        y, batch_mean, batch_rstd = torch.native_batch_norm(beside, scale, offset, mean, var, True, momentum, eps)
        torch.mean(mean.view(parts, -1), 0, out=running_mean)
        torch.mean(var.view(parts, -1), 0, out=running_var)
        ctx.parts, ctx.eps, ctx.last = parts, eps, last
        ctx.save_for_backward(beside, scale, batch_mean, batch_rstd)
        return _apart(y, parts, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        x_grad, *others = torch.ops.aten.native_batch_norm_backward(
            _beside(grad, ctx.parts, ctx.last), x, scale, None, None, mean, rstd, True, ctx.eps, needed
        )
        sums = (
            other.view(ctx.parts, -1).sum(0) if one else None for other, one in zip(others, needed[1:], strict=True)
        )
        return _apart(x_grad, ctx.parts, ctx.last) if needed[0] else None, *sums, *[None] * 5


def _beside(x: Tensor, parts: int, last: bool) -> Float[Tensor, "J SC H W"]:
    """Image i = j * parts + s as row j of part s, whose channels stand beside those of the other parts."""
    b, c, h, w = x.shape
    rows, size = b // parts, h * w * c
    if b % parts:
        raise ValueError(f"a batch of {b} images cannot be divided into {parts} parts")
    if not last:
        return x.reshape(rows, parts * c, h, w)
    x = x.contiguous(memory_format=torch.channels_last)
    x = x.as_strided((rows, h * w, parts, c), (parts * size, c, size, 1)).contiguous()
    return x.as_strided((rows, parts * c, h, w), (parts * size, 1, w * parts * c, parts * c))


def _apart(y: Float[Tensor, "J SC H W"], parts: int, last: bool) -> Float[Tensor, "B C H W"]:
    """The inverse of `_beside`; no view, which a ReLU behind it could not overwrite."""
    rows, channels, h, w = y.shape
    shape = rows * parts, channels // parts, h, w
    if not last:
        return torch.ops.aten._unsafe_view(y.contiguous(), shape)
    size = h * w * shape[1]
    y = y.contiguous(memory_format=torch.channels_last)
    y = y.as_strided((rows, parts, h * w, shape[1]), (parts * size, shape[1], channels, 1))
    x = y.new_empty_strided(shape, (size, 1, w * shape[1], shape[1]))
    x.as_strided(y.shape, (parts * size, size, shape[1], 1)).copy_(y)
    return x


def check_splits(splits: int, batch_size: int, micro_batch: int, processes: int) -> None:
    """Check that SplitBatchNorm can cut a forward pass of `micro_batch` images of a batch into that many parts.

    Raises:
        BadInput: it cannot; with the sizes that could.
    """
    if splits > 1 and (splits % processes or micro_batch % splits or micro_batch // splits < 2):
        parts = batch_size // micro_batch
        fitting = max(2, round(micro_batch / splits)) * splits * parts
        batch = f"batch_size={fitting} or " if splits % processes == 0 else ""
        divided = f" / accumulate={parts}" if parts > 1 else ""
        raise BadInput(
            f"bn_splits={splits} needs a batch_size{' / accumulate' if divided else ''} that is a multiple of "
            f"it (at least {2 * splits}) and a number of processes that divides it; this is "
            f"batch_size={batch_size}{divided} and {processes} process(es): use "
            f"{batch}bn_splits=1."
        )


@torch.no_grad()
def encode_keys(key_encoder: nn.Module, x: Float[Tensor, "B C H W"], splits: int) -> Float[Tensor, "B D"]:
    """Unit-length embeddings of keys; with `splits` > 1 the whole batch is shuffled first (ShuffleBN).

    The whole batch, over all processes, is encoded in a random order and put back, so that a key and its query share no batch
    statistics.
    """
    if splits == 1:
        return nnf.normalize(key_encoder(x).float(), dim=1)
    everything = distributed.gather(x)
    order = distributed.broadcast(torch.randperm(len(everything), device=x.device))
    k = nnf.normalize(key_encoder(everything[distributed.local_rows(order)]).float(), dim=1)
    return distributed.local_rows(distributed.gather(k)[order.argsort()])


class SyncBatchNorm(BatchNorm):
    """Batch norm over the batches of all processes; for backends where torch.nn.SyncBatchNorm does not run (CPU)."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] or [B, C, H, W]."""
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = x.float()
        count = x.numel() // x.shape[1] * distributed.processes()
        mean = distributed.sum_with_gradient(y.sum(dims)) / count
        centred = y - mean.view(shape)
        var = distributed.sum_with_gradient(centred.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def _replace_norms(module: nn.Module, kinds: tuple[type, ...], make) -> None:
    for name, child in module.named_children():
        if type(child) in kinds:
            new = make(child)
            new.load_state_dict(child.state_dict())
            new.train(child.training)
            for old, parameter in zip(child.parameters(), new.parameters(), strict=True):
                parameter.requires_grad_(old.requires_grad)
            setattr(module, name, new)
        else:
            _replace_norms(child, kinds, make)


def split_batch_norms(module: nn.Module, splits: int) -> None:
    """Turn every BatchNorm2d below `module` into a SplitBatchNorm of that many parts, in place.

    Raises:
        BadInput: there are batch norms of another kind.
    """

    def make(norm: nn.BatchNorm2d) -> nn.Module:
        new = SplitBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.splits = splits
        return new

    _replace_norms(module, (nn.BatchNorm2d,), make)
    unknown = _other_norms(module)
    if unknown:
        raise BadInput(
            f"bn_splits={splits} splits nn.BatchNorm2d, and this backbone has {unknown}; use bn_splits=1 or "
            "another backbone."
        )


def _other_norms(module: nn.Module) -> str:
    """Class names of the batch norms below `module` that are neither torch's plain ones nor of this project."""
    supported = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, SplitBatchNorm, SyncBatchNorm)
    norms = (part for part in module.modules() if isinstance(part, BatchNorm))
    return ", ".join(sorted({type(part).__name__ for part in norms if type(part) not in supported}))


def sync_batch_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every plain batch norm below `module` see the batches of all processes; SplitBatchNorm stays as it is."""
    kind = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm

    def make(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
        return kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)

    _replace_norms(module, (nn.BatchNorm1d, nn.BatchNorm2d), make)
    unknown = _other_norms(module)
    if unknown:
        raise BadInput(
            f"several processes would not share the statistics of this backbone's {unknown}; train it in one process."
        )
    return module


class _WholeBatchNorm(BatchNorm):
    """Batch norm of [B, C] or [B, C, H, W]."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def whole_batch_norms(module: nn.Module) -> None:
    """Turn batch norms that divide a batch, or share it with other processes, into ones of whole batches here, in place."""

    def make(norm: BatchNorm) -> nn.Module:
        kept = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        return _WholeBatchNorm(*kept, device=next(iter(norm.state_dict().values())).device)

    _replace_norms(module, (SplitBatchNorm, SyncBatchNorm, nn.SyncBatchNorm), make)
