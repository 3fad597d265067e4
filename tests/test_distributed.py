"""Two processes against one: the exchanges themselves, the losses, the batch norms, and whole methods."""

import pytest
import torch
from assembled import METHODS, build, config, in_processes, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twoviews import distributed
from twoviews.distributed import local_rows
from twoviews.layers import SplitBatchNorm, SyncBatchNorm
from twoviews.methods.byol import regression_loss
from twoviews.methods.moco import info_nce
from twoviews.methods.simclr import nt_xent
from twoviews.methods.simsiam import negative_cosine

N, D = 8, 5


def batch() -> list[torch.Tensor]:
    """Two embeddings of the whole batch, and a queue."""
    drawn = torch.Generator().manual_seed(0)
    return [nn.functional.normalize(torch.randn(rows, D, generator=drawn), dim=1) for rows in (N, N, 11)]


LOSSES = {
    "nt_xent": lambda a, b, queue: nt_xent(a, b, 0.2),
    "info_nce": lambda a, b, queue: info_nce(a, b.detach(), queue, 0.2),
    "negative_cosine": lambda a, b, queue: negative_cosine(a, b),
    "regression_loss": lambda a, b, queue: regression_loss(a, b.detach()),
}
NORMS = {"sync": lambda: SyncBatchNorm(3), "split2": lambda: split(2), "split4": lambda: split(4)}


def split(splits: int) -> SplitBatchNorm:
    norm = SplitBatchNorm(3)
    norm.splits = splits
    return norm


def exchanges() -> dict[str, object]:
    """What each exchange gives this process."""
    rank, whole = distributed.rank(), torch.arange(2 * N * 3.0).view(2 * N, 3)
    pictures = torch.arange(4 * 3 * 5 * 5.0).view(4, 3, 5, 5).to(memory_format=torch.channels_last)
    mine = torch.full((2,), 1.0 + rank, requires_grad=True)
    total = distributed.sum_with_gradient(mine)
    (total * (3.0 + rank)).sum().backward()
    value = torch.tensor([float(rank)])
    return {
        "processes": distributed.processes(),
        "local_rows": local_rows(whole),
        "gather": distributed.gather(local_rows(whole)),
        "gather_channels_last": distributed.gather(local_rows(pictures)),
        "sum": total.detach(),
        "sum_gradient": mine.grad,
        "mean": distributed.mean(value),
        "untouched": value,
        "largest": distributed.largest(3 * rank, torch.device("cpu")),
        "from_first": distributed.from_first(torch.tensor([7.0 + rank])),
    }


def losses() -> dict[str, list[torch.Tensor]]:
    """Each loss, averaged over processes, with its gradients, averaged as DistributedDataParallel does."""
    found = {}
    for name, loss in LOSSES.items():
        a, b, queue = batch()
        a.requires_grad_()
        b.requires_grad_()
        value = loss(local_rows(a), local_rows(b), queue)
        value.backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (a, b)]
        found[name] = [distributed.mean(x) for x in (value.detach(), *gradients)]
    return found


def norms() -> dict[str, list[torch.Tensor]]:
    """Output and gradient of the whole batch, gradients of the weights, running statistics."""
    found = {}
    for name, make in NORMS.items():
        norm, drawn = make(), torch.Generator().manual_seed(0)
        for _ in range(2):
            x, goal = (
                torch.randn(N, 3, 2, 2, generator=drawn) * torch.arange(1.0, N + 1)[:, None, None, None] for _ in "ab"
            )
            x = local_rows(x).clone().requires_grad_()
            norm.zero_grad()
            y = norm(x)
            (y * local_rows(goal)).sum().backward()
        rows = [distributed.gather(value.detach()) for value in (y, x.grad)]
        weights = [distributed.mean(value.grad) * distributed.processes() for value in (norm.weight, norm.bias)]
        found[name] = [*rows, *weights, norm.running_mean, norm.running_var]
    return found


def train_two_steps(name: str) -> dict[str, object]:
    """Losses, the first step's gradients, and the state after the second."""
    parts = build(config(name))
    wrapped = DistributedDataParallel(parts.method, broadcast_buffers=False) if distributed.processes() > 1 else None
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        for key, parameter in parts.method.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(key, parameter.grad.clone())

    parts.optimizer.register_step_pre_hook(keep)
    losses = [distributed.mean(step(parts, number, wrapped=wrapped)) for number in range(2)]
    return {"losses": torch.stack(losses), "gradients": gradients, "state": parts.method.state_dict()}


def everything() -> dict[str, dict]:
    methods = {name: train_two_steps(name) for name in METHODS}
    return {"exchanges": exchanges(), "losses": losses(), "norms": norms(), "methods": methods}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, dict]]:
    return in_processes(2, tmp_path_factory.mktemp("two"), everything)


def test_rows_are_interleaved_and_come_back(two):
    whole = torch.arange(2 * N * 3.0).view(2 * N, 3)
    for rank, found in enumerate(results["exchanges"] for results in two):
        assert found["processes"] == 2
        assert torch.equal(found["local_rows"], whole[rank::2])
        assert torch.equal(found["gather"], whole)
        assert torch.equal(found["gather_channels_last"], torch.arange(4 * 3 * 5 * 5.0).view(4, 3, 5, 5))


def test_sums_means_flags_and_broadcasts(two):
    for rank, found in enumerate(results["exchanges"] for results in two):
        assert found["sum"].tolist() == [3, 3]
        assert found["sum_gradient"].tolist() == [7, 7]  # 3 of one process and 4 of the other
        assert found["mean"].tolist() == [0.5]
        assert found["untouched"].tolist() == [rank]
        assert found["largest"] == 3
        assert found["from_first"].tolist() == [7]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_one_processs(name, two):
    for expected, *found in zip(losses()[name], *(results["losses"][name] for results in two), strict=True):
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_are_one_processs(name, two):
    for expected, *found in zip(norms()[name], *(results["norms"][name] for results in two), strict=True):
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_compute_what_one_process_does(name, two):
    one = train_two_steps(name)
    both = [results["methods"][name] for results in two]
    for rank, found in enumerate(both):
        # The second loss has the rounding of the first step in it, which SwAV's codes magnify twentyfold (1 / epsilon).
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-4, atol=1e-6)
        assert found["gradients"].keys() == one["gradients"].keys()
        # Measured against the whole: some gradients are zero but for rounding, such as of a bias ahead of a batch norm.
        whole = torch.stack([gradient.norm() for gradient in one["gradients"].values()]).norm()
        for key, gradient in one["gradients"].items():
            assert (found["gradients"][key] - gradient).norm() / whole < 5e-4, (rank, key)
        for key, value in one["state"].items():
            if not value.is_floating_point():  # such as an E-step's assignments
                assert key.endswith("num_batches_tracked") or torch.equal(found["state"][key], value), (rank, key)
            else:
                off = torch.linalg.vector_norm(found["state"][key].double() - value.double())
                assert off <= 1e-3 * torch.linalg.vector_norm(value.double()) + 1e-4, (rank, key)
    first, second = (found["state"] for found in both)
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_alone_everything_is_the_identity():
    x = torch.randn(4, 3, requires_grad=True)
    assert distributed.processes() == 1
    for function in (distributed.gather, distributed.gather_with_gradient, distributed.sum_with_gradient, local_rows):
        assert function(x) is x
    assert torch.equal(distributed.mean(x), x)
    assert distributed.largest(5, torch.device("cpu")) == 5
