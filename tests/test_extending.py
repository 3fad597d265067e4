"""Mistakes in a method of one's own, whose files are added to a copy of the checkout, end with a sentence that names them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Finished, refused

from twoviews.errors import BadInput
from twoviews.protocols.protocol import Protocol

METHOD = """
from twoviews.backbones import Encoder
from twoviews.methods.method import Method
from twoviews.ranges import Size


class Mine(Method):
    def __init__(self, encoder: Encoder, width: Size):
        super().__init__()
"""
SETTINGS = "_target_: twoviews.methods.mine.Mine\nwidth: 8\n"
COMMAND = ("data=digits", "method=mine")


@pytest.fixture
def extended(tmp_path: Path) -> Callable[..., Finished]:
    """extended(module, settings, other, arguments): train.py with such a method, and with the text of another module."""
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    methods = tmp_path / "src" / "twoviews" / "methods"

    def call(module: str = METHOD, settings: str = SETTINGS, other: str = "", arguments=COMMAND) -> Finished:
        (methods / "mine.py").write_text(module)
        (methods / "other.py").write_text(other)
        (tmp_path / "conf" / "method" / "mine.yaml").write_text(settings)
        done = subprocess.run(
            [sys.executable, "train.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
            capture_output=True,
            text=True,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


def test_a_key_that_the_file_lacks(extended) -> None:
    settings = SETTINGS.replace("width: 8\n", "")
    sentence = (
        "method.width is missing, a parameter of Mine; add a line 'width: ...' to conf/method/mine.yaml, or give "
    )
    refused(extended(settings=settings), sentence, "+method.width=...")
    refused(extended(settings=settings, arguments=(*COMMAND, "method.width=4")), sentence)  # and not: "has no key"


@pytest.mark.parametrize(
    ("former", "name"), [("before_step", "before_optimizer_step"), ("within_batch", "batch_dependence")]
)
def test_a_former_name_of_the_contract(extended, former: str, name: str) -> None:
    sentence = f"twoviews.methods.mine.Mine has {former}, which is called {name} now; rename it."
    refused(extended(module=f"{METHOD}\n    {former} = None\n"), sentence)


def test_a_former_name_in_a_protocol() -> None:
    with pytest.raises(BadInput, match="together, which is called on_all_processes now"):
        type("Mine", (Protocol,), {"together": True})


def test_a_parameter_without_a_usable_annotation(extended) -> None:
    where = "Mine in twoviews.methods.mine has the parameter width "
    remedy = "annotate it with a type of twoviews.ranges"
    refused(extended(METHOD.replace("width: Size", "width")), where + "without an annotation", remedy)
    refused(
        extended(METHOD.replace("width: Size", "width: Encoder.T")), where + "with the annotation Encoder.T", remedy
    )


@pytest.mark.parametrize(
    ("imported", "other"),
    [
        ("twoviews.ranges import Size as Width", ""),
        ("twoviews.methods.other import Width", "from twoviews.ranges import Size as Width"),
        (
            "twoviews.methods.other import Width",
            "from typing import Annotated\nfrom twoviews.ranges import Range\n\nWidth = Annotated[int, Range(at_least=1)]",
        ),
    ],
    ids=["renamed", "imported twice", "assigned"],
)
def test_an_imported_alias_of_a_type_is_no_class(extended, imported: str, other: str) -> None:
    module = f"from {imported}\n{METHOD.replace('width: Size', 'width: Width')}"
    refused(extended(module, other=other, arguments=(*COMMAND, "method.width=0")), "method.width=0 is out of range")


def test_a_class_that_is_only_imported(extended) -> None:
    other, settings = "from twoviews.methods.mine import Mine", SETTINGS.replace("mine.Mine", "other.Mine")
    refused(
        extended(settings=settings, other=other),
        "does not define 'Mine', which is _target_: twoviews.methods.mine.Mine",
    )
    elsewhere = ("data=digits", "method=simclr", "method.temperature=0")  # its messages are as without that file
    refused(extended(settings=settings, other=other, arguments=elsewhere), "method.temperature=0 is out of range")
