"""DINO: a student learns from any crop what its slowly moving teacher says of the large crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294.
Shapes: V crops of B images, the first A of which the teacher sees; D embedding, K prototypes (outputs of the last layer).
Letters as in the paper: P_s and P_t the distributions of student and teacher over K, C the center.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import ema_update, encode_crops, frozen_copy, rising_momentum, spread, targets
from twoviews.methods.method import Collapse, Method, Output, Progress, Rows
from twoviews.ranges import EmaMomentum, NonNegativeInt, NotNegative, Range, Repeats, Size, Temperature

TeacherTemperature = Annotated[float, Range(above=0, usual="0.04 to 0.07")]


def self_distillation(
    student: Float[Tensor, "V B K"], p_t: Float[Tensor, "A B K"], temperature: float
) -> Float[Tensor, ""]:
    """Eq. 3: mean cross-entropy of P_t of each of the A crops with P_s of the V - 1 other crops.

    A mean over images and pairs of crops, as the authors' code has it; the paper writes a sum over the pairs.

    Args:
        student: outputs, before the softmax.
        p_t: the teacher's distributions of the first A crops.
        temperature: the student's.
    """
    log_p = nnf.log_softmax(student / temperature, dim=2)
    others = log_p.sum(0) - log_p[: len(p_t)]  # [A, B, K]: all crops but the teacher's own
    return -(p_t * others).sum(2).mean() / (len(student) - 1)


def teacher_temperature(start: float, final: float, warmup_epochs: int, epoch: Tensor) -> Tensor:
    """The teacher's temperature in epoch `epoch` (rounded down): from `start` to `final` in steps of whole epochs.

    As the authors' code, the last of the warm-up epochs has the final temperature already.
    """
    share = (epoch.floor() / max(1, warmup_epochs - 1)).clamp(max=1)
    return torch.where(epoch < warmup_epochs, start + (final - start) * share, final)


class NormalizedLinear(nn.Module):
    """Scalar products with K rows of unit length: a weight-normalised layer whose gains are fixed at 1."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach())  # [K, D]

    def forward(self, z: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        """Cosines, where `z` has unit length."""
        return nnf.linear(z, nnf.normalize(self.weight, dim=1))


def _projector(features: int, hidden_dim: int, embed_dim: int, norm: bool) -> nn.Sequential:
    """Three linear layers with GELU, initialised as a vision transformer's."""
    layers: list[nn.Module] = []
    for inputs in (features, hidden_dim):
        layers += [nn.Linear(inputs, hidden_dim), *([nn.BatchNorm1d(hidden_dim)] if norm else []), nn.GELU()]
    layers.append(nn.Linear(hidden_dim, embed_dim))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class DINO(Method):
    """Algorithm 1 of the paper, with multi-crop.

    The encoder that is measured is the student's; the paper measures the teacher's.

    Args:
        encoder: the network to pretrain; the student's.
        hidden_dim: width of the head's hidden layers; 2048 in the paper.
        embed_dim: D; 256 in the paper.
        prototypes: K; 65,536 in the paper.
        head_norm: batch norm in the head's hidden layers.
        student_temperature: of the student's softmax; 0.1 in the paper.
        teacher_temperature: of the teacher's softmax after its warm-up.
        teacher_start_temperature: in the first epoch.
        teacher_warmup_epochs: how many epochs the teacher's temperature takes.
        teacher_crops: A; the teacher sees the first so many crops, of one size, and the student all.
        momentum: of the moving average that makes the teacher, at the start; it rises to 1 with a cosine over the training.
        center_momentum: of the moving average of the teacher's outputs that they are centered with (eq. 4).
        freeze_prototypes_epochs: how long the student's last layer stays as it began.
    """

    views = None
    collapses = (
        Collapse(
            "teacher_entropy",
            "the teacher gives nearly the same even distribution for every image (1 is entirely). Lower teacher_temperature, or "
            "raise center_momentum.",
            above=0.99,
        ),
        Collapse(
            "prototype_entropy",
            "the teacher gives all images the same few prototypes (0 is one). Lower center_momentum, or raise "
            "teacher_temperature.",
            below=0.2,
        ),
    )
    center: Tensor  # [K], C
    temperature: Tensor  # [], the teacher's in this step

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        prototypes: Annotated[int, Range(at_least=2, usual="2048 to 65536")],
        head_norm: bool,
        student_temperature: Temperature,
        teacher_temperature: TeacherTemperature,
        teacher_start_temperature: TeacherTemperature,
        teacher_warmup_epochs: NonNegativeInt,
        teacher_crops: Repeats,
        momentum: EmaMomentum,
        center_momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")],
        freeze_prototypes_epochs: NotNegative,
    ):
        super().__init__()
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.teacher_start_temperature = teacher_start_temperature
        self.teacher_warmup_epochs, self.teacher_crops = teacher_warmup_epochs, teacher_crops
        self.momentum, self.center_momentum = momentum, center_momentum
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self.encoder = encoder
        self.projector = _projector(encoder.out_dim, hidden_dim, embed_dim, head_norm)
        self.prototypes = NormalizedLinear(embed_dim, prototypes)
        self.teacher = frozen_copy(nn.Sequential(self.encoder, self.projector))
        self.teacher_prototypes = frozen_copy(self.prototypes)
        self.register_buffer("center", torch.zeros(prototypes))
        first = teacher_start_temperature if teacher_warmup_epochs else teacher_temperature
        self.register_buffer(
            "temperature", torch.full((), float(first))
        )  # of the first step; then `after_step` sets it

    def _temperature(self, epoch: Tensor) -> Tensor:
        ends = self.teacher_start_temperature, self.teacher_temperature
        return teacher_temperature(*ends, self.teacher_warmup_epochs, epoch).float()

    def _check(self, views: Sequence[Tensor]) -> None:
        a, sides = self.teacher_crops, {tuple(view.shape[-2:]) for view in views[: self.teacher_crops]}
        if len(views) < max(2, a):
            raise BadInput(
                f"teacher_crops={a} needs at least {max(2, a)} views of an image and the augmentation makes "
                f"{len(views)}; choose another augmentation."
            )
        if len(sides) > 1:
            raise BadInput(
                f"teacher_crops={a} takes the first {a} views, which are of one size, and the augmentation makes them "
                f"of {len(sides)} sizes; use a smaller number or another augmentation."
            )

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """From every crop the student predicts what the teacher says of the large crops other than it.

        Raises:
            BadInput: there are too few crops, or the teacher's are of several sizes.
        """
        self._check(views)
        count, a = len(views), self.teacher_crops
        z = nnf.normalize(self.projector(encode_crops(self.encoder, views)).float(), dim=1)
        (t,) = targets(self.teacher, [torch.cat(list(views[:a]))])
        z, t = z.unflatten(0, (count, -1)), nnf.normalize(t, dim=1).unflatten(0, (a, -1))
        # Under autocast the outputs would be rounded to bf16: an error of up to 0.004 / T_t.
        with torch.autocast(z.device.type, enabled=False):
            p_t = nnf.softmax((self.teacher_prototypes(t) - self.center) / self.temperature, dim=2)
            loss = self_distillation(self.prototypes(z), p_t, self.student_temperature)
        # Of the two ways to collapse (sec. 5.3), 1 of the first is the even distribution for every image, 0 of the second
        # the same prototype for every image.
        even = math.log(p_t.shape[2])
        metrics = {
            "spread": spread(z[0]),
            "teacher_entropy": torch.special.entr(p_t).sum(2).mean() / even,
            "prototype_entropy": torch.special.entr(p_t.mean((0, 1))).sum() / even,
        }
        return Output(loss, metrics, {"t": t.mean(0)})

    def phase(self, epoch: float) -> bool:
        """Whether the prototypes are frozen."""
        return epoch < self.freeze_prototypes_epochs

    def before_optimizer_step(self, phase: Hashable) -> None:
        """Prototypes without gradient stay as they are."""
        if phase:
            self.prototypes.weight.grad = None

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """The center moves to the mean output of the teacher that this step had, then the teacher follows.

        The last layer is linear, so that the mean of its outputs is its output of the mean: D numbers an image, not K.
        """
        (output,) = self.teacher_prototypes(rows["t"].mean(0, keepdim=True))
        self.center.lerp_(output, 1 - self.center_momentum)
        momentum = rising_momentum(self.momentum, progress.fraction)
        ema_update(self.teacher, (self.encoder, self.projector), momentum)
        ema_update(self.teacher_prototypes, (self.prototypes,), momentum)
        self.temperature.copy_(self._temperature(progress.epoch))
