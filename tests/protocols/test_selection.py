"""The largest numbers of each row, in both forms."""

import pytest
import torch

from twoviews import compiled
from twoviews.protocols.selection import SOURCE, largest


@pytest.fixture(autouse=True, params=["compiled", "tensors"])
def form(request, monkeypatch) -> str:
    """Both have to pass everything here."""
    compiled.library.cache_clear()
    monkeypatch.setenv("TWOVIEWS_KERNEL", "1" if request.param == "compiled" else "0")
    assert (compiled.library(SOURCE) is None) == (request.param == "tensors"), "no C compiler: cc"
    yield request.param
    compiled.library.cache_clear()


@pytest.mark.parametrize(
    ("columns", "k"),
    [(50000, 200), (5000, 3), (5000, 1), (3001, 50), (1000, 1000), (1000, 999), (97, 6), (4, 1), (1, 1)],
)
def test_is_topk(columns, k):
    made = torch.Generator().manual_seed(columns + k)
    random = torch.randn(6, columns, generator=made)
    equal = torch.randint(0, 9, (6, columns), generator=made).float()
    for x in (random, equal, -random.abs(), random.sort(dim=1).values, torch.zeros(2, columns)):
        values, index = largest(x, k)
        assert torch.equal(values, x.topk(k, dim=1).values)
        assert torch.equal(x.gather(1, index), values)
        assert all(len(row.unique()) == k for row in index)  # also where many are equal


def test_equal_numbers_come_in_the_order_of_their_columns(form):
    x = torch.randint(0, 5, (4, 3000), generator=torch.Generator().manual_seed(0)).float()
    x[0, :100] = -0.0  # no less than 0
    _, index = largest(x, 800)
    if form == "compiled":
        assert torch.equal(index, x.sort(dim=1, descending=True, stable=True).indices[:, :800])


def test_infinite_numbers_and_what_is_none():
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    x[0, 7], x[1] = torch.inf, -torch.inf
    values, _ = largest(x, 20)
    assert torch.equal(values, x.topk(20, dim=1).values)
    for nans in (1, 490):  # topk puts them first
        x[2, :nans] = torch.nan
        assert torch.equal(largest(x, 20)[0].nan_to_num(9), x.topk(20, dim=1).values.nan_to_num(9))


def test_rows_that_are_not_contiguous_and_none():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(2)).T
    assert torch.equal(largest(x, 5)[0], x.topk(5, dim=1).values)
    assert largest(x[:0], 5)[1].shape == (0, 5)


def test_threads_share_the_rows():
    x, before = torch.randn(9, 2000, generator=torch.Generator().manual_seed(3)), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        four = largest(x, 40)
        torch.set_num_threads(1)
        one = largest(x, 40)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], four[0]) and torch.equal(one[1], four[1])
