"""K-means: faiss finds the nearest centroids, on a GPU where it can, and over-relaxed steps move them.

Lloyd's step moves a centroid c to the mean m of its points; here it goes on to c + OVERSTEP (m - c). The sum of squared
distances to n points is n |c - m|^2 plus what does not depend on c, so that any factor up to 2 keeps Lloyd's guarantee
that no step makes it larger. Close to 2 the centroids swing around the nearest optimum instead of creeping towards it, and
ten steps end lower than the best of five times twenty plain ones (benchmarks/kmeans.py).
Shapes: N points, D dimensions, K clusters. Letters: c centroids, m means.
"""

import functools
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.errors import BadInput
from twoviews.randomness import generator
from twoviews.ranges import Count, NotNegative

OVERSTEP = 1.9
PATIENCE = 300  # seconds that faiss gets to find neighbours on a GPU for the first time
JUDGES = 2_000  # points that tell whether a warm start is worth more than a cold one

# Points and centroids to squared distance and number of each point's nearest centroid.
Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Clusters:
    """A partition of N points into K clusters, of which some may be empty."""

    assignment: Int[Tensor, " N"]  # int64, 0 … K - 1: the nearest centroid
    centroids: Float[Tensor, "K D"]  # means as they are; unit rows if spherical
    distance: Float[Tensor, " N"]  # squared Euclidean distance to the centroid
    iterations: int  # times that all points were assigned anew before these centroids stood

    @property
    def sizes(self) -> Int[Tensor, " K"]:
        """Points of each cluster; 0 is an empty one."""
        return torch.bincount(self.assignment, minlength=len(self.centroids))

    @property
    def inertia(self) -> float:
        """Sum of the squared distances, which k-means makes small."""
        return self.distance.double().sum().item()


@dataclass(frozen=True)
class Clustered:
    """Clusterings of the training images at the start of an epoch."""

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
    starts: Count = 1,
    iterations: Count = 10,
    tolerance: NotNegative = 2e-3,
    max_points_per_centroid: Count = 1000,
) -> Clusters:
    """K clusters of the rows of `x`, on its device; equal input gives equal bits.

    With several processes the first one computes, and all get its result.

    Args:
        x: the points, the same on every process.
        k: K.
        seed: of cold starts, of samples and of what replaces empty clusters.
        start: an earlier assignment of the same points, or earlier centroids. The assignment is worth more where the
            points have moved together since, as embeddings do from epoch to epoch: the centroids move along with them.
            A start that is worse than randomly drawn points gives way to a cold one.
        spherical: keep the centroids at unit length, so that unit rows are compared by angle.
        starts: the best of so many; all but the one from `start` are cold. With hundreds of clusters they differ little.
        iterations: assignments of all points at most, for each start.
        tolerance: stop when one lowers the inertia by a smaller share than this.
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
        points, nearest, drawn = x.cpu().contiguous(), _nearest(x.device), generator(seed, "kmeans")
        begin = None if start is None else start.cpu().contiguous()
        sample = points
        if len(points) > k * max_points_per_centroid:
            rows = torch.randperm(len(points), generator=drawn)[: k * max_points_per_centroid]
            sample = points[rows]
            begin = begin if begin is None or begin.is_floating_point() else begin[rows]
        search = _Search(sample, k, spherical, nearest, drawn)
        warm = None if begin is None else search.warm(begin)
        tried = [search.steps(search.cold() if warm is None else warm, iterations, tolerance)]
        tried += [search.steps(search.cold(), iterations, tolerance) for _ in range(starts - 1)]
        _, centroids, steps = min(tried, key=lambda result: result[0])
        assignment = nearest(points, centroids)[1]
        # Not faiss's own, |x|^2 - 2 x c + |c|^2, which has few digits where it is small.
        distance = (points - centroids[assignment]).square().sum(1)
    distributed.wait_for_first()
    shared = (assignment, centroids, distance, torch.tensor(steps))
    assignment, centroids, distance, count = (distributed.from_first(value.to(x.device)) for value in shared)
    return Clusters(assignment, centroids, distance, int(count))


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
    """Ways to find K centroids of some points."""

    x: Float[Tensor, "N D"]
    k: int
    spherical: bool
    nearest: Nearest
    drawn: torch.Generator

    def warm(self, start: Int[Tensor, " N"] | Float[Tensor, "K D"]) -> Int[Tensor, " N"] | None:
        """The assignment that a start amounts to; None if its means are worse than K points drawn at random.

        Both are compared as they are before any step. Embeddings of consecutive epochs whose assignment was spoilt more
        and more ended worse than from a cold start from about that point on.
        """
        assignment = self.nearest(self.x, start)[1] if start.is_floating_point() else start
        order = torch.randperm(len(self.x), generator=self.drawn)
        random, judges = self.x[order[: self.k]], order[self.k : self.k + JUDGES]
        m, _, _ = self._means(assignment)
        distance = (self.x[judges] - m[assignment[judges]]).square().sum()
        return assignment if distance <= self.nearest(self.x[judges], random)[0].sum() else None

    def cold(self) -> Int[Tensor, " N"]:
        """The nearest of K points that are drawn as k-means++ does, but in rounds of as many as there are already."""
        distance, assignment = self.x.new_full((len(self.x),), torch.inf), torch.zeros(len(self.x), dtype=torch.long)
        rows, count = torch.randint(len(self.x), (1,), generator=self.drawn), 0
        while len(rows):
            near, which = self.nearest(self.x, self.x[rows])
            closer = near < distance
            distance, assignment = torch.where(closer, near, distance), torch.where(closer, which + count, assignment)
            distance[rows] = 0  # exactly, whatever the rounding
            count += len(rows)
            rows = self._far(distance, min(count, self.k - count))
        return assignment

    def steps(
        self, assignment: Int[Tensor, " N"], iterations: int, tolerance: float
    ) -> tuple[float, Float[Tensor, "K D"], int]:
        """Inertia, means and number of steps, from an assignment on."""
        power = torch.linalg.vector_norm(self.x, dim=1).double().square().sum()
        c, inertia = self.x[:1].expand(self.k, -1), float("inf")
        for step in range(iterations + 1):
            m, sizes, rest = self._means(assignment)
            m = torch.where(sizes[:, None] > 0, m, c)
            before, inertia = inertia, (power + rest).item()
            if step == iterations or before - inertia <= tolerance * inertia:
                break
            c = c + OVERSTEP * (m - c) if step > 0 else m.clone()
            empty = (sizes == 0).nonzero()[:, 0]
            if len(empty):
                rows = self._far((self.x - m[assignment]).square().sum(1), len(empty))
                c[empty[: len(rows)]] = self.x[rows]
            c = nnf.normalize(c, dim=1) if self.spherical else c
            assignment = self.nearest(self.x, c)[1]
        return inertia, m, step

    def _means(
        self, assignment: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "K D"], Int[Tensor, " K"], Float[Tensor, ""]]:
        """Means, of unit length if spherical; sizes; the inertia about them without the sum of |x|^2."""
        sizes = torch.bincount(assignment, minlength=self.k)
        total = self.x.new_zeros(self.k, self.x.shape[1]).index_add_(0, assignment, self.x)
        m = nnf.normalize(total, dim=1) if self.spherical else total / sizes.clamp(min=1)[:, None]
        return m, sizes, (sizes * m.double().square().sum(1) - 2 * (m.double() * total).sum(1)).sum()

    def _far(self, distance: Float[Tensor, " N"], count: int) -> Int[Tensor, " n"]:
        """Up to `count` different points, drawn in proportion to `distance`; none if that is 0 everywhere."""
        reach = distance.double().cumsum(0)
        if count == 0 or reach[-1] == 0:
            return torch.empty(0, dtype=torch.long)
        at = torch.arange(count) + torch.rand(count, generator=self.drawn, dtype=torch.double)
        rows = torch.searchsorted(reach, at / count * reach[-1], right=True)
        return rows.clamp(max=len(distance) - 1).unique()


def _nearest(device: torch.device) -> Nearest:
    """faiss's exact search, on that device if it is a GPU that faiss can use, else on the CPU."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which instruction sets it has tried
    import faiss  # here: some builds crash if they are loaded before torch, or hang in a process forked after

    faiss.omp_set_num_threads(torch.get_num_threads())  # it counts threads of its own
    resources = faiss.StandardGpuResources() if device.type == "cuda" and _gpu_works(device.index or 0) else None

    def nearest(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        index = faiss.IndexFlatL2(x.shape[1])
        if resources:
            index = faiss.index_cpu_to_gpu(resources, device.index or 0, index)
        index.add(c.numpy())
        distance, assignment = index.search(x.numpy(), 1)
        return torch.from_numpy(distance[:, 0]), torch.from_numpy(assignment[:, 0])

    return nearest


_PROBE = """
import sys, faiss, numpy
x = numpy.eye(64, dtype="float32")
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), int(sys.argv[1]), faiss.IndexFlatL2(64))
index.add(x)
sys.exit(0 if (index.search(x, 1)[1][:, 0] == range(64)).all() else "wrong neighbours")
"""


@functools.cache
def _gpu_works(number: int) -> bool:
    """Whether faiss can search on that GPU; tried in another process, because faiss ends the one in which it cannot."""
    import faiss

    reason = "this build finds no GPU"
    if faiss.get_num_gpus() > number:
        command = [sys.executable, "-c", _PROBE, str(number)]
        try:
            probe = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            if probe.returncode == 0:
                return True
            reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"no answer within {PATIENCE} s"
    warnings.warn(f"faiss cannot use the GPU ({reason}): k-means runs on the CPU, with the same result.", stacklevel=4)
    return False


def concentration(clusters: Clusters, temperature: float) -> Float[Tensor, " K"]:
    """Phi of eq. 12 of PCL, arXiv:2005.04966, scaled to a mean of `temperature`: small for large, dense clusters.

    The mean distance (not squared) of a cluster's n points over log(n + 10). As in the authors' code, clusters with fewer
    than two points get the largest value, and all are clipped to the 10th and 90th percentile. Where no cluster extends at
    all, each gets `temperature`.
    """
    assignment, distance = clusters.assignment.cpu(), clusters.distance.cpu()  # sums on a GPU come out in varying order
    sizes = torch.bincount(assignment, minlength=len(clusters.centroids))
    total = torch.bincount(assignment, distance.double().sqrt(), minlength=len(sizes))
    phi = total / sizes / (sizes.double() + 10).log()
    phi = torch.where(sizes > 1, phi, phi[sizes > 1].max() if (sizes > 1).any() else 0.0)
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    mean = phi.mean()
    phi = phi * (temperature / mean) if mean > 0 else torch.full_like(phi, temperature)
    return phi.float().to(clusters.centroids.device)
