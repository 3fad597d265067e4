"""Few labels: accuracy of classifiers that learn from the labels of a few images, over several draws of these.

The linear probe of `linear` on frozen features and, if asked for, fine-tuning. The draws are stratified and our own, not
the lists of ImageNet files that SimCLR published.
Shapes: N memory images, F features, C classes.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Int
from torch import Tensor

from twoviews.errors import BadInput
from twoviews.features import Features
from twoviews.protocols.classification import accuracies
from twoviews.protocols.finetune import FineTune
from twoviews.protocols.labelled import labelled
from twoviews.protocols.linear import Linear, Probe, held_out
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.randomness import generator
from twoviews.ranges import Count, Length, NonNegativeInt, NotNegative, Range, Seed


def quota(y: Int[Tensor, " N"], classes: int, share: float) -> tuple[Int[Tensor, " C"], int]:
    """Number of images of each class for a share of all, rounded, and the number of classes that were raised to one image."""
    members = torch.bincount(y, minlength=classes).cpu()
    wanted = (share * members).round().long()
    raised = (wanted == 0) & (members > 0)
    return wanted + raised, int(raised.sum())


def drawn(y: Int[Tensor, " N"], counts: Int[Tensor, " C"], *key: int | str) -> Int[Tensor, " n"]:
    """Sorted indices of random images, `counts` of each class; a function of `key`."""
    labels = y.cpu()
    order = torch.randperm(len(labels), generator=generator("few labels", *key))
    parts = [order[labels[order] == label][:count] for label, count in enumerate(counts.tolist())]
    return torch.cat(parts).sort().values


@dataclass
class FewLabels(Protocol):
    """Mean and standard deviation of the accuracy over draws of few labelled memory images.

    Args:
        shares: settings that are shares of the memory images, class by class; a class whose share rounds to no image
            gives one, and a note says so.
        per_class: settings that are numbers of images of each class.
        draws: of each setting.
        weight_decays: candidates of the linear probe, chosen on a held-out part of the draw; where a class has a single
            image, nothing can be held out and the largest is taken.
        held_out: share of a draw that chooses.
        iterations: of LBFGS, at most.
        finetune: fine-tune on each draw, too; null: only the linear probe.
        seed: of the draws.

    Raises:
        BadInput: there is no setting.
    """

    shares: Annotated[Sequence[Annotated[float, Range(above=0, at_most=1, usual="0.01 and 0.1")]], Length()]
    per_class: Annotated[Sequence[Count], Length()]
    draws: Annotated[int, Range(at_least=2, at_most=1000, usual="3 to 10")]
    weight_decays: Sequence[NotNegative]
    held_out: Annotated[float, Range(above=0, below=1, usual="0.2")]
    iterations: Count
    finetune: FineTune | None
    seed: Seed
    every_epochs: NonNegativeInt

    def __post_init__(self) -> None:
        if not [*self.shares, *self.per_class]:
            raise BadInput("shares=[] and per_class=[] leave nothing to do; use shares=[0.01,0.1].")

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that fine-tuning takes from the run; empty without fine-tuning."""
        return {} if self.finetune is None else {"finetune": self.finetune.settings_from_run(config)}

    def settings(self, context: EvaluationContext) -> dict[str, tuple[Int[Tensor, " C"], str]]:
        """For each setting by name: the number of images of each class, and a note for the user.

        Raises:
            BadInput: a class has fewer images than are asked of each.
        """
        y, names, settings = context.memory.y, context.data.classes, {}
        for share in self.shares:
            counts, raised = quota(y, len(names), share)
            note = f"{raised} of {len(names)} classes would have no image and give one" if raised else ""
            settings[f"{100 * share:g}pct"] = counts, note
        members = torch.bincount(y, minlength=len(names)).cpu()
        for count in self.per_class:
            if count > members.min():
                least = int(members.argmin())
                raise BadInput(
                    f"per_class={self.per_class} has {count}, but class '{names[least]}' has {members[least]} memory images; "
                    f"use at most {members[least]}."
                )
            settings[f"{count}_per_class"] = torch.full_like(members, count), ""
        return settings

    def probe(self, memory: Features, few: Features, classes: int) -> Probe:
        """Softmax regression on few memory images, standardised like all of them, which takes no labels."""
        chooses = held_out(few.y, self.held_out)[1]
        each_chooses = len(few.y[chooses].unique()) == len(few.y.unique())
        weight_decays = self.weight_decays if each_chooses else [max(self.weight_decays)]
        linear = Linear(weight_decays, self.held_out, self.iterations, self.every_epochs)
        return linear.fitted(few, classes, scaled_as=memory.x)[0]

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1_<setting> and top1_<setting>_std of the probe, the same after finetune_, and all as a table.

        top1 is the first setting's.
        """
        memory, y, values = context.memory, context.test.y, {}
        rows: list[TableRow] = []
        for name, (counts, note) in self.settings(context).items():
            draws: dict[str, list[dict[str, float]]] = {"linear": [], "fine-tuned": []}
            for draw in range(self.draws):
                index = drawn(memory.y, counts, self.seed, name, draw)
                few = memory.subset(index)
                probe = self.probe(memory, few, len(context.data.classes))
                draws["linear"].append(accuracies(probe(context.test.x), y))
                if self.finetune is not None:
                    images, test = labelled(context)
                    start = None if self.finetune.linear is None else probe
                    tuned = self.finetune.fitted(context, few, images.subset(index), name, draw, probe=start)
                    draws["fine-tuned"].append(accuracies(self.finetune.scores(context, tuned.model, test), y))
            for classifier, found in draws.items():
                if not found:
                    continue
                row: TableRow = {
                    "setting": name,
                    "classifier": classifier,
                    "images": int(counts.sum()),
                    "draws": self.draws,
                }
                for key in found[0]:
                    of_draws = [accuracy[key] for accuracy in found]
                    row |= {key: statistics.fmean(of_draws), f"{key}_std": statistics.stdev(of_draws)}
                prefix = "finetune_" if classifier == "fine-tuned" else ""
                values |= {f"{prefix}top1_{name}{end}": float(row[f"top1{end}"]) for end in ("", "_std")}
                rows.append({**row, "note": note})
        return EvaluationResult({"top1": next(iter(values.values())), **values}, None, {"few_labels": rows})
