"""The training images whose features are most similar to those of other images, to see what an encoder has learnt.

Shapes: N training images, M others, K neighbours, F features.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.data.images import ImageData, Images
from twoviews.protocols.knn import CHUNK_BYTES
from twoviews.protocols.neighbours_sheet import NeighbourRow, draw_neighbours
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.user_images import check_images, embed_user_images, grey_notes, image_paths
from twoviews.randomness import generator
from twoviews.ranges import Count, Index, Seed


def nearest_rows(
    queries: Float[Tensor, "M F"], bank: Float[Tensor, "N F"], k: int, own: Int[Tensor, " M"] | None
) -> tuple[Float[Tensor, "M K"], Int[Tensor, "M K"]]:
    """Cosines and indices of the k bank rows most similar to each query, the most similar first.

    Args:
        queries: features.
        bank: features to search.
        k: clamped to the bank.
        own: for each query the bank row that is the query itself, and is left out; None: there is none.
    """
    bank = nnf.normalize(bank, dim=1)
    cosines, rows = [], []
    for part in torch.arange(len(queries), device=bank.device).split(max(1, CHUNK_BYTES // (4 * len(bank)))):
        similarity = nnf.normalize(queries[part], dim=1) @ bank.T
        if own is not None:
            similarity.scatter_(1, own.to(bank.device)[part, None], -2.0)  # less than any cosine
        nearest = similarity.topk(min(k, len(bank) - (own is not None)), dim=1)
        cosines.append(nearest.values)
        rows.append(nearest.indices)
    return torch.cat(cosines).cpu(), torch.cat(rows).cpu()


class Neighbours(Protocol):
    """A table of the nearest training images, and neighbours.png, a sheet of them.

    Args:
        images: a picture file, a folder of them, or a pattern; None: a sample of the test images (of the training
            images, each but itself, where there are no test images).
        k: neighbours of each; clamped to the training images.
        sample: how many images the sample has.
        seed: of the sample.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    needs_labels = False

    def __init__(self, images: str | None, k: Count, sample: Count, seed: Seed, every_epochs: Index):
        if images is not None:
            check_images(images)
        self.images, self.k, self.sample, self.seed, self.every_epochs = images, k, sample, seed, every_epochs

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if colours are lost."""
        return grey_notes(self.images, data)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """agreement: the share of neighbours of the image's own class in percent, where both are labelled.

        Raises:
            BadInput: there are no such pictures.
        """
        data, broken = context.data, []
        paths = None if self.images is None else image_paths(self.images)
        train, bank = context.split("train")
        if paths is not None:
            decoded = embed_user_images(paths, context)
            shown, x, names, own = decoded.images, decoded.x, decoded.images.paths or [], None
            broken = [(decoded.paths[row], why) for row, why in decoded.broken.items()]
        else:
            shown, x, names, own = self._sampled(context)
        cosines, rows = nearest_rows(x, bank, self.k, own) if len(x) else (torch.empty(0, 1), torch.empty(0, 1).long())
        made = [
            NeighbourRow(
                name=names[number],
                image=number,
                label=-1 if shown.labels is None else int(shown.labels[number]),
                neighbours=rows[number].tolist(),
                cosines=cosines[number].tolist(),
            )
            for number in range(len(x))
        ]
        table = [
            {
                "image": row.name,
                "rank": rank + 1,
                "neighbour": train.paths[neighbour] if train.paths else f"{neighbour}",
                "class": "" if train.labels is None else data.classes[int(train.labels[neighbour])],
                "cosine": round(row.cosines[rank], 4),
                "broken": "",
            }
            for row in made
            for rank, neighbour in enumerate(row.neighbours)
        ]
        empty = dict.fromkeys(("rank", "neighbour", "class", "cosine"), "")
        table += [{"image": name, **empty, "broken": why} for name, why in broken]
        if context.folder is not None and made:
            title = f"{context.title}: the nearest of {len(train):,} training images of {data.name}"
            draw_neighbours(context.folder / "neighbours.png", shown, train, made, data.classes, title)
        values = {"images": float(len(made)), "broken": float(len(broken))}
        if made and shown.labels is not None and train.labels is not None:
            agree = train.labels.cpu()[rows] == shown.labels.cpu()[:, None]
            values["agreement"] = 100 * agree.float().mean().item()
        return EvaluationResult(values, tables={"neighbours": table})

    def _sampled(
        self, context: EvaluationContext
    ) -> tuple[Images, Float[Tensor, "M F"], list[str], Int[Tensor, " M"] | None]:
        """A sample of images, their features and names, and their indices if they are training images."""
        which = "train" if context.data.test is None else "test"
        images, x = context.split(which)
        chosen = torch.randperm(len(images), generator=generator(self.seed, "neighbours"))[: self.sample].sort().values
        names = [f"{which} {row}" if images.paths is None else images.paths[row] for row in chosen.tolist()]
        return images.subset(chosen), x[chosen.to(x.device)], names, chosen if which == "train" else None
