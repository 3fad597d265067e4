"""Fine-tuning against a loop, its layers against what they should be, and the run's own encoder untouched."""

import copy

import pytest
import torch
from contexts import small
from test_labelled import same, state
from torch import nn
from torch.nn import functional as nnf

from twoviews import distributed, optim
from twoviews.backbones import ResNet, Timm
from twoviews.batch_norms import SplitBatchNorm, SyncBatchNorm, split_batch_norms, sync_batch_norms
from twoviews.classifier_file import load_classifier
from twoviews.errors import BadInput
from twoviews.features import Features, embed
from twoviews.protocols import finetune
from twoviews.protocols.classification import accuracies
from twoviews.protocols.encoder_layers import layers
from twoviews.protocols.finetune import FineTune, default_batch_size
from twoviews.protocols.labelled import classifier, crops, labelled
from twoviews.protocols.linear import Linear, held_out
from twoviews.randomness import seed_of


def protocol(**changes) -> FineTune:
    numbers = {"linear": None, "unfreeze_from": None, "layer_decay": 1.0, "epochs": 2, "warmup_epochs": 0}
    numbers |= {"batch_size": 40, "lr": 0.05, "held_out": 0.1}
    numbers |= {"lr_scaling": "none", "momentum": 0.9, "weight_decay": 1e-3, "smallest_crop": 0.6, "flip": 0.0}
    return FineTune(**{**numbers, "seed": 0, "every_epochs": 0, **changes})


def test_layers_of_a_resnet_go_from_input_to_output():
    encoder = ResNet(1, 32, "basic", [2, 1], width=4)
    assert [layer.name for layer in layers(encoder)] == ["conv1", "layer1.0", "layer1.1", "layer2.0"]
    assert layers(encoder)[0].modules == [encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool]


def test_layers_of_a_vision_transformer_are_its_blocks():
    encoder = Timm(1, 32, "vit_tiny_patch16_224")
    found = layers(encoder)
    assert [layer.name for layer in found] == ["patch_embed", *(f"blocks.{number}" for number in range(12))]
    assert any(p is encoder.model.cls_token for p in found[0].parameters)
    assert any(p is encoder.model.norm.weight for p in found[-1].parameters)
    counted = sorted(id(p) for layer in found for p in layer.parameters)
    assert counted == sorted(id(p) for p in encoder.parameters())


@pytest.mark.parametrize(("unfreeze_from", "scales"), [(None, [0.125, 0.25, 0.5, 1]), ("layer1", [0.25, 0.5, 1])])
def test_learning_rates_are_the_closed_form(unfreeze_from, scales, monkeypatch):
    """lr * layer_decay^l, l counted from the classifier, times half a cosine after the warm-up."""
    context, seen = small(80), []

    class Spy(optim.SGD):
        def step(self, *arguments):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(*arguments)

    monkeypatch.setattr(optim, "SGD", Spy)
    numbers = {"layer_decay": 0.5, "epochs": 4, "warmup_epochs": 1, "unfreeze_from": unfreeze_from}
    protocol(**numbers, lr=0.1, lr_scaling="linear")(context)
    base = 0.1 * 40 / 256
    factors = [0, 0.5] + [(1 + torch.cos(torch.tensor(torch.pi * k / 6)).item()) / 2 for k in range(6)]
    torch.testing.assert_close(torch.tensor(seen), base * torch.outer(torch.tensor(factors), torch.tensor(scales)))


def test_it_is_the_loop_that_one_would_write():
    context = small(100)  # 100 / 40: two batches an epoch
    tuned = protocol(layer_decay=0.5)
    made = tuned.fitted(context, context.memory, labelled(context)[0])
    seed = seed_of(0, "finetune")
    loader, _ = crops(context, labelled(context)[0], 40, 0.6, 0.0, seed)
    encoder, head = copy.deepcopy(context.encoder).train(), classifier(16, 10, context.device, seed)
    stem = [*encoder.conv1.parameters(), *encoder.bn1.parameters()]
    groups = [
        {"params": stem, "lr": 0.05 / 8},
        {"params": encoder.layer1.parameters(), "lr": 0.05 / 4},
        {"params": encoder.layer2.parameters(), "lr": 0.05 / 2},
        {"params": head.parameters(), "lr": 0.05},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            nnf.cross_entropy(head(encoder(batch.views[0])), context.data.memory.labels[batch.index]).backward()
            optimizer.step()
            cosine.step()
    assert made.notes == [] and made.temperature == 1
    for name, value in nn.Sequential(encoder, head).state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_runs_own_encoder_is_untouched(training):
    context = small(80)
    context.encoder.train(training)
    before, numbers = state(context.encoder), torch.get_rng_state()
    first = protocol()(context)
    assert same(before, state(context.encoder))
    assert context.encoder.training == training
    assert all(p.requires_grad and p.grad is None for p in context.encoder.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(first.probabilities, protocol()(context).probabilities)
    assert not torch.equal(first.probabilities, protocol(seed=1)(context).probabilities)


@pytest.mark.parametrize(
    ("unfreeze_from", "frozen"),
    [
        (None, []),
        ("layer1", ["conv1", "bn1"]),
        ("layer2", ["conv1", "bn1", "layer1"]),
        ("layer2.0", ["conv1", "layer1"]),
    ],
)
def test_only_what_is_unfrozen_changes(unfreeze_from, frozen):
    context = small(80)
    tuned = protocol(unfreeze_from=unfreeze_from, weight_decay=0.1)
    made = tuned.fitted(context, context.memory, labelled(context)[0])
    before, after = state(context.encoder), state(made.encoder)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    # Running statistics of norms, too.
    names = [name for name in before if name.split(".")[0] in (frozen + ["bn1"] if frozen else [])]
    assert kept == set(names)
    assert len(names) < len(before)


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(
        BadInput, match=r"^unfreeze_from=layer9 is no layer .* Did you mean .*conv1, layer1.0, layer2.0"
    ):
        protocol(unfreeze_from="layer9")(small(20))


def test_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(BadInput, match="warmup_epochs=3"):
        protocol(warmup_epochs=3)


def test_accuracies_are_those_of_the_probabilities():
    context = small(80)
    result = protocol(epochs=1)(context)
    assert result.values == {**accuracies(result.probabilities, context.data.test.labels.long()), "lr": 0.05}
    assert set(result.values) == {"top1", "top5", "lr"}
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(100))


def test_half_precision_of_the_forward_pass_is_the_judgeds(monkeypatch):
    context, seen = small(40), []
    context.dtype = torch.bfloat16
    context.encoder.conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    result = protocol(epochs=1)(context)
    assert set(seen) == {torch.bfloat16}
    assert result.probabilities.dtype == torch.float32


def test_scores_are_of_the_eval_transform_and_mode():
    context = small(80)
    tuned = protocol()
    made = tuned.fitted(context, context.memory, labelled(context)[0])
    x = embed(made.encoder, context.data.test, context.data, context.device, context.dtype)
    scores = tuned.scores(context, made.model, context.data.test)
    torch.testing.assert_close(scores, made.head(x).detach(), rtol=1e-4, atol=1e-5)
    assert finetune.embed is embed


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: split_batch_norms(encoder, 8),
        lambda encoder: sync_batch_norms(encoder, torch.device("cpu")),
        lambda encoder: sync_batch_norms(encoder, torch.device("cuda")),
    ],
    ids=["split", "synchronised", "synchronised on GPUs"],
)
def test_a_training_in_several_processes_is_measured_by_one(change, monkeypatch):
    """Which would wait for the others for ever; and the batches here are no multiple of the parts of SplitBatchNorm."""
    context, other = small(80), small(80)
    expected = protocol(batch_size=36)(context)
    change(other.encoder)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    found = protocol(batch_size=36)(other)
    assert torch.equal(found.probabilities, expected.probabilities)
    made = protocol(epochs=1).fitted(other, other.memory, labelled(other)[0])
    assert not [
        part for part in made.model.modules() if isinstance(part, SplitBatchNorm | SyncBatchNorm | nn.SyncBatchNorm)
    ]


LINEAR = Linear([1e-2], 0.2, 50, 0)


def test_it_begins_as_the_linear_probe_and_is_not_worse():
    context = small(400)
    (probe, _), frozen = LINEAR.probe(context), LINEAR(context).values["top1"]
    tuned = protocol(linear=LINEAR, lr=1e-12, epochs=1)
    encoder, head, _ = tuned.trained(context, context.data.memory, 1e-12, probe)
    torch.testing.assert_close(head(context.memory.x), probe(context.memory.x), rtol=1e-3, atol=1e-3)
    learnt = protocol(linear=LINEAR, lr=[0.01, 0.05], epochs=8, batch_size=None)(context)
    assert learnt.values["top1"] >= frozen > 20
    assert (f"lr={learnt.values['lr']:g} was chosen" in learnt.notes[0]) == (learnt.values["lr"] > 0)


def test_the_learning_rate_is_chosen_on_images_that_were_held_out(monkeypatch):
    context, seen = small(200), []
    tuned = protocol(lr=[0.3, 1e-9], epochs=4, batch_size=32, smallest_crop=1.0)
    known = FineTune.trained

    def trained(self, context, images, lr, *more, **options):
        seen.append((lr, len(images), options.get("length", 1.0)))
        return known(self, context, images, lr, *more, **options)

    monkeypatch.setattr(FineTune, "trained", trained)
    made = tuned.fitted(context, context.memory, context.data.memory)
    held = len(held_out(context.memory.y, 0.1)[1])
    assert seen == [(0.3, 200 - held, 0.5), (1e-9, 200 - held, 0.5), (0.3, 200, 1.0)]
    assert made.lr == 0.3 and made.temperature != 1


def test_rates_that_spoil_the_encoder_leave_the_linear_probe():
    context = small(200)
    made = protocol(linear=LINEAR, lr=[1e4, 1e38])(context)
    assert made.values["lr"] == 0 and "the encoder is unchanged" in made.notes[0]
    assert "a linear classifier of the features" in made.notes[0] and "such as lr=[1000,5000]" in made.notes[0]
    assert made.values["top1"] == LINEAR(context).values["top1"]
    with pytest.raises(BadInput, match=r"all of lr=\[1e\+37, 1e\+38\] diverge"):
        protocol(lr=[1e37, 1e38])(context)


def test_one_image_of_a_class_chooses_nothing():
    context = small(200)
    rows = torch.stack([(context.memory.y == label).nonzero()[0, 0] for label in range(10)])
    few = context.data.memory.subset(rows)
    made = protocol(lr=[0.05, 0.5], epochs=1).fitted(
        context, Features(context.memory.x[rows], context.memory.y[rows]), few
    )
    assert made.lr == 0.05 and "lr=0.05 is used" in made.notes[-1]


@pytest.mark.parametrize(("images", "expected"), [(10, 16), (1437, 64), (5000, 128), (50_000, 256)])
def test_small_data_have_small_batches(images, expected):
    assert default_batch_size(images) == expected


def test_the_classifier_is_saved_and_gives_the_same_probabilities(tmp_path):
    context = small(200)
    context.folder = tmp_path
    result = protocol(linear=LINEAR, lr=[0.02, 0.05], epochs=4)(context)
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.safetensors", "classifier.json"}
    encoder, head, description = load_classifier(tmp_path / "classifier.safetensors")
    assert head.classes == context.data.classes and description["image_size"] == 32
    x = embed(encoder, context.data.test, context.data, context.device, context.dtype)
    p = head.linear(x).softmax(1)
    assert torch.equal(p.argmax(1), result.probabilities.argmax(1))
    scale = (p.log().std(1) / result.probabilities.log().std(1)).double()  # 1 / temperature, of all images alike
    assert scale.std() < 1e-3 * scale.mean()
