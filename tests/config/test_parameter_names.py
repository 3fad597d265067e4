"""Parameters in messages, with the group that they are typed with."""

import pytest

from twoviews.config.building import build
from twoviews.config.parameter_names import qualified_errors, qualify
from twoviews.errors import BadInput


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
