"""K-means: faiss finds the nearest centroids on a CPU, matrix products on a GPU, and over-relaxed steps move them.

Lloyd's step moves a centroid c to the mean m of its points; here it goes on to c + OVERRELAXATION (m - c). The sum of squared
distances to n points is n |c - m|^2 plus what does not depend on c, so that any factor up to 2 keeps Lloyd's guarantee
that no step makes it larger. Close to 2 the centroids swing around the nearest optimum instead of creeping towards it, and
ten steps end lower than the best of five times twenty plain ones (benchmarks/kmeans.py).
Shapes: N points, D dimensions, K clusters. Letters: c centroids, m means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed, process_group
from twoviews.clusters.passes import Passes, passes_on, sizes_of
from twoviews.console import progress_of
from twoviews.errors import BadInput
from twoviews.randomness import generator
from twoviews.ranges import Count, NotNegative

OVERRELAXATION = 1.9
WARM_START_SAMPLE = 2_000  # points by which a warm start is compared with a cold one
# Of the default nredo: on digits one start with k = 8 or 10 ended up to 6.5 % above the best inertia known, the best of ten
# 0.4 %. Ten starts of 8 clusters cost no more than one clustering into 80.
MAX_STARTS, MAX_CLUSTERS_IN_ALL_STARTS = 10, 80
CONCENTRATION_RATIO = 10  # at most, of a concentration to their mean or of the mean to it


@dataclass(frozen=True)
class Clusters:
    """A partition of N points into K clusters, of which some may be empty."""

    assignment: Int[Tensor, " N"]  # int64, 0 … K - 1: the nearest centroid
    centroids: Float[Tensor, "K D"]  # means as they are; unit rows if spherical
    distance: Float[Tensor, " N"]  # squared Euclidean distance to the centroid
    iterations: int  # assignments of all points before the centroids were final

    @property
    def sizes(self) -> Int[Tensor, " K"]:
        """Number of points in each cluster."""
        return sizes_of(self.assignment, len(self.centroids))

    @property
    def inertia(self) -> float:
        """Sum of the squared distances, which k-means minimizes."""
        return self.distance.double().sum().item()


@dataclass(frozen=True)
class Clustered:
    """Features of training images at the start of an epoch, and their clusterings."""

    x: Float[Tensor, "N D"]
    clusters: dict[str, Clusters]  # by name, such as "k250"
    previous: dict[str, Int[Tensor, " N"]]  # assignments of the epoch before, negative where unknown; {} at first
    index: Int[Tensor, " N"] | None = None  # which training images the rows are; None: all, in order


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "N D"],
    k: Count,
    *,
    seed: int,
    start: Int[Tensor, " N"] | Float[Tensor, "K D"] | None = None,
    spherical: bool = False,
    nredo: Count | None = None,
    iterations: Count = 10,
    tolerance: NotNegative = 2e-3,
    max_points_per_centroid: Count = 1000,
) -> Clusters:
    """Cluster the rows of `x` into K clusters, on its device; equal input gives equal bits there.

    CPUs and GPUs begin with the same points and differ by rounding. With several processes the first one computes, and all
    get its result.

    Args:
        x: the points, the same on every process.
        k: K.
        seed: of cold starts, of samples and of what replaces empty clusters.
        start: an earlier assignment of the same points, or earlier centroids. The assignment is worth more where the
            points have moved together since, as embeddings do from epoch to epoch: the centroids move along with them.
            A start that is worse than randomly drawn points gives way to a cold one.
        spherical: keep the centroids at unit length, so that unit rows are compared by angle.
        nredo: starts, of which the one with the lowest inertia is kept, as faiss and PCL's code have it; all but the one
            from `start` are cold. None: ten up to k = 8, fewer with more clusters, and one from k = 41 on.
        iterations: assignments of all points at most, for each start.
        tolerance: stop when one lowers the inertia by a smaller share than this; starts that differ by less are equally
            good, and the first of them is kept.
        max_points_per_centroid: with more than K times so many points the centroids are found on a sample of that size.

    Raises:
        BadInput: there are fewer points than clusters, or points that are not finite.
    """
    x = x.float()
    _check(x, k)
    if distributed.processes() > 1 and distributed.rank() > 0:
        assignment, distance = torch.empty(len(x), dtype=torch.long), torch.empty(len(x))
        centroids, steps = torch.empty(k, x.shape[1]), 0
    else:
        points, passes, drawn = x.contiguous(), passes_on(x.device), generator(seed, "kmeans")
        begin = None if start is None else start.to(x.device).contiguous()
        sample = points
        if len(points) > k * max_points_per_centroid:
            rows = torch.randperm(len(points), generator=drawn)[: k * max_points_per_centroid].to(x.device)
            sample = points[rows]
            begin = begin if begin is None or begin.is_floating_point() else begin[rows]
        redo = nredo or starts(k)
        with progress_of(f"k-means of {len(sample):,} points, k = {k}", redo * iterations, "iterations") as advance:
            search = _Search(sample, k, spherical, passes, drawn, advance)
            centroids, steps = search.best(begin, redo, iterations, tolerance)
        assignment = passes.nearest(points, centroids)[1]
        # Not that of `nearest`, which has few digits where it is small.
        distance = (points - centroids[assignment]).square().sum(1)
    process_group.wait_for_first()
    shared = (assignment, centroids, distance, torch.tensor(steps))
    assignment, centroids, distance, count = (distributed.broadcast(value.to(x.device)) for value in shared)
    return Clusters(assignment, centroids, distance, int(count))


def starts(k: int) -> int:
    """Default number of starts: the fewer the clusters, the more the result depends on the start."""
    return max(1, min(MAX_STARTS, MAX_CLUSTERS_IN_ALL_STARTS // k))


def _check(x: Float[Tensor, "N D"], k: int) -> None:
    if k > len(x):
        raise BadInput(f"{k} clusters are more than the {len(x)} points there are; use k={len(x)} or less.")
    broken = (~x.square().sum(1).isfinite()).nonzero()[:, 0]
    if len(broken):
        raise BadInput(
            f"{len(broken)} of {len(x)} points to cluster are not finite, number {int(broken[0])} the first: nothing can be "
            "near them; if a training made them, use a lower optimizer.lr or runtime.precision=fp32."
        )


@dataclass(frozen=True)
class _Search:
    """The search for K centroids of some points."""

    x: Float[Tensor, "N D"]
    k: int
    spherical: bool
    passes: Passes
    drawn: torch.Generator  # on the CPU, wherever the points are
    advance: Callable[[int], None]  # takes the number of iterations just done, or left out

    def best(
        self, start: Tensor | None, count: int, iterations: int, tolerance: float
    ) -> tuple[Float[Tensor, "K D"], int]:
        """Centroids of the best of several starts, and the number of steps to them; all but the one from `start` are cold."""
        warm = None if start is None else self.warm(start)
        candidates = [self.steps(self.cold() if warm is None else warm, iterations, tolerance)]
        candidates += [self.steps(self.cold(), iterations, tolerance) for _ in range(count - 1)]
        lowest = min(inertia for inertia, _, _ in candidates)
        # The first, and not whichever rounding puts ahead, so that CPUs and GPUs choose alike.
        _, centroids, steps = next(result for result in candidates if result[0] - lowest <= tolerance * abs(lowest))
        return centroids, steps

    def warm(self, start: Int[Tensor, " N"] | Float[Tensor, "K D"]) -> Int[Tensor, " N"] | None:
        """The assignment of a warm start; None if its means have a larger inertia than K points drawn at random.

        Both are compared before any step. With assignments of the epoch before that were made worse and worse, the final
        inertia exceeded that of a cold start from about this point on.
        """
        assignment = self.passes.nearest(self.x, start)[1] if start.is_floating_point() else start
        order = torch.randperm(len(self.x), generator=self.drawn).to(self.x.device)
        random, sample = self.x[order[: self.k]], order[self.k : self.k + WARM_START_SAMPLE]
        m, _, _ = self._means(assignment)
        distance = (self.x[sample] - m[assignment[sample]]).square().sum()
        return assignment if distance <= self.passes.nearest(self.x[sample], random)[0].sum() else None

    def cold(self) -> Int[Tensor, " N"]:
        """An assignment to K points drawn as in k-means++, but in rounds that each double the number of points."""
        distance = self.x.new_full((len(self.x),), torch.inf)
        assignment = torch.zeros(len(self.x), dtype=torch.long, device=self.x.device)
        rows, count = torch.randint(len(self.x), (1,), generator=self.drawn).to(self.x.device), 0
        while len(rows):
            near, which = self.passes.nearest(self.x, self.x[rows])
            closer = near < distance
            distance, assignment = torch.where(closer, near, distance), torch.where(closer, which + count, assignment)
            distance[rows] = 0  # exactly, whatever the rounding
            count += len(rows)
            rows = self._far(distance, min(count, self.k - count))
        return assignment

    def steps(
        self, assignment: Int[Tensor, " N"], iterations: int, tolerance: float
    ) -> tuple[float, Float[Tensor, "K D"], int]:
        """Inertia, means and number of steps after Lloyd's iterations from an assignment."""
        power = torch.linalg.vector_norm(self.x, dim=1).double().square().sum()
        c, inertia = self.x[:1].expand(self.k, -1), float("inf")
        for step in range(iterations + 1):
            m, sizes, rest = self._means(assignment)
            m = torch.where(sizes[:, None] > 0, m, c)
            # The only wait for a GPU in a step without empty clusters.
            before, (inertia, empty) = inertia, torch.stack((power + rest, (sizes == 0).sum().double())).tolist()
            if step == iterations or before - inertia <= tolerance * inertia:
                self.advance(iterations - step)
                break
            c = c + OVERRELAXATION * (m - c) if step > 0 else m.clone()
            if empty:
                rows = self._far((self.x - m[assignment]).square().sum(1), int(empty))
                c[(sizes == 0).nonzero()[: len(rows), 0]] = self.x[rows]
            c = nnf.normalize(c, dim=1) if self.spherical else c
            assignment = self.passes.nearest(self.x, c)[1]
            self.advance(1)
        return inertia, m, step

    def _means(
        self, assignment: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "K D"], Int[Tensor, " K"], Float[Tensor, ""]]:
        """Means (unit vectors if spherical), sizes, and the inertia about the means minus the sum of |x|^2."""
        sizes, total = sizes_of(assignment, self.k), self.passes.sums(self.x, assignment, self.k)
        m = nnf.normalize(total, dim=1) if self.spherical else total / sizes.clamp(min=1)[:, None]
        return m, sizes, (sizes * m.double().square().sum(1) - 2 * (m.double() * total).sum(1)).sum()

    def _far(self, distance: Float[Tensor, " N"], count: int) -> Int[Tensor, " n"]:
        """Up to `count` different points, drawn in proportion to `distance`; none if that is 0 everywhere."""
        reach = distance.cpu().double().cumsum(0)  # on the CPU, which adds them up in the same order every time
        if count == 0 or reach[-1] == 0:
            return torch.empty(0, dtype=torch.long, device=distance.device)
        at = torch.arange(count) + torch.rand(count, generator=self.drawn, dtype=torch.double)
        rows = torch.searchsorted(reach, at / count * reach[-1], right=True)
        return rows.clamp(max=len(distance) - 1).unique().to(distance.device)


def concentration(clusters: Clusters, temperature: float) -> Float[Tensor, " K"]:
    """Phi of eq. 12 of PCL, arXiv:2005.04966, scaled to a mean of `temperature`: small for large, dense clusters.

    The mean distance (not squared) of a cluster's n points over log(n + 10). As in the authors' code, clusters with fewer
    than two points get the largest value, and all are clipped to the 10th and 90th percentile. Beyond that none is below a
    CONCENTRATION_RATIO-th of the 90th percentile: where more than a tenth of the clusters are copies of one point, the
    original divides by 0. So each is between `temperature` / CONCENTRATION_RATIO and `temperature` * CONCENTRATION_RATIO.
    Where no cluster extends at all, each gets `temperature`.
    """
    sizes, passes = clusters.sizes, passes_on(clusters.distance.device)
    distance = clusters.distance.double().sqrt()[:, None]
    phi = passes.sums(distance, clusters.assignment, len(sizes))[:, 0] / sizes / (sizes.double() + 10).log()
    phi = torch.where(sizes > 1, phi, phi.where(sizes > 1, 0).amax())
    low, high = phi.quantile(0.1), phi.quantile(0.9)
    phi = phi.clamp(torch.maximum(low, high / CONCENTRATION_RATIO), high)
    mean = phi.mean()
    return torch.where(mean > 0, phi * (temperature / mean), temperature).float()
