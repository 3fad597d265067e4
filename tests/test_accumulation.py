"""Micro-batches against the whole batch: what a step changes, once a step; what may differ is said, and nothing else does."""

import pytest
import torch
from assembled import DIFFERENT_CODE, batch_of, build, config
from torch import nn

from twoviews.assembly import Parts
from twoviews.errors import BadInput
from twoviews.step import TrainStep, Values

SGD = ["optimizer=sgd", "optimizer.lr=0.05", "optimizer.lr_scaling=none"]


FORGOTTEN = (
    "losses of micro-batches are not those of the whole batch: if the loss of an image depends on others of its forward pass, "
    "say in the class {} what it takes from them, as in within_batch = 'negatives'; otherwise the loss is no mean over images"
)


def trained(name: str, accumulate: int, steps: int) -> tuple[Parts, list[Values]]:
    """After so many steps with batch norms that do not depend on the batch; what each step said."""
    parts = build(config(name, *SGD, f"runtime.accumulate={accumulate}"))
    parts.method.train()
    for module in parts.method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    step = TrainStep(parts.method, parts.optimizer, parts.runtime, parts.device, print)
    shared = {"lr_factor": 1.0, "steps": len(parts.loader), "epochs": 4}
    return parts, [step(batch_of(parts, number), seed=number, step=number, **shared) for number in range(steps)]


@pytest.mark.parametrize("name", DIFFERENT_CODE)
def test_steps_are_those_of_the_whole_batch_unless_the_method_says_what_is_not(name):
    (whole, expected), (parts, found) = (trained(name, accumulate, steps=6) for accumulate in (1, 2))
    losses = [[values["loss"].item() for values in one] for one in (expected, found)]
    if whole.method.within_batch:
        assert losses[1][0] != pytest.approx(losses[0][0], rel=1e-5), (
            f"losses of micro-batches are those of the whole batch: remove within_batch={whole.method.within_batch!r}"
        )
        return
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), FORGOTTEN.format(type(whole.method).__name__)
    state = parts.method.state_dict()
    for key, value in whole.method.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", DIFFERENT_CODE)
def test_a_step_leaves_the_whole_batch_in_queues_and_banks(name):
    """Of any method: in the first step, embeddings of micro-batches are made with the same weights."""
    (whole, _), (parts, _) = (trained(name, accumulate, steps=1) for accumulate in (1, 2))
    buffers = dict(parts.method.named_buffers())
    for key, value in whole.method.named_buffers():
        torch.testing.assert_close(buffers[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", DIFFERENT_CODE)
def test_forward_passes_give_rows_of_their_images_and_change_nothing(name):
    parts = build(config(name))
    parts.method.eval()
    batch = batch_of(parts, 0)
    before = {key: value.clone() for key, value in parts.method.named_buffers()}
    output = parts.method(batch.views, batch.index)
    for key, rows in output.rows.items():
        assert len(rows) == len(batch.index) and not rows.requires_grad, key
    for key, value in parts.method.named_buffers():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["simsiam", "swav"])
def test_loss_and_metrics_are_means_over_micro_batches(name):
    parts, (values,) = trained(name, 4, steps=1)
    fresh, _ = trained(name, 4, steps=0)
    batch = batch_of(parts, 0)
    outputs = [
        fresh.method([view[start : start + 4] for view in batch.views], batch.index[start : start + 4])
        for start in range(0, 16, 4)
    ]
    expected = [{"loss": output.loss.detach(), **output.metrics} for output in outputs]
    assert values.keys() == expected[0].keys()
    for key, value in values.items():
        torch.testing.assert_close(value, torch.stack([one[key] for one in expected]).mean(), msg=key)


@pytest.mark.parametrize(
    ("name", "overrides", "what"),
    [
        ("simclr", [], "negatives and batch-norm statistics come from the 4 images of a micro-batch, not from all 16"),
        ("swav", [], "codes and batch-norm statistics come"),
        ("nnclr", [], "negatives and batch-norm statistics come"),
        ("lejepa", [], "characteristic functions and batch-norm statistics come"),
        ("pcl", [], "prototypes of other images and batch-norm statistics come"),
        ("byol", [], "batch-norm statistics come"),
        ("barlow", [], "correlations and batch-norm statistics come"),
        ("vicreg", [], "variances, covariances and batch-norm statistics come"),
        ("moco_plain_norms", [], "batch-norm statistics come"),
        ("moco_v3", [], "negatives and batch-norm statistics come"),
        ("dino", [], "batch-norm statistics come"),
        ("deepcluster_v2", [], "batch-norm statistics come"),
    ],
)
def test_what_differs_is_said_in_a_sentence(name, overrides, what):
    norms = ["method.bn_splits=1"] if name == "pcl" else []
    assert not [note for note in build(config(name, *norms, *overrides)).notes if "micro-batch" in note]
    notes = build(config(name, *norms, *overrides, "runtime.accumulate=4")).notes
    (said,) = [note for note in notes if "micro-batch" in note]
    assert said.startswith(f"runtime.accumulate=4: {what}")


LIMITS = [
    ("moco", ["method.queue_size=12"], "queue_size=12 .* 16 keys"),
    ("moco_symmetric", ["method.queue_size=16"], "queue_size=16 .* 32 keys"),
    ("swav", ["method.queue_size=12"], "queue_size=12 .* 16 images of one step"),
    ("nnclr", ["method.queue_size=12"], "queue_size=12 .* 16 images of one step"),
    ("deepcluster_v2", ["method.clusters=[1430]"], "clusters=.1430. .* at most 1424"),
    ("moco", ["runtime.accumulate=4"], "bn_splits=4 .* batch_size=16 / runtime.accumulate=4 .* batch_size=32 or"),
    ("pcl", ["runtime.accumulate=4"], "bn_splits=4 .* batch_size=32 or"),
]


@pytest.mark.parametrize(("name", "overrides", "sentence"), LIMITS, ids=[name for name, *_ in LIMITS])
def test_queues_and_clusters_fit_the_whole_batch_and_parts_the_micro_batch(name, overrides, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(config(name, "runtime.accumulate=2", *overrides))
