"""The contract between a method and the loop.

A method is a module whose forward pass is its loss. It never sees labels, the configuration, the optimizer or the loop;
the loop never looks into it. No method derives from another: a variant of a paper is a file of its own.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.clusters.kmeans import Clustered
from twoviews.errors import refuse_former_names
from twoviews.layers import without_duplicates

# Computes the outputs of a module for all N training images, [N, F] in the order of their index, in float32: in eval mode,
# without gradient, under the eval transform, and the same on every process.
Embed = Callable[[nn.Module], Tensor]


Rows = dict[str, Tensor]  # by name, detached, a row for each image


@dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Args:
        loss: mean over these images.
        metrics: detached scalars on the device, logged as train/<name> every `runtime.log_every` steps and at the last step of
            an epoch: of that step alone, means over micro-batches and processes. Every forward pass has the same names. A
            `spread` near 0 is reported as collapse.
        rows: a row per image for `after_step`, which gets those of all micro-batches and processes, such as keys for a queue.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)


@dataclass(frozen=True)
class Collapse:
    """Range of a metric that indicates collapse: embeddings have lost what tells images apart.

    Args:
        metric: its name in `Output.metrics`.
        advice: what such a value means, and what to change.
        below: values below it mean collapse.
        above: values above it mean collapse.
    """

    metric: str
    advice: str
    below: float = -math.inf
    above: float = math.inf


@dataclass(frozen=True)
class Progress:
    """How far training has come: float64 scalars on the device, which a captured step reads anew at each replay."""

    epoch: Float64[Tensor, ""]  # epochs done, fractional
    fraction: Float64[Tensor, ""]  # share of the training done, 0 to 1


class Method(nn.Module):
    """Abstract: views of B images in, the loss out.

    A step may consist of several forward passes, each of a micro-batch, so what it leaves to the next step is changed in
    `after_step`, from the rows of the whole batch. A forward pass changes nothing but batch-norm statistics; an E-step may
    change buffers, but no parameters: a checkpoint is still being copied while it runs.
    On a GPU the forward pass, `before_optimizer_step` and `after_step` are captured as a CUDA graph: what changes between
    steps must be in tensors, random numbers must be drawn on the device, and nothing may wait for it (no .item(), no `if` on
    a tensor).
    Python values that a step depends on belong into `phase`.
    """

    encoder: Encoder
    views: int | None = 2  # how many views an image needs; None takes any number
    # What the loss of an image takes from the other images of its forward pass, such as "negatives", for a sentence to the
    # user of micro-batches; None: nothing, the loss is a mean over images.
    batch_dependence: str | None = None
    collapses: Sequence[Collapse] = ()  # beside that of the `spread`; the user is warned of each once, after an epoch
    queue_within_data: bool = False  # whether queue_size, where there is one, is at most the number of training images

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_former_names(cls, {"before_step": "before_optimizer_step", "within_batch": "batch_dependence"})

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The loss of a batch, or of a micro-batch; `index` says which training images it holds."""
        raise NotImplementedError

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Refuse what cannot work with this much data, make state whose size depends on it; sentences for the user.

        Called once, before the optimizer is made and before a checkpoint is loaded.

        Args:
            batch_size: images of a step, over all processes.
            micro_batch: images of a forward pass, over all processes; a divisor of `batch_size`.
            train_images: N.
            processes: how many share a forward pass.

        Raises:
            BadInput: with the value, the limit and the remedy.
        """
        return []

    def param_groups(self) -> list[dict]:
        """Every trainable parameter in exactly one group; "fixed_lr": True keeps a group off the schedule."""
        return [{"params": without_duplicates([self])}]

    def before_epoch(self, epoch: int, embed: Embed, seed: int) -> Clustered | None:
        """Called before the first step of each epoch, counted from 0, with that epoch's seed: an E-step."""

    def phase(self, epoch: float) -> Hashable:
        """A value that changes when the operations of a step change, as when prototypes stop being frozen; then a new CUDA
        graph is captured.

        Args:
            epoch: epochs that are done, fractional.
        """
        return None

    def before_optimizer_step(self, phase: Hashable) -> None:
        """Called after the backward pass and before the optimizer's step; removes the gradients of what is frozen in this
        phase, such as SwAV's prototypes."""

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """Called after each optimizer step, which `progress` includes: moving averages, queues.

        Args:
            progress: how far training has come.
            rows: those of the whole batch, over all micro-batches and processes, in its order.
        """
