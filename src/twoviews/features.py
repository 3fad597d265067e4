"""Features of whole sets of images under the eval transform. Shapes: N images, F features."""

import contextlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.console import progress_of
from twoviews.data.images import ImageData, Images, sent
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.inference import choose_backend, fold_batchnorm
from twoviews.runtime import autocast, format_name

# Images per forward pass. On a CPU 128 were measured 1.16 times as fast as 256 with conf/backbone/tiny.yaml: its cache is small.
BATCH = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Features:
    """Features in float32 and classes of N images, on the device."""

    x: Float[Tensor, "N F"]
    y: Int[Tensor, " N"]

    def subset(self, index: Int[Tensor, " n"]) -> "Features":
        """Those of these images, in this order."""
        index = index.to(self.y.device)
        return Features(self.x[index], self.y[index])


class PixelEncoder(Encoder):
    """The baseline without a network: normalised pixels, averaged down to 32 x 32 px if there are more."""

    def __init__(self, channels: int, image_size: int):
        super().__init__()
        self.side = min(image_size, 32)
        self.out_dim = channels * self.side**2

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Normalised pixels as features [B, out_dim]."""
        return nnf.adaptive_avg_pool2d(images, self.side).flatten(1)


@torch.no_grad()
def embed(
    module: nn.Module,
    images: Images,
    data: ImageData,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = False,
    shared: bool = False,
    batch_size: int | None = None,
    title: str = "",
) -> Float[Tensor, "N F"]:
    """Outputs of a module for all images, in their order, under the eval transform; float32, on the device.

    Args:
        module: images [B, C, S, S] -> [B, F]; a copy of it runs in eval mode.
        images: a split of `data`.
        data: for the size and the channel statistics.
        device: where to compute.
        dtype: number format of the forward pass.
        channels_last: memory format of the images.
        shared: each process computes a part, and all get the whole, so all must call.
        batch_size: images per forward pass; None: `BATCH`.
        title: shown with the progress; empty: no progress is shown.

    Raises:
        BadInput: an output is not finite.
    """
    rank, processes = (distributed.rank(), distributed.processes()) if shared else (0, 1)
    batch_size, backend = batch_size or BATCH[device.type], None
    if channels_last or device.type == "cpu":
        backend = choose_backend(module, device, dtype, data.size, batch_size)
    convert = channels_last and backend is None  # fused networks convert the images themselves
    network, x = _network(module, backend, dtype, convert), None
    # Processes get whole batches, so that each image is in the same batch, and rounded alike, for any number of processes.
    own = torch.arange(len(images)).split(batch_size)[rank::processes]
    shown = progress_of(title, sum(map(len, own)), "images") if title else contextlib.nullcontext(lambda _: None)
    with torch.autocast(device.type, enabled=False), shown as advance:
        rows_of_own = torch.cat([torch.empty(0, dtype=torch.int64), *own]) if processes > 1 else None
        for pixels, sizes, index in images.batches(batch_size, rows_of_own):
            batch = eval_view(sent(pixels, device), sizes, size=data.size, crop=1.0, mean=data.mean, std=data.std)
            if convert:
                batch = batch.to(memory_format=torch.channels_last)
            if device.type == "cuda" and len(batch) < batch_size < len(images):
                # cuDNN chooses algorithms for each size of a batch, by trial in a training.
                batch = nnf.pad(batch, (0,) * 7 + (batch_size - len(batch),))
            with autocast(device, dtype):
                rows = network(batch)[: len(index)]
            if x is None:
                x = torch.zeros(len(images), rows.shape[1], device=device)
            first = int(index[0])
            x[first : first + len(index)] = rows
            advance(len(index))
    if shared:  # fewer batches than processes leave some without any
        width = distributed.max_over_processes(0 if x is None else x.shape[1], device)
        x = distributed.sum_over_processes(torch.zeros(len(images), width, device=device) if x is None else x)
    assert x is not None
    _check_finite(x, dtype)
    return x


def _network(module: nn.Module, backend: str | None, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    """A copy of a module as `embed` runs it; see `fold_batchnorm`."""
    network = fold_batchnorm(module, backend, dtype)
    # Autocast caches weights that it has cast until the outermost autocast ends, but only if they require a gradient.
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return network.to(memory_format=torch.channels_last) if channels_last else network  # type: ignore[call-overload]


def _check_finite(x: Float[Tensor, "N F"], dtype: torch.dtype) -> None:
    broken = int((~x.isfinite().all(1)).sum())
    if broken:
        precision = "" if dtype == torch.float32 else f", or runtime.precision=fp32 in place of {format_name(dtype)}"
        raise BadInput(
            f"the features of {broken} of {len(x)} images are not finite: use weights of before the training diverged (a lower "
            f"optimizer.lr may keep it from that){precision}."
        )
