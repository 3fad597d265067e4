"""Features of whole image sets, computed once for all protocols that look at them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.data.images import ImageData, Images, sent
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.inference import folded, path_for
from twoviews.runtime import autocast, format_name

# Images a forward pass. On a CPU 128 were measured 1.16 times as fast as 256 with conf/backbone/tiny.yaml: its cache is small.
BATCH = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Features:
    """x [N, F] in float32 on the device, y [N] classes."""

    x: Float[Tensor, "N F"]
    y: Int[Tensor, " N"]


class Pixels(Encoder):
    """The normalised pixels themselves, averaged down to 32 x 32 where there are more: what an encoder has to beat."""

    def __init__(self, channels: int, image_size: int):
        super().__init__()
        self.side = min(image_size, 32)
        self.out_dim = channels * self.side**2

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """[B, out_dim]."""
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
) -> Float[Tensor, "N D"]:
    """What a module makes of all images, in their order, under the eval transform; float32, on the device.

    Args:
        module: images [B, C, S, S] -> [B, D]; in whatever mode, a copy of it runs in eval mode.
        images: a split of `data`.
        data: its size and channel statistics.
        device: where to compute.
        dtype: number format of the forward pass.
        channels_last: memory format of the images.
        shared: several processes do a share each, and all get the whole.

    Raises:
        BadInput: it makes something of an image that is not finite.
    """
    rank, processes = (distributed.rank(), distributed.processes()) if shared else (0, 1)
    size, path = BATCH[device.type], None
    if channels_last or device.type == "cpu":
        path = path_for(module, device, dtype, data.size, size)
    # What is fused on a GPU converts the images itself.
    convert = channels_last and (path is None or device.type == "cpu")
    network, x = folded(module, path, dtype), None
    # Autocast keeps the weights that it has cast until the outermost of its contexts ends, if they could learn.
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if convert:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Whole batches are dealt out, so that each image has the same company, and the same rounding, in one process.
    own = torch.arange(len(images)).split(size)[rank::processes]
    with torch.autocast(device.type, enabled=False):
        rows_of_own = torch.cat([torch.empty(0, dtype=torch.int64), *own]) if processes > 1 else None
        for pixels, sizes, index in images.batches(size, rows_of_own):
            batch = eval_view(sent(pixels, device), sizes, size=data.size, crop=1.0, mean=data.mean, std=data.std)
            if convert:
                batch = batch.to(memory_format=torch.channels_last)
            if device.type == "cuda" and len(batch) < size < len(images):
                # cuDNN chooses algorithms for each size of a batch, by trial in a training.
                batch = nnf.pad(batch, (0,) * 7 + (size - len(batch),))
            with autocast(device, dtype):
                rows = network(batch)[: len(index)]
            if x is None:
                x = torch.zeros(len(images), rows.shape[1], device=device)
            first = int(index[0])
            x[first : first + len(index)] = rows
    if shared:  # fewer batches than processes leave some without any
        width = distributed.largest(0 if x is None else x.shape[1], device)
        x = distributed.total(torch.zeros(len(images), width, device=device) if x is None else x)
    assert x is not None
    if broken := int((~x.isfinite().all(1)).sum()):
        precision = "" if dtype == torch.float32 else f", or runtime.precision=fp32 in place of {format_name(dtype)}"
        raise BadInput(
            f"the features of {broken} of {len(x)} images are not finite: use weights of before the training diverged (a lower "
            f"optimizer.lr may keep it from that){precision}."
        )
    return x
