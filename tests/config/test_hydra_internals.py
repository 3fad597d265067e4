"""The private parts of Hydra that are used: a release that moves or changes one fails here."""

import subprocess
import sys

from hydra._internal.utils import get_args_parser

from twoviews.config.hydra_internals import parse_options

# In a process of its own, because the commands of other tests have replaced the methods in this one.
REPLACED = """
import inspect
from hydra._internal.hydra import Hydra
from twoviews.config.hydra_internals import start_faster

def parameters():  # the first three of each; Hydra 1.4 has more
    names = ("get_mode", "format_config_groups", "get_help")
    return [[*inspect.signature(getattr(Hydra, name)).parameters][:3] for name in names]

expected = [["self", "config_name", "overrides"], ["self", "predicate", "compact"], ["self", "help_cfg", "cfg"]]
assert parameters() == expected, parameters()
start_faster(["hydra.mode=MULTIRUN", "--hydra-help"])
assert parameters() == expected
start_faster([])
assert Hydra.get_mode(None) is None and Hydra.format_config_groups(None) == ""
"""


def test_options_are_parsed_and_unknown_ones_named() -> None:
    options, unknown = parse_options(["-m", "lr=1", "--lr=2", "-1", "--config-name", "x", "--config-path=y"])
    assert (options.multirun, options.config_name, options.config_path) == (True, "x", "y")
    assert sorted(unknown) == ["--lr=2", "-1"]
    assert parse_options(["--help", "-cjob", "--multi", "a=b"])[1] == []


def test_the_methods_that_are_replaced_are_those_of_this_release() -> None:
    subprocess.run([sys.executable, "-c", REPLACED], check=True)


def test_overrides_are_the_positional_arguments() -> None:
    assert get_args_parser().parse_args(["a=1", "b=2"]).overrides == ["a=1", "b=2"]
