"""Parameters in messages, with the group that they are typed with."""

import pytest
from contexts import small
from omegaconf import OmegaConf
from test_configs import composed

from twoviews.config.building import build
from twoviews.config.parameter_names import qualified_errors, qualify
from twoviews.data.sources import digits
from twoviews.errors import BadInput
from twoviews.protocols.protocol import NamedProtocol, named_protocols


@pytest.mark.parametrize(
    ("sentence", "group", "typed"),
    [
        ("queue_size=16 is", "method", "method.queue_size=16 is"),
        ("use momentum=0.9.", "optimizer", "use optimizer.momentum=0.9."),
        ("use momentum=0.9.", "method", "use method.momentum=0.9."),
        ("use momentum=0.9.", "", "use momentum=0.9."),  # two groups have it
        ("use accumulate=2 or batch_size=4", "method", "use runtime.accumulate=2 or batch_size=4"),
        ("views.global.size=0 is", "augmentation", "augmentation.views.global.size=0 is"),
        ("method.queue_size=16 and name=2", "method", "method.queue_size=16 and backbone.name=2"),
        ("WORLD_SIZE=2 and a/root=b and unknown=1", "", "WORLD_SIZE=2 and a/root=b and unknown=1"),
        ("protocol=knn and data=digits", "", "protocol=knn and data=digits"),
    ],
)
def test_the_group_is_put_in_front(sentence: str, group: str, typed: str) -> None:
    assert qualify(sentence, group) == typed


def test_root_keys_stay_as_they_are() -> None:
    assert qualify("clusters=3 and seed=1", root=("clusters", "seed")) == "clusters=3 and seed=1"


def test_errors_are_qualified_and_keep_their_class() -> None:
    class Special(BadInput):
        pass

    with pytest.raises(Special) as caught, qualified_errors("method"):
        raise Special("queue_size=1 is wrong", "so is embed_dim=2")
    assert caught.value.messages == ["method.queue_size=1 is wrong", "so is method.embed_dim=2"]


def test_a_part_that_refuses_a_value_is_told_by_its_key() -> None:
    with pytest.raises(BadInput, match=r"^schedule\.warmup_epochs=3 "):
        build({"_target_": "twoviews.schedule.Cosine", "epochs": 2, "warmup_epochs": 3})


PROTOCOLS = {
    "linear": ({"weight_decays": []}, "protocol.linear.weight_decays=[] is an empty list"),
    "finetune": ({"warmup_epochs": 99}, "protocol.finetune.warmup_epochs=99 is longer than the training of 20 epochs"),
    "few_labels": (
        {"shares": [], "per_class": []},
        "protocol.few_labels.shares=[] and protocol.few_labels.per_class=[]",
    ),
    "few_labels_finetune": (
        {"finetune.warmup_epochs": 99},
        "protocol.few_labels.finetune.warmup_epochs=99 is longer than the training of 60 epochs",
    ),
    "linear_sgd": ({"learning_rates": []}, "protocol.linear_sgd.learning_rates=[] is an empty list"),
}


@pytest.mark.parametrize("choice", PROTOCOLS)
def test_protocols_are_told_by_their_keys(choice: str) -> None:
    changes, sentence = PROTOCOLS[choice]
    ((name, node),) = composed(f"protocol=[{choice}]").protocol.items()
    for key, value in changes.items():
        OmegaConf.update(node, key, value)
    with pytest.raises(BadInput) as caught:
        NamedProtocol(name, node)
    assert sentence in str(caught.value)


def test_mistakes_of_several_protocols_are_said_together() -> None:
    nodes = composed("protocol=[linear_sgd,few_labels]").protocol
    assert [*named_protocols(nodes)] == ["linear_sgd", "few_labels"]
    nodes["linear_sgd"]["learning_rates"], nodes["few_labels"]["draws"] = [], 1
    with pytest.raises(BadInput) as caught:
        named_protocols(nodes)
    first, second = caught.value.messages
    assert "protocol.linear_sgd.learning_rates=[]" in first and "protocol.few_labels.draws=1" in second


def test_what_a_protocol_says_while_it_works_has_its_keys_too() -> None:
    ((name, node),) = composed("protocol=[knn]", "protocol.knn.k=5000").protocol.items()
    assert NamedProtocol(name, node).notes(digits())[0].startswith("protocol.knn.k=5000 is more than the 1,437 images")
    context = small(20)
    ((name, node),) = composed("protocol=[finetune]", "protocol.finetune.unfreeze_from=layer9").protocol.items()
    with pytest.raises(BadInput, match=r"^protocol\.finetune\.unfreeze_from=layer9 is no layer"):
        NamedProtocol(name, node)(context)
    node["unfreeze_from"], node["epochs"], node["lr"], node["batch_size"] = None, 1, 0.1, 64
    notes = NamedProtocol(name, node)(context).notes
    assert notes == ["protocol.finetune.batch_size=64 is larger than the 20 images: batches have 20."]


def test_keys_that_evaluate_has_for_all_protocols_stay_short() -> None:
    ((name, node),) = composed("protocol=[predict]", "run=x", name="evaluate").protocol.items()
    with pytest.raises(BadInput, match="^images= names no pictures"):
        NamedProtocol(name, node)(small(20))
