"""Tent against its steps written out."""

import copy
import math

import torch
from adapting import LINEAR, context, probe, views

from twoviews.protocols.adaptation import Model, entropy
from twoviews.protocols.tent import Tent


def test_entropy_by_a_loop():
    logits = torch.randn(5, 4, dtype=torch.double) * 3
    for row, found in zip(logits.tolist(), entropy(logits).tolist(), strict=True):
        shares = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        assert math.isclose(found, -sum(p * math.log(p) for p in shares), rel_tol=1e-9)


def test_steps_are_those_of_adam_on_scales_and_offsets():
    tent = Tent(LINEAR, ["fog"], [5], None, batch_size=50, seed=0, lr=1e-2, every_epochs=0)
    model = Model(context(), probe())
    classify = tent.start(model)
    encoder, frozen = copy.deepcopy(context().encoder).train(), copy.deepcopy(context().encoder)
    affine = {n: p for n, p in encoder.named_parameters() if "bn" in n or "downsample.1" in n}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in affine.items()}
    entropies = []
    for step, images in enumerate(views(context(), "fog", 5, 50), start=1):
        logits = probe()(encoder(images))
        found = classify(images)
        assert not found.requires_grad
        torch.testing.assert_close(found, logits.detach(), rtol=1e-3, atol=1e-3)  # of before the step
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        entropies.append(loss.item())
        gradients = torch.autograd.grad(loss, list(affine.values()))
        with torch.no_grad():
            for (name, p), g in zip(affine.items(), gradients, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                p -= 1e-2 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    adapted = dict(model.encoder.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name not in affine:
            assert torch.equal(adapted[name], parameter), name
        else:
            torch.testing.assert_close(adapted[name], affine[name].detach(), rtol=1e-2, atol=1e-3)
            assert not torch.equal(adapted[name], parameter), name
    assert entropies[-1] < entropies[0]
