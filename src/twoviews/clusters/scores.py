"""Scores of a clustering: against labels or, without them, by its geometry, and against the epoch before.

Shapes: N points, D dimensions, K clusters.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.clusters.kmeans import Clusters, concentration
from twoviews.randomness import generator

SILHOUETTE_SAMPLE = 2_000  # points; their mean silhouette is within 0.02 of that of all points
CHUNK_BYTES = 64 * 2**20  # of distances held in memory
MAX_TABLE_CELLS_PER_POINT = 6  # in a larger table of pairs of clusters, sorting the points is faster


def clustering_scores(
    x: Float[Tensor, "N D"],
    clusters: Clusters,
    *,
    labels: Int[Tensor, " N"] | None,
    previous: Int[Tensor, " N"] | None,
    seed: int,
) -> dict[str, float]:
    """Scores of one clustering of `x`.

    Always: `largest` and `smallest` (points of those clusters that have any), `empty` (clusters without points), and
    `concentration_min` and `concentration_max` (of PCL's concentrations, in units of their mean, the temperature: from
    1 / CONCENTRATION_RATIO to CONCENTRATION_RATIO).
    With labels, in percent: `nmi` (normalised by the arithmetic mean of the entropies), `ari` (0 by chance), `purity`
    (points that have the most frequent label of their cluster) and `accuracy` (points that have the label which a
    one-to-one matching gives their cluster: the best matching, found by the Hungarian algorithm; with more clusters than
    classes the clusters left over count as wrong, so then it is far below purity, and with fewer the classes left over).
    Without labels: `silhouette` in [-1, 1], of at most SILHOUETTE_SAMPLE points drawn by `seed`, each against all N.
    With previous: `stability`, the NMI of this assignment with that one, in percent.

    Args:
        x: the points.
        clusters: of these points.
        labels: classes 0, 1, ….
        previous: the assignment of the same points in the epoch before, to any number of clusters; negative: unknown.
        seed: of the sample.
    """
    assignment, sizes = clusters.assignment.cpu(), clusters.sizes.cpu()
    filled, phi = sizes[sizes > 0], concentration(clusters, 1.0).cpu()
    values = {
        "largest": int(filled.max()),
        "smallest": int(filled.min()),
        "empty": len(sizes) - len(filled),
        "concentration_min": float(phi.min()),
        "concentration_max": float(phi.max()),
    }
    if labels is not None:
        labels = labels.cpu()
        values["nmi"], values["ari"] = nmi_and_ari(labels, assignment)
        values["accuracy"], values["purity"] = accuracy_and_purity(assignment, labels)
    else:
        values["silhouette"] = silhouette(x, clusters, seed)
    if previous is not None and (previous := previous.cpu()).max() >= 0:
        if previous.min() < 0:  # choosing points takes as long as what follows
            assigned = previous >= 0
            previous, assignment = previous[assigned], assignment[assigned]
        values["stability"], _ = nmi_and_ari(previous, assignment)
    return values


def nmi_and_ari(assignment: Int[Tensor, " N"], other: Int[Tensor, " N"]) -> tuple[float, float]:
    """NMI and ARI of two partitions in percent, by scikit-learn's definitions; its own take several times as long.

    Two partitions into one part each agree fully.
    """
    width = int(other.max()) + 1
    n, a, b = len(assignment), torch.bincount(assignment), torch.bincount(other)
    pairs = assignment * width + other
    if len(a) * width <= MAX_TABLE_CELLS_PER_POINT * n:
        table = torch.bincount(pairs)
        pairs = table.nonzero()[:, 0]  # only those that some point is in
        joint = table[pairs]
    else:
        pairs, joint = pairs.unique(return_counts=True)
    of_joint = a[pairs // width].double(), b[pairs % width].double()
    p = joint.double() / n
    mutual = (p * (joint * n / (of_joint[0] * of_joint[1])).log()).sum().clamp(min=0).item()
    entropy = sum(torch.special.entr(sizes.double() / n).sum().item() for sizes in (a, b)) / 2
    nmi = mutual / entropy if entropy > 0 else 1.0
    # Ordered pairs of different points: together in both, and in each of the two.
    both, in_one, in_other = (int(sizes.square().sum()) - n for sizes in (joint, a, b))
    chance = in_one * in_other / max(1, n * (n - 1))
    most = (in_one + in_other) / 2
    ari = (both - chance) / (most - chance) if most > chance else 1.0
    return 100 * nmi, 100 * ari


def accuracy_and_purity(assignment: Int[Tensor, " N"], labels: Int[Tensor, " N"]) -> tuple[float, float]:
    """Points that have the label of their cluster, in percent, if labels are matched one to one, and by majority."""
    from scipy.optimize import linear_sum_assignment

    classes = int(labels.max()) + 1
    table = torch.bincount(assignment * classes + labels, minlength=(int(assignment.max()) + 1) * classes)
    table = table.view(-1, classes)  # [K, classes], points in common
    cluster, label = linear_sum_assignment(table.numpy(), maximize=True)
    matched, majority = table[cluster, label].sum(), table.amax(1).sum()
    return 100 * matched.item() / len(labels), 100 * majority.item() / len(labels)


@torch.no_grad()
def silhouette(x: Float[Tensor, "N D"], clusters: Clusters, seed: int) -> float:
    """Mean of (b - a) / max(a, b) over a sample; in [-1, 1], 0 for points alone in their cluster or if there is but one.

    a is a point's mean distance to the others of its cluster, b to the points of the nearest other cluster (Rousseeuw
    1987). Clusters are not thinned out: with hundreds of them a sample would hold few points of each.
    """
    n, assignment = len(x), clusters.assignment
    sample = torch.randperm(n, generator=generator(seed, "silhouette"))[:SILHOUETTE_SAMPLE].to(x.device)
    sizes = clusters.sizes.float()
    values = []
    for points in sample.split(max(1, CHUNK_BYTES // (4 * n))):
        distance = torch.cdist(x, x[points])  # [N, points]
        distance[points, torch.arange(len(points), device=x.device)] = 0  # exactly, whatever the rounding
        total = distance.new_zeros(len(sizes), len(points)).index_add_(0, assignment, distance)
        own = assignment[points][None]  # [1, points]
        company = sizes[own[0]] - 1
        a = total.gather(0, own)[0] / company.clamp(min=1)
        b = (total / sizes[:, None].clamp(min=1)).masked_fill(sizes[:, None] == 0, torch.inf)
        b = b.scatter(0, own, torch.inf).amin(0)
        value = (b - a) / torch.maximum(a, b)
        values.append(torch.where((company > 0) & b.isfinite() & (torch.maximum(a, b) > 0), value, 0))
    return torch.cat(values).mean().item()
