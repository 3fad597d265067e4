"""The two computations of k-means over all points: faiss on a CPU, matrix products on a GPU.

Shapes: N points, D dimensions, K clusters. Letters: x points, c centroids.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 128 * 2**20  # of products of points and centroids held in memory


@dataclass(frozen=True)
class Passes:
    """The two computations over all points, implemented for one kind of device."""

    nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x, c -> squared distance [N], nearest centroid [N]
    sums: Callable[[Tensor, Tensor, int], Tensor]  # x, assignment, K -> sum of the rows of each cluster [K, D]


def passes_on(device: torch.device) -> Passes:
    """The implementation for a device: faiss on a CPU, matrix products on a GPU.

    faiss's own search on a GPU is such a product as well, and needs a build of its own with libraries of CUDA 12.
    """
    return by_products() if device.type == "cuda" else by_faiss()


def by_faiss() -> Passes:
    """faiss's exact search, for points on the CPU."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports which instruction sets it has tried
    import faiss  # here: some builds crash if they are loaded before torch, or hang in a process forked after

    faiss.omp_set_num_threads(torch.get_num_threads())  # it counts threads of its own

    def nearest(x: Float[Tensor, "N D"], c: Float[Tensor, "K D"]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(c.numpy())
        distance, assignment = index.search(x.numpy(), 1)
        return torch.from_numpy(distance[:, 0]), torch.from_numpy(assignment[:, 0])

    def sums(x: Float[Tensor, "N D"], assignment: Int[Tensor, " N"], k: int) -> Float[Tensor, "{k} D"]:
        return x.new_zeros(k, x.shape[1]).index_add_(0, assignment, x)

    return Passes(nearest, sums)


def by_products() -> Passes:
    """Matrix products in float32 without TF32, and sums over sorted rows; for any device, without synchronizing with it.

    Up to CHUNK_BYTES of products are in memory. No sum depends on the order of threads: rows are added in the order that
    they have in `x`, as on a CPU.
    """

    def nearest(x: Float[Tensor, "N D"], c: Float[Tensor, "K D"]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
        # About their mean, because |x|^2 - 2 x c + |c|^2 has few digits where all lie in one direction, as young embeddings do.
        centre = x.mean(0)
        c, near, which = c - centre, [], []
        half = c.square().sum(1) / -2
        with _full_precision():
            for rows in x.split(max(1, CHUNK_BYTES // (4 * len(c)))):
                rows = rows - centre
                value, number = torch.addmm(half, rows, c.T).max(dim=1)  # x c - |c|^2 / 2
                near.append(rows.square().sum(1) - 2 * value)
                which.append(number)
        return torch.cat(near).clamp_(min=0), torch.cat(which)

    def sums(x: Float[Tensor, "N D"], assignment: Int[Tensor, " N"], k: int) -> Float[Tensor, "{k} D"]:
        order = assignment.argsort(stable=True)
        lengths = sizes_of(assignment, k)
        return torch.segment_reduce(x[order], "sum", lengths=lengths, axis=0, unsafe=True)  # unsafe: no check, no wait

    return Passes(nearest, sums)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 on a GPU without TF32, whose 10 bits of mantissa would move points between clusters."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sizes_of(assignment: Int[Tensor, " N"], k: int) -> Int[Tensor, " {k}"]:
    """Number of points in each cluster; bincount would synchronize with the device."""
    return assignment.new_zeros(k).index_add_(0, assignment, torch.ones_like(assignment))
