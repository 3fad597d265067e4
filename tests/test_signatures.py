"""Values against annotations: every parameter of a configuration has one that can be compared with a value."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from twoviews.config.checks import NODES, VIEW
from twoviews.config.groups import PASSED_BY_PROGRAM, PLUGIN_KEYS, groups, targets
from twoviews.data.corruptions import CORRUPTIONS
from twoviews.ranges import Corruption, Count, Length, Positive, Size
from twoviews.signatures import Component, invalid_value, mismatch, signature

TARGETS = [
    *((group, target) for group in (*groups(), *PLUGIN_KEYS) for target in sorted(targets(group))),
    *(("", target) for target in (*NODES.values(), VIEW)),
]


def compare(annotation: Any) -> None:
    """Let `mismatch` see every part of an annotation."""
    assert annotation is not Any
    mismatch(0, annotation)
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            if not isinstance(part, (Length, type(Ellipsis))) and type(part).__name__ != "Range":
                compare(part)


@pytest.mark.parametrize(("group", "target"), TARGETS)
def test_every_parameter_can_be_compared(group: str, target: str) -> None:
    for name, parameter in signature(target).items():
        if name not in PASSED_BY_PROGRAM.get(group, ()):
            compare(parameter.annotation)


def test_annotations_that_cannot_be_compared() -> None:
    for annotation in (None, object, list[object]):
        with pytest.raises(TypeError, match="cannot be compared"):
            compare(annotation)


class Linear(Component):
    target = "twoviews.protocols.linear.Linear"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [0, -1, 2**63 - 1], [2**63, 10**400, 0.5, True, None, "1", [], float("nan")]),
        (float, [0, -0.0, 1.5], [float("nan"), float("inf"), 10**400, "x", False]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["abc", "a b", "ä"], ["", "a\nb", "\0", "x" * 5000, 1, None, ["a"]]),
        (Literal[1, 3], [1, 3], [True, 1.0, 2, "1"]),
        (Count, [1, 10**9], [0, 10**9 + 1, 1.0]),
        (Count | None, [1, None], [0, "", []]),
        (Sequence[Count], [[1], [1, 2]], [[], [0], [None], 1, "1", {}]),
        (Annotated[Sequence[str], Length()], [[], ["a"]], [[""], "a"]),
        (Annotated[list[Positive], Length(3, 3)], [[1, 2, 3]], [[], [1], [1, 2, 0]]),
        (Annotated[str, Length()], ["", "a"], [1]),
        (Annotated[Sequence[str], Length()], [[], ["a"]], ["", [""]]),
        (tuple[Positive, Positive], [[1, 2], (1, 2)], [[1], [1, 2, 3], [0, 1], 1]),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [1], "a"]),
        (Annotated[dict[str, dict], Length(at_least=1)], [{"a": {}}], [{"a": 1}, None, ["a"], [], "a"]),
        (Linear, [{"_target_": Linear.target}], [{}, {"_target_": "os.system"}, None, "x"]),
        (Linear | None, [None], [{}, "x", 0]),
        (Size | Sequence[Size], [1, [1]], [0, [], [0], None]),
    ],
)
def test_values(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    def wrong(value: Any) -> str:
        return mismatch(value, annotation) or invalid_value(value, annotation)

    assert [value for value in good if wrong(value)] == []
    assert [value for value in bad if not wrong(value)] == []


def test_the_names_of_corruptions_are_those_there_are() -> None:
    assert get_args(Corruption) == tuple(CORRUPTIONS)
