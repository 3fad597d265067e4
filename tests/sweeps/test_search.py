"""Which jobs follow from what is typed: combinations, pairs, draws; seeds are a matter of their own."""

import math

import pytest

from twoviews.errors import BadInput
from twoviews.sweeps.search import Grid, Interval, Random, Zip, search_space

TYPED = ["method=moco", "optimizer.lr=0.1,0.2", "backbone.width=8,16", "seed=0,1"]


def test_a_grid_is_every_combination_with_every_seed() -> None:
    found = Grid().combinations(search_space(TYPED))
    assert len(found) == 8 and len({tuple(one) for one in found}) == 8
    assert found[0] == ["method=moco", "optimizer.lr=0.1", "backbone.width=8", "seed=0"]
    assert found[1] == ["method=moco", "optimizer.lr=0.1", "backbone.width=8", "seed=1"]
    assert found[-1] == ["method=moco", "optimizer.lr=0.2", "backbone.width=16", "seed=1"]


def test_zip_takes_pairs() -> None:
    found = Zip().combinations(search_space(TYPED))
    assert [one[1:] for one in found] == [
        ["optimizer.lr=0.1", "backbone.width=8", "seed=0"],
        ["optimizer.lr=0.1", "backbone.width=8", "seed=1"],
        ["optimizer.lr=0.2", "backbone.width=16", "seed=0"],
        ["optimizer.lr=0.2", "backbone.width=16", "seed=1"],
    ]
    assert Zip().combinations(search_space(["seed=0,1,2"])) == [["seed=0"], ["seed=1"], ["seed=2"]]


def test_pairs_need_as_many_values() -> None:
    with pytest.raises(BadInput, match=r"optimizer.lr has 3, backbone.width has 2"):
        Zip().combinations(search_space(["optimizer.lr=0.1,0.2,0.3", "backbone.width=8,16", "seed=0,1"]))


@pytest.mark.parametrize("search", [Grid(), Zip()])
def test_an_interval_is_for_searches_that_draw(search) -> None:
    with pytest.raises(BadInput, match=r"optimizer.lr is an interval.*hydra/sweeper=random"):
        search.combinations(search_space(["optimizer.lr=interval(0.1,0.2)"]))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("optimizer.lr=interval(0.2,0.1)", "nothing lies between"),
        ("optimizer.lr=tag(log,interval(0,1))", "logarithms need numbers above 0"),
        ("seed=interval(0,9)", "seeds are not searched for"),
    ],
)
def test_spaces_that_make_no_sense(typed: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        search_space([typed])


def test_draws_are_reproducible_different_and_within_bounds() -> None:
    typed = ["a=tag(log,interval(0.001,1))", "b=int(interval(1,4))", "c=x,y", "seed=0,1", "d=interval(0.0,0.5)"]
    found = Random(trials=30, draw=0).combinations(search_space(typed))
    assert len(found) == 60 and Random(trials=30, draw=0).combinations(search_space(typed)) == found
    assert Random(trials=10, draw=0).combinations(search_space(typed)) == found[:20]
    assert Random(trials=30, draw=1).combinations(search_space(typed)) != found
    settings = [dict(override.split("=") for override in one) for one in found[::2]]
    a = [float(one["a"]) for one in settings]
    assert all(0.001 <= value <= 1 for value in a) and sum(value < math.sqrt(0.001) for value in a) in range(8, 23)
    assert {one["b"] for one in settings} == {"1", "2", "3", "4"} and {one["c"] for one in settings} == {"x", "y"}
    assert [one["seed"] for one in settings] == ["0"] * 30 and len({one["d"] for one in settings}) > 20


def test_a_small_space_is_used_up_and_no_setting_comes_twice() -> None:
    found = Random(trials=50, draw=0).combinations(search_space(["a=1,2", "b=int(interval(1,3))"]))
    assert sorted(map(tuple, found)) == [(f"a={a}", f"b={b}") for a in (1, 2) for b in (1, 2, 3)]


def test_rounding_stays_within_the_interval() -> None:
    narrow = Interval(0.123456, 0.123457, logarithmic=False, whole=False)
    assert all(0.123456 <= float(narrow.value(share)) <= 0.123457 for share in (0, 0.5, 1))
    assert Interval(0.05, 0.5, True, False).value(0.5) == "0.1581" and Interval(1, 9, False, True).value(1) == "9"


def test_quotes_lists_and_groups_pass_unchanged() -> None:
    found = Grid().combinations(
        search_space(["backbone.depths=[1,1],[2,2]", "tracking.experiment='a,b'", "method=moco,byol"])
    )
    assert found[1] == ["tracking.experiment='a,b'", "backbone.depths=[1,1]", "method=byol"]


def jobs(*typed: str) -> list[list[str]]:
    return Grid().combinations(search_space(typed))


def test_of_a_swept_key_the_last_override_counts() -> None:
    assert jobs("x=1,2", "y=0", "x=3,4") == [["y=0", "x=3"], ["y=0", "x=4"]]
    assert jobs("x=1,2", "x=3") == [["x=3"]]
    assert jobs("x=3", "x=1,2") == [["x=1"], ["x=2"]]
    assert jobs("seed=0,1", "seed=5") == [["seed=5"]]
    assert jobs("x=1", "x=2", "seed=0,1") == [["x=2", "seed=0"], ["x=2", "seed=1"]]
    assert jobs("a={x:1}", "a={y:2}", "seed=0") == [["a={x:1}", "a={y:2}", "seed=0"]], "Hydra merges dictionaries"
    assert jobs("+a=1", "a=2", "seed=0") == [["+a=1", "a=2", "seed=0"]], "the second one sets what the first one adds"


@pytest.mark.parametrize(
    "typed", [["optimizer.lr=1,2", "++optimizer={lr:3}"], ["++optimizer={lr:3}", "optimizer.lr=1,2"]]
)
def test_a_dictionary_around_a_swept_key_is_refused(typed: list[str]) -> None:
    with pytest.raises(BadInput, match="set the same values"):
        search_space(typed)
    assert len(jobs("optimizer=sgd,lars", "optimizer.lr=1,2")) == 4


def test_a_pattern_chooses_the_files_of_a_group_that_fit() -> None:
    moco = search_space(["method=glob(moco*)"]).parameters["method"]
    assert moco == ["moco", "moco_v1", "moco_v2", "moco_v3"]
    most = search_space(["method=glob(*,exclude=[moco*,pcl*])", "data=digits"]).parameters["method"]
    assert {"simclr", "byol", "swav"} <= {*most} and not {*most} & {*moco, "pcl"}
    with pytest.raises(BadInput, match=r"method=glob\(zz\*\) fits none of the files of method: .*byol"):
        search_space(["method=glob(zz*)"])
    with pytest.raises(BadInput, match=r"seed is none; list the values"):
        search_space(["seed=glob(*)"])
