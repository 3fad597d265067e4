"""Training on labelled images, as several protocols do it: random crops, the initial classifier, the loop.

Shapes: B images of a batch, M test images, C classes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.classifier_file import as_linear
from twoviews.console import progress_of
from twoviews.data.images import Images
from twoviews.data.loader import Loader
from twoviews.data.views import Views
from twoviews.errors import BadInput
from twoviews.protocols.protocol import EvaluationContext
from twoviews.randomness import generator
from twoviews.schedule import Schedule


def labelled(context: EvaluationContext) -> tuple[Images, Images]:
    """The memory images, which classifiers are trained on, and the test images.

    Raises:
        BadInput: there are none.
    """
    memory, test = context.data.memory, context.data.test
    if memory is None or test is None:
        raise BadInput(
            f"{context.data.name} has no labelled images to train a classifier on and to test it; choose other data."
        )
    return memory, test


def classifier(features: int, classes: int, device: torch.device, *key: int | str) -> nn.Linear:
    """Weights from N(0, 0.01^2) and biases of 0, as MoCo, SimSiam and SwAV begin; a function of `key`."""
    weight = torch.empty(classes, features).normal_(std=0.01, generator=generator("classifier", *key))
    return as_linear(weight, torch.zeros(classes)).to(device).requires_grad_(True)


def crops(
    context: EvaluationContext, images: Images, batch_size: int, smallest_crop: float, flip: float, seed: int
) -> tuple[Loader, list[str]]:
    """Batches of one random crop of each image, and notes for the user about the batch size.

    Images that do not fill a last batch are left out of an epoch, different ones each time.
    """
    data, notes = context.data, []
    if batch_size > len(images):
        notes.append(f"batch_size={batch_size} is larger than the {len(images)} images: batches have {len(images)}.")
    view = {"scale": [smallest_crop, 1], "flip": flip}
    views = Views({"crop": view}, size=data.size, channels=data.channels, mean=data.mean, std=data.std)
    return Loader(images, views, batch_size=min(batch_size, len(images)), seed=seed, device=context.device), notes


class Diverged(BadInput):
    """The loss of a training became infinite or not a number."""


def train_classifier(
    logits: Callable[[Float[Tensor, "B _ _h _w"]], Float[Tensor, "B C"]],
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epochs: int,
    context: EvaluationContext,
) -> None:
    """Train for some epochs with cross-entropy; the learning rate of each group is multiplied by the schedule's factor.

    Raises:
        Diverged: the loss became infinite or not a number.
    """
    assert loader.images.labels is not None
    labels = loader.images.labels.to(context.device).long()
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(context.device.type, enabled=context.dtype == torch.float16)
    with progress_of("training on labelled images", epochs * len(loader), "steps") as advance:
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for step, batch in enumerate(loader):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(epoch + step / len(loader))
                with torch.enable_grad():
                    scores = logits(batch.views[0].to(memory_format=context.memory_format))
                    loss = nnf.cross_entropy(scores.float(), labels[batch.index])
                    scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                advance(1)
            if not loss.isfinite():
                raise Diverged(
                    f"training on labelled images diverged in epoch {epoch + 1} (loss {loss.item()}) with a learning rate of "
                    f"{max(rates):g}; use a smaller lr for this protocol, for example {max(rates) / 10:g}."
                )
