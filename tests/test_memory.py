"""Networks are counted on torch's meta device, whatever their constructors draw."""

import torch
from torch import nn

from twoviews.memory import TooLarge, check_networks

CPU = torch.device("cpu")


class Drawn(nn.Module):
    """Draws as constructors of users do: from a generator of their own, and on a device that they name."""

    def __init__(self, rows: int):
        super().__init__()
        self.register_buffer("rows", torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)))
        self.order = torch.rand(8, generator=torch.Generator().manual_seed(0), device="cpu").argsort().tolist()


def test_random_numbers_of_a_constructor() -> None:
    made = []

    def make() -> nn.Module:
        made.append(Drawn(3))
        return made[-1]

    check_networks(make, CPU, "rows=3")  # type: ignore[arg-type]
    assert made[0].rows.is_meta and made[0].order == Drawn(3).order


def test_too_many_are_refused() -> None:
    try:
        check_networks(lambda: Drawn(10**13), CPU, "rows=10**13")  # type: ignore[arg-type, return-value]
    except TooLarge as error:
        assert "rows=10**13" in str(error)
    else:
        raise AssertionError("160 TB")
