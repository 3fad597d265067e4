"""kNN for every pair of a number of neighbours and a temperature, because publications differ in both.

The neighbours are searched once, for the largest k; the votes of a smaller k are the first ones of those.
Shapes: M queries, C classes.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.images import ImageData
from twoviews.features import Features
from twoviews.protocols.classification import mask_zeros, ranks
from twoviews.protocols.knn import clamped_notes, neighbours, votes
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import Count, NonNegativeInt, Temperature


class KNNGrid(Protocol):
    """Accuracy of `KNN` at each k and temperature, all from one pass over the similarities.

    The numbers are those of `KNN`, unless a query is exactly as similar to its k-th neighbour as to the next one, as it
    can be to copies of one image: either may then be the k-th. None of them is a headline: the best of a grid would be
    chosen on the test images.

    Args:
        ks: numbers of neighbours that vote; clamped to the bank.
        temperatures: of the votes.
    """

    def __init__(self, ks: Sequence[Count], temperatures: Sequence[Temperature], every_epochs: NonNegativeInt):
        self.ks, self.temperatures, self.every_epochs = sorted(set(ks)), sorted(set(temperatures)), every_epochs

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if the largest k is clamped."""
        return clamped_notes(self.ks[-1], data, "ks")

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """k<k>_t<temperature>_top1 and _top5 in percent, and the same as the table `grid`.

        Needs the memory of `neighbours` and no scores of all queries at once.
        """
        classes, test = len(context.data.classes), context.test
        right = torch.zeros(len(self.ks), len(self.temperatures), 2, dtype=torch.long, device=test.x.device)
        for place, scores, labels in self._scores(test, context.memory, classes):
            rank = ranks(mask_zeros(scores), labels)
            right[place] += torch.stack(((rank < 1).sum(), (rank < 5).sum()))
        counts, values, grid = right.tolist(), {}, []
        for row, k in enumerate(self.ks):
            for column, temperature in enumerate(self.temperatures):
                first, five = (100 * count / len(test.y) for count in counts[row][column])
                point = {"top1": first, "top5": five} if classes > 5 else {"top1": first}
                values.update({f"k{k}_t{temperature:g}_{name}": value for name, value in point.items()})
                grid.append({"k": k, "temperature": temperature, **point})
        return EvaluationResult(values, tables={"grid": grid})

    @torch.no_grad()
    def _scores(
        self, queries: Features, bank: Features, classes: int
    ) -> Iterator[tuple[tuple[int, int], Float[Tensor, "m C"], Int[Tensor, " m"]]]:
        """For each chunk of queries and point of the grid: its row and column in the grid, scores and labels."""
        for which, nearest, index in neighbours(queries.x, bank.x, self.ks[-1]):
            labels = bank.y[index]
            for column, temperature in enumerate(self.temperatures):
                cast, scores, voted = votes(nearest, temperature), nearest.new_zeros(len(nearest), classes), 0
                for row, k in enumerate(self.ks):
                    # Added in KNN's order, nearest first, so that the sums have its bits too.
                    scores.scatter_add_(1, labels[:, voted:k], cast[:, voted:k])
                    voted = min(k, labels.shape[1])
                    yield (row, column), scores, queries.y[which]
