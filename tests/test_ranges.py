"""Intervals and how they read in an error."""

import math

import pytest

from twoviews.ranges import LARGEST, MANY, Range


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"above": 0}, [1e-9, 5], [0, -1]),
        ({"at_least": 0, "at_most": 1}, [0, 0.5, 1], [-1e-9, 1.1]),
        ({"at_least": 0, "below": 1}, [0, 0.999], [1, -1]),
    ],
)
def test_limits(limits, inside, outside):
    assert all(value in Range(**limits) for value in inside)
    assert not any(value in Range(**limits) for value in [*outside, math.nan])


def test_reads_as_words():
    assert str(Range(at_least=0, below=1, usual="0.9")) == "at least 0 and below 1 (usual: 0.9)"
    assert str(Range(above=0)) == "above 0"


def test_a_technical_limit_is_named_only_to_a_value_above_it():
    many, large = Range(at_least=1, at_most=MANY), Range(above=0, at_most=LARGEST)
    assert [many.words(0), large.words(-1.0), large.words(math.nan)] == ["at least 1", "above 0", "above 0"]
    assert many.words(MANY + 1) == "at least 1 and at most 1,000,000,000"
    assert large.words(1e300) == large.words(math.inf) == "above 0 and at most 1e+30"
    assert Range(at_least=0, at_most=1).words(-1) == "at least 0 and at most 1"
