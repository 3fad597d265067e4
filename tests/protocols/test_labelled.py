"""Scores, classifiers and crops of the protocols that train on labelled images; their configuration files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from contexts import small
from hydra import compose, initialize_config_dir
from sklearn.datasets import load_digits
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.protocols.classification import accuracies
from twoviews.protocols.finetune import FineTune
from twoviews.protocols.labelled import classifier, crops, labelled, train_classifier
from twoviews.protocols.linear_augmented import LinearAugmented
from twoviews.schedule import Constant


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_accuracies_are_scikit_learns():
    labels = load_digits().target[:300]
    scores = np.random.default_rng(0).normal(size=(300, 10)) + 1.5 * np.eye(10)[labels]
    found = accuracies(torch.from_numpy(scores).float(), torch.from_numpy(labels).long())
    expected = {f"top{k}": 100 * top_k_accuracy_score(labels, scores, k=k) for k in (1, 5)}
    assert found == pytest.approx(expected)
    assert found["top1"] < found["top5"]


def test_no_top5_of_five_classes():
    assert accuracies(torch.eye(5), torch.arange(5)) == {"top1": 100.0}


def test_classifier_is_a_function_of_its_key():
    torch.manual_seed(0)
    one = classifier(500, 10, torch.device("cpu"), 1)
    torch.manual_seed(1)
    assert torch.equal(one.weight, classifier(500, 10, torch.device("cpu"), 1).weight)
    assert not torch.equal(one.weight, classifier(500, 10, torch.device("cpu"), 2).weight)
    assert one.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not one.bias.any()


def test_crops_are_clamped_and_whole_pictures_are_the_eval_transform():
    context = small(30)
    memory, _ = labelled(context)
    loader, notes = crops(context, memory, 64, smallest_crop=1.0, flip=0.0, seed=0)
    assert loader.batch_size == 30
    assert notes == ["batch_size=64 is larger than the 30 images: batches have 30."]
    (batch,) = loader
    data = context.data
    whole = eval_view(memory.pixels, memory.sizes, size=32, crop=1.0, mean=data.mean, std=data.std)
    torch.testing.assert_close(batch.views[0], whole[batch.index])
    loader, notes = crops(context, memory, 30, smallest_crop=0.3, flip=0.0, seed=0)
    assert notes == []
    (batch,) = loader
    assert (batch.views[0] - whole[batch.index]).abs().mean() > 0.1


def test_data_without_labels_are_refused_in_a_sentence():
    context = small(30)
    context.data = replace(context.data, memory=None, test=None)
    with pytest.raises(BadInput, match="digits has no labelled images"):
        labelled(context)


def test_a_diverging_training_is_refused_with_its_epoch():
    context = small(30)
    head = classifier(32 * 32, 10, context.device, 0)
    loader, _ = crops(context, labelled(context)[0], 10, 1.0, 0.0, 0)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e38)
    with pytest.raises(BadInput, match=r"diverged in epoch 1 .* learning rate of 1e\+38; use a smaller lr"):
        train_classifier(lambda x: head(x.flatten(1)), loader, optimizer, Constant(), 3, context)


@pytest.mark.parametrize(
    "name",
    ["linear_sgd", "linear_moco", "linear_simsiam", "linear_swav", "finetune", "few_labels", "few_labels_finetune"],
)
def test_configurations_pass_the_check_and_build(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", [f"protocol=[{name}]"])
    check("train", cfg)
    ((key, node),) = cfg.protocol.items()
    assert key == name.removesuffix("_finetune")
    protocol = build(node)
    assert protocol.every_epochs == 0
    if name.startswith("linear_") and name != "linear_sgd":
        assert type(protocol) is LinearAugmented
    if name.startswith("few_labels"):
        assert isinstance(protocol.finetune, FineTune) == name.endswith("finetune")
