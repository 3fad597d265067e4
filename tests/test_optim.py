"""Each optimizer against a loop that applies its formula to one parameter after the other."""

import copy
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from twoviews.muon import muon, orthogonalised
from twoviews.optim import LARC, LARS, adamw, larc, lars, scaled_lr, sgd

RATES = [0.5, 0.5, 0.05, 0.7]  # the schedule changes the rate between steps


def weights() -> list[nn.Parameter]:
    """A matrix, a kernel, a vector, and one that is zero."""
    torch.manual_seed(0)
    shapes = [(4, 3), (2, 3, 3, 3), (5,), (2, 2)]
    values = [torch.randn(shape) for shape in shapes[:-1]] + [torch.zeros(shapes[-1])]
    return [nn.Parameter(value) for value in values]


def gradients(step: int) -> list[torch.Tensor]:
    """One is zero in the first two steps, one is missing in the second."""
    drawn = torch.Generator().manual_seed(step)
    found = [torch.randn(p.shape, generator=drawn) for p in weights()]
    if step < 2:
        found[0].zero_()
    return found


def run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: Sequence[int] = (0, 1, 2, 3)
) -> list[torch.Tensor]:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients(step), strict=True)):
            parameter.grad = None if (step, number) == (1, 1) else gradient
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def lars_by_loop(decay: float, momentum: float, eta: float, adapt: bool) -> list[torch.Tensor]:
    """google-research/simclr, lars_optimizer.py: the learning rate is inside the momentum."""
    found = []
    for number, w in enumerate(p.detach().clone() for p in weights()):
        v = torch.zeros_like(w)
        for step, lr in enumerate(RATES):
            if (step, number) == (1, 1):
                continue
            g = gradients(step)[number] + decay * w
            w_norm, g_norm = w.square().sum().sqrt().item(), g.square().sum().sqrt().item()
            trust = eta * w_norm / g_norm if adapt and w_norm > 0 and g_norm > 0 else 1.0
            v = momentum * v + lr * trust * g
            w = w - v
        found.append(w)
    return found


def larc_by_loop(decay: float, momentum: float, eta: float, clip: bool) -> list[torch.Tensor]:
    """apex's LARC around SGD: the learning rate is outside the momentum; no decay where a norm is zero."""
    found = []
    for number, w in enumerate(p.detach().clone() for p in weights()):
        v = torch.zeros_like(w)
        for step, lr in enumerate(RATES):
            if (step, number) == (1, 1):
                continue
            g = gradients(step)[number]
            w_norm, g_norm = w.square().sum().sqrt().item(), g.square().sum().sqrt().item()
            if w_norm != 0 and g_norm != 0:
                rate = eta * w_norm / (g_norm + w_norm * decay + 1e-8)
                g = (g + decay * w) * (min(rate / lr, 1) if clip else rate)
            v = momentum * v + g
            w = w - lr * v
        found.append(w)
    return found


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_against_a_loop(decay):
    parameters = weights()
    found = run(LARS(parameters, lr=9, momentum=0.9, weight_decay=decay, trust_coefficient=0.1), parameters)
    for value, expected in zip(found, lars_by_loop(decay, 0.9, 0.1, adapt=True), strict=True):
        torch.testing.assert_close(value, expected)


def test_lars_without_adaptation_is_momentum_with_the_rate_inside():
    parameters = weights()
    groups = [{"params": parameters, "adapt": False}]
    found = run(LARS(groups, lr=9, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1), parameters)
    for value, expected in zip(found, lars_by_loop(0.1, 0.9, 0.1, adapt=False), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_larc_against_a_loop(decay, clip):
    parameters = weights()
    optimizer = LARC(parameters, lr=9, momentum=0.9, weight_decay=decay, trust_coefficient=0.1, clip=clip)
    found = run(optimizer, parameters)
    for value, expected in zip(found, larc_by_loop(decay, 0.9, 0.1, clip), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", [LARS, LARC])
def test_resuming_is_bitwise(kind):
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters, lr=9, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1)

    parameters = weights()
    expected = run(make(parameters), parameters)
    first = weights()
    optimizer = make(first)
    run(optimizer, first, range(2))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = run(resumed, second, range(2, len(RATES)))
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("lr", "scaling", "batch_size", "expected"),
    [
        (0.03, "linear", 512, 0.06),  # MoCo's CIFAR demo
        (0.3, "linear", 4096, 4.8),  # SimCLR, sec. 2.2
        (0.075, "sqrt", 4096, 4.8),  # SimCLR, app. B.1
        (4.8, "none", 4096, 4.8),  # SwAV
    ],
)
def test_papers_learning_rates(lr, scaling, batch_size, expected):
    assert scaled_lr(lr, scaling, batch_size) == pytest.approx(expected)


MAKERS = {
    "sgd": lambda groups, exclude: sgd(groups, 512, 0.03, "linear", 0.9, 0.1, exclude),
    "adamw": lambda groups, exclude: adamw(groups, 512, 0.03, "linear", 0.9, 0.95, 0.1, exclude),
    "lars": lambda groups, exclude: lars(groups, 512, 0.03, "linear", 0.9, 0.1, 0.001, exclude),
    "larc": lambda groups, exclude: larc(groups, 512, 0.03, "linear", 0.9, 0.1, 0.001, exclude, False),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("exclude", [True, False])
def test_which_parameters_are_decayed_and_adapted(name, exclude):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    predictor = nn.Linear(2, 2)
    groups = [{"params": list(network.parameters())}, {"params": list(predictor.parameters()), "fixed_lr": True}]
    optimizer = MAKERS[name](groups, exclude)
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    everything = {**dict(network.named_parameters()), **{f"p.{k}": v for k, v in predictor.named_parameters()}}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(where) == len(everything)
    excluded = {"0.bias", "1.weight", "1.bias", "2.bias", "p.bias"}
    for key, parameter in everything.items():
        group = where[id(parameter)]
        out = exclude and key in excluded
        assert group["lr"] == 0.06
        assert group["weight_decay"] == (0.0 if out else 0.1), key
        assert bool(group.get("fixed_lr")) is key.startswith("p."), key
        if name in ("lars", "larc"):
            assert group["adapt"] is not out, key
    if name == "adamw":
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    else:
        assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_excluded_parameters_take_plain_steps():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = lars([{"params": [weight, bias]}], 256, 1.0, "linear", 0.0, 0.5, 0.001, True)
    weight.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.zeros(2))  # 1 - lr * 1
    # |w| = 2, gradient 1 + 0.5 everywhere with norm 3: 0.001 * 2 / 3 * 1.5 = 0.001.
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.999))


def test_sgd_is_torchs_on_all_parameters():
    """MoCo and SimSiam decay norms and biases as well."""
    parameters = weights()
    found = run(sgd([{"params": parameters}], 256, 1.0, "none", 0.9, 0.1, False), parameters)
    reference = weights()
    expected = run(torch.optim.SGD(reference, lr=1.0, momentum=0.9, weight_decay=0.1), reference)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


def test_adamw_takes_whole_numbers():
    """beta1=0 on a command line is one, and torch takes two of a kind."""
    parameters = weights()
    for weight in run(adamw([{"params": parameters}], 256, 1, "none", 0, 0.99, 0, False), parameters):
        assert weight.isfinite().all()


def test_adamw_is_torchs():
    parameters = weights()
    found = run(adamw([{"params": parameters}], 256, 1.0, "none", 0.9, 0.99, 0.1, False), parameters)
    reference = weights()
    expected = run(torch.optim.AdamW(reference, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1), reference)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


UNSHIELDED = """
import sys, torch
from twoviews.muon import muon, orthogonalised
from twoviews.optim import LARC, LARS
from twoviews.torch_optimizers import LBFGS, SGD, AdamW

for kind, numbers in ((SGD, {}), (AdamW, {}), (LBFGS, {}), (LARS, (0.1, 0.9, 0.1, 0.1)), (LARC, (0.1, 0.9, 0.1, 0.1))):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = kind([weight], *numbers) if numbers else kind([weight], lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    loss()
    optimizer.step(loss)
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.detach().norm() < 2
sys.exit("torch._dynamo" in sys.modules)
"""


def test_no_optimizer_imports_the_compiler():
    """It takes as long as all other torch, between the command and the first step."""
    assert subprocess.run([sys.executable, "-c", UNSHIELDED]).returncode == 0


def test_muon_against_torch():
    """torch.optim.Muon rounds to bf16, which the iteration nearly forgets; it takes matrices, as which filters are viewed."""
    ours = [weight for weight in weights() if weight.ndim > 1 and weight.any()]
    theirs = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    drawn = torch.Generator().manual_seed(1)
    optimizer = muon(
        [{"params": ours}], 256, 0.1, "none", momentum=0.9, iterations=5, beta1=0.9, beta2=0.999, weight_decay=0.5
    )
    options = {"nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.5, ns_steps=5, **options)
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=drawn)
            other.grad = own.grad.flatten(1).clone()
        optimizer.step()
        reference.step()
        for own, other in zip(ours, theirs, strict=True):
            assert own.grad is not None
            torch.testing.assert_close(own.flatten(1), other, atol=5e-3, rtol=0)


def test_muon_takes_adamw_for_norms_and_biases():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizer = muon([{"params": list(layers[0].parameters())}], 256, 0.1, "none", 0.9, 5, 0.9, 0.99, weight_decay=0.5)
    vectors = [p for p in layers[1].parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(vectors, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        for own, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    for own, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(own, other) == (own.ndim == 1)


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 8, 30), (2, 30, 8), (1, 1, 5)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape), 5, torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalised(torch.zeros(1, 4, 4), 5, torch.float32).any()
