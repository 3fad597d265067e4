"""The private parts of Hydra that are used: a release that moves or changes one fails here."""

import inspect

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser

from twoviews.config.hydra_internals import parse_options, start_faster


def test_options_are_parsed_and_unknown_ones_named():
    options, unknown = parse_options(["-m", "lr=1", "--lr=2", "-1", "--config-name", "x", "--config-path=y"])
    assert (options.multirun, options.config_name, options.config_path) == (True, "x", "y")
    assert sorted(unknown) == ["--lr=2", "-1"]
    assert parse_options(["--help", "-cjob", "--multi", "a=b"])[1] == []


def test_the_methods_that_are_replaced_are_those_of_this_release(monkeypatch):
    assert _parameters() == METHODS
    for name in METHODS:
        monkeypatch.setattr(Hydra, name, getattr(Hydra, name))  # put back afterwards
    start_faster(["hydra.mode=MULTIRUN", "--hydra-help"])
    assert _parameters() == METHODS
    start_faster([])
    assert Hydra.get_mode(None) is None and Hydra.format_config_groups(None) == ""


def _parameters() -> dict[str, list[str]]:
    """The first three of each; Hydra 1.4 has more."""
    return {name: [*inspect.signature(getattr(Hydra, name)).parameters][:3] for name in METHODS}


METHODS = {"get_mode": ["self", "config_name", "overrides"], "format_config_groups": ["self", "predicate", "compact"]}


def test_overrides_are_the_positional_arguments():
    assert get_args_parser().parse_args(["a=1", "b=2"]).overrides == ["a=1", "b=2"]
