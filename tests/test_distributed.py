"""Two processes against one: the exchanges themselves, the losses, the batch norms, and whole methods."""

import platform
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assembled import DIFFERENT_CODE, batch_of, build, config, in_processes, step
from conftest import start
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twoviews import distributed
from twoviews.backbones import ResNet
from twoviews.batch_norms import SplitBatchNorm, SyncBatchNorm
from twoviews.data.sources import digits
from twoviews.distributed import local_rows
from twoviews.features import embed
from twoviews.methods.barlow import cross_correlation, redundancy_reduction
from twoviews.methods.byol import regression_loss
from twoviews.methods.dino import self_distillation
from twoviews.methods.lejepa import invariance, random_directions, sigreg
from twoviews.methods.moco import info_nce
from twoviews.methods.moco_v3 import in_batch_info_nce
from twoviews.methods.nnclr import nearest, neighbour_info_nce
from twoviews.methods.simclr import nt_xent
from twoviews.methods.simsiam import negative_cosine
from twoviews.methods.vicreg import covariance_matrix, covariance_term, variance_term
from twoviews.protocols import knn
from twoviews.protocols.knn import KNN
from twoviews.protocols.linear import Linear
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, run_protocols
from twoviews.step import TrainStep

N, D = 8, 5


def batch() -> list[torch.Tensor]:
    """Two embeddings of the whole batch, and a queue."""
    drawn = torch.Generator().manual_seed(0)
    return [nn.functional.normalize(torch.randn(rows, D, generator=drawn), dim=1) for rows in (N, N, 11)]


LOSSES = {
    "nt_xent": lambda a, b, queue: nt_xent(a, b, 0.2),
    "info_nce": lambda a, b, queue: info_nce(a, b.detach(), queue, 0.2),
    "in_batch_info_nce": lambda a, b, queue: in_batch_info_nce(a, b, 0.2),
    "self_distillation": lambda a, b, queue: self_distillation(torch.stack([a, b]), b.softmax(1)[None].detach(), 0.2),
    "negative_cosine": lambda a, b, queue: negative_cosine(a, b),
    "regression_loss": lambda a, b, queue: regression_loss(a, b.detach()),
    "neighbour_info_nce": lambda a, b, queue: neighbour_info_nce(queue[nearest(a, queue)], b, 0.2),
    "lejepa": lambda a, b, queue: lejepa(torch.stack([a, b])),
    "redundancy_reduction": lambda a, b, queue: redundancy_reduction(cross_correlation(a, b), 0.5),
    "variance_term": lambda a, b, queue: variance_term(covariance_matrix(a)),
    "covariance_term": lambda a, b, queue: covariance_term(covariance_matrix(a)),
}
IN_MICRO_BATCHES = ["simclr", "moco_symmetric", "moco_v3", "dino", "swav", "deepcluster_v2", "nnclr", "lejepa"]
NORMS = {"sync": lambda: SyncBatchNorm(3), "split2": lambda: split(2), "split4": lambda: split(4)}


def lejepa(z: torch.Tensor) -> torch.Tensor:
    """With another seed in each process, as in training: the directions are the first one's."""
    torch.manual_seed(distributed.rank())
    return sigreg(z, random_directions(D, 6, z.device)) + invariance(z, z)


def split(splits: int) -> SplitBatchNorm:
    norm = SplitBatchNorm(3)
    norm.splits = splits
    return norm


def exchanges() -> dict[str, object]:
    """What each exchange gives this process."""
    rank, whole = distributed.rank(), torch.arange(2 * N * 3.0).view(2 * N, 3)
    pictures = torch.arange(4 * 3 * 5 * 5.0).view(4, 3, 5, 5)
    in_channels_last = distributed.gather(local_rows(pictures.to(memory_format=torch.channels_last)))
    mine = torch.full((2,), 1.0 + rank, requires_grad=True)
    total = distributed.sum_with_gradient(mine)
    (total * (3.0 + rank)).sum().backward()
    value = torch.tensor([float(rank)])
    return {
        "processes": distributed.processes(),
        "local_rows": local_rows(whole),
        "gather": distributed.gather(local_rows(whole)),
        "gather_pictures": distributed.gather(local_rows(pictures)),
        "gather_channels_last": in_channels_last.contiguous(),
        "kept_channels_last": in_channels_last.is_contiguous(memory_format=torch.channels_last),
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
    wrapped = None
    if distributed.processes() > 1:
        wrapped = DistributedDataParallel(parts.method, broadcast_buffers=False, gradient_as_bucket_view=True)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        for key, parameter in parts.method.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(key, parameter.grad.clone())

    parts.optimizer.register_step_pre_hook(keep)
    losses = [distributed.mean(step(parts, number, wrapped=wrapped)) for number in range(2)]
    return {"losses": torch.stack(losses), "gradients": gradients, "state": parts.method.state_dict()}


def train_in_micro_batches(name: str) -> dict[str, object]:
    """Losses of two steps of two micro-batches, and the state after them."""
    parts = build(config(name, "runtime.accumulate=2"))
    parts.method.train()
    taken = TrainStep(parts.method, parts.optimizer, parts.runtime, parts.device, print)
    shared = {"lr_factor": 1.0, "steps": len(parts.loader), "epochs": 4}
    losses = [taken(batch_of(parts, number), seed=number, step=number, **shared)["loss"] for number in range(2)]
    return {"losses": distributed.mean(torch.stack(losses)), "state": parts.method.state_dict()}


class Counted(KNN):
    """Says how many queries this process had to search."""

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        self.queries = sum(
            which.stop - which.start
            for which, *_ in knn.neighbours(context.test.x, context.memory.x, 5, shared=context.shared)
        )
        return super().__call__(context)


class Alone(Protocol):
    """Wants features that nobody has asked for before."""

    needs_labels, every_epochs = False, 0

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        return EvaluationResult({"mean": context.test.x.mean().item()})


def evaluated() -> dict[str, object]:
    """What protocols find of an untrained encoder, and how many queries were searched here."""
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=4)
    parts = build(config("moco"))
    small = {name: getattr(parts.data, name).subset(torch.arange(n)) for name, n in (("memory", 500), ("test", 200))}
    parts.data = replace(parts.data, **small)
    chunk, knn.CHUNK_BYTES = knn.CHUNK_BYTES, 500 * 4 * 30  # 7 chunks of queries
    counted = Counted(20, 0.1, 0)
    one = parts.evaluation_context(encoder)
    both = run_protocols({"linear": Linear([1e-3], 0.1, 5, 0), "knn": counted}, one)
    alone = run_protocols({"alone": Alone()}, parts.evaluation_context(encoder))
    knn.CHUNK_BYTES = chunk
    return {
        "values": {name: result.values for name, result in both.items()},
        "probabilities": both["knn"].probabilities if both else None,
        "features": one.memory.x,
        "alone": [result.values for result in alone.values()],
        "queries": counted.queries,
    }


def everything(methods: list[str], in_micro_batches: list[str]) -> dict[str, dict]:
    both = {
        "methods": {name: train_two_steps(name) for name in methods},
        "micro_batches": {name: train_in_micro_batches(name) for name in in_micro_batches},
    }
    return {"exchanges": exchanges(), "losses": losses(), "norms": norms(), "evaluated": evaluated(), **both}


@pytest.fixture(scope="module")
def two(request, tmp_path_factory) -> list[dict[str, dict]]:
    """What two processes find, of the methods that are to be tested: -k may leave some out."""

    def selected(test: Callable) -> list[str]:
        return [item.callspec.params["name"] for item in request.session.items if item.function is test]

    methods = selected(test_methods_compute_what_one_process_does)
    parts = selected(test_micro_batches_are_those_of_one_process)
    return in_processes(2, tmp_path_factory.mktemp("two"), everything, methods, parts)


def test_rows_are_interleaved_and_come_back(two):
    whole = torch.arange(2 * N * 3.0).view(2 * N, 3)
    for rank, found in enumerate(results["exchanges"] for results in two):
        assert found["processes"] == 2
        assert torch.equal(found["local_rows"], whole[rank::2])
        assert torch.equal(found["gather"], whole)
        pictures = torch.arange(4 * 3 * 5 * 5.0).view(4, 3, 5, 5)
        assert torch.equal(found["gather_pictures"], pictures)
        assert torch.equal(found["gather_channels_last"], pictures) and found["kept_channels_last"]


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


def assert_same_state(one: dict, first: dict, second: dict) -> None:
    """Of both processes bit for bit, and but for rounding that of one process."""
    for key, value in one.items():
        if not value.is_floating_point():  # such as an E-step's assignments
            assert key.endswith("num_batches_tracked") or torch.equal(first[key], value), key
        else:
            off = torch.linalg.vector_norm(first[key].double() - value.double())
            assert off <= 1e-3 * torch.linalg.vector_norm(value.double()) + 1e-4, key
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("name", DIFFERENT_CODE)
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
    assert_same_state(one["state"], *(found["state"] for found in both))


@pytest.mark.parametrize("name", IN_MICRO_BATCHES)
def test_micro_batches_are_those_of_one_process(name, two):
    one, both = train_in_micro_batches(name), [results["micro_batches"][name] for results in two]
    for found in both:
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-4, atol=1e-6)
    assert_same_state(one["state"], *(found["state"] for found in both))


def test_an_encoder_is_evaluated_by_all_processes_as_by_one(two):
    one, first, second = evaluated(), *(results["evaluated"] for results in two)
    for key in ("values", "alone"):
        assert one[key] and first[key] == one[key] and not second[key]
    assert torch.equal(first["probabilities"], one["probabilities"])
    assert torch.equal(first["features"], one["features"]) and torch.equal(second["features"], one["features"])
    assert one["queries"] == first["queries"] + second["queries"] == 210  # slices of 30 reach over the end
    assert first["queries"] == 120


MEETING = """
import os, sys, time
import torch
from twoviews import distributed, process_group
from twoviews.runtime import Runtime
process_group.TIMEOUT_S, process_group.REPORT_S = 3, 5
values = dict(zip(Runtime.__dataclass_fields__, [None] * 20)) | {"device": "cpu"}
rank = distributed.rank()
with process_group.group(Runtime(**values).torch_device()) as device:
    process_group.barrier()
    exec(sys.argv[1])
    print("there")
"""
ABSENT = {
    "barrier": "if rank == 1: time.sleep(20)\nprocess_group.barrier()",
    "exchange": "if rank == 1: time.sleep(20)\ndistributed.largest(1, device)",
    "frozen": "import signal\nif rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ndistributed.largest(1, device)",
}


def meet(program: str, folder: Path) -> list[subprocess.Popen]:
    """Three processes that do this, beginning at once; the first to end among 0 and 2 has 30 seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(["-c", MEETING, program], folder / str(rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(3)
    ]


@pytest.mark.parametrize("program", ABSENT.values(), ids=ABSENT)
def test_a_process_that_does_not_come_is_named(program: str, tmp_path: Path):
    children = meet(program, tmp_path)
    try:
        assert [child.wait(40) for child in (children[0], children[2])] == [1, 1]
    finally:
        children[1].kill()
    said = [(tmp_path / str(rank) / "stderr.txt").read_text() for rank in range(3)]
    errors = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"process 1 on {platform.node()} did not come" in errors[0]
    assert "error: " not in said[2] and "Traceback" not in said[0] + said[2]


def test_a_process_that_is_killed_is_no_traceback(tmp_path: Path):
    """In the middle of an exchange, where torch says that a connection was lost."""
    children = meet(
        "import signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ndistributed.largest(1, device)", tmp_path
    )
    assert [child.wait(60) for child in children] == [1, -9, 1]
    for rank in (0, 2):
        said = (tmp_path / str(rank) / "stderr.txt").read_text()
        assert said.count("error: another process has ended") == 1 and "Traceback" not in said


def test_what_the_first_does_alone_may_take_long(tmp_path: Path):
    children = meet("if rank == 0: time.sleep(6)\nprocess_group.wait_for_first()\nprocess_group.barrier()", tmp_path)
    assert [child.wait(40) for child in children] == [0, 0, 0], (tmp_path / "1" / "stderr.txt").read_text()


def test_nobody_waits_for_a_first_that_failed(tmp_path: Path):
    children = meet("if rank == 0: raise ValueError('broken image')\nprocess_group.wait_for_first()", tmp_path)
    begin = time.monotonic()
    assert [child.wait(40) for child in children] == [1, 1, 1]
    assert "broken image" in (tmp_path / "0" / "stderr.txt").read_text()
    assert time.monotonic() - begin < 30


def test_the_others_leave_after_the_first(tmp_path: Path):
    children = meet("if rank == 0: time.sleep(3); open('done', 'w').close()", tmp_path)
    assert children[1].wait(40) == 0 and (tmp_path / "0" / "done").exists()
    assert [child.wait(40) for child in children] == [0, 0, 0], (tmp_path / "1" / "stderr.txt").read_text()


def test_alone_everything_is_the_identity():
    x = torch.randn(4, 3, requires_grad=True)
    assert distributed.processes() == 1
    for function in (distributed.gather, distributed.gather_with_gradient, distributed.sum_with_gradient, local_rows):
        assert function(x) is x
    assert torch.equal(distributed.mean(x), x)
    assert distributed.largest(5, torch.device("cpu")) == 5


def _features_of_few(count: int) -> torch.Tensor:
    data = digits()
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1], width=4, stem="strided")
    images = data.train.subset(torch.arange(count))
    return embed(encoder, images, data, torch.device("cpu"), torch.float32, channels_last=True, shared=True)


def test_features_of_fewer_batches_than_processes(tmp_path: Path) -> None:
    """One process has a batch and the other none."""
    one, other = in_processes(2, tmp_path, _features_of_few, 40)
    torch.testing.assert_close(one, _features_of_few(40))
    assert torch.equal(one, other)
