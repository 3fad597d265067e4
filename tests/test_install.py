"""The package as `pip install` makes it, and the ranges of its dependencies against the pinned versions."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)(?: ; (.*?))? \\$", re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_ranges_contain_the_pinned_versions(python: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    pins = {}
    for name, version, marker in PIN.findall((ROOT / "requirements" / "train.txt").read_text()):
        if not marker or Requirement(f"{name} ; {marker}").marker.evaluate(environment):  # type: ignore[union-attr]
            pins[name] = version
    ranges = [Requirement(one) for one in (*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"])]
    ranges = [one for one in ranges if one.marker is None or one.marker.evaluate(environment)]
    assert len(ranges) > 20
    wrong = [f"{one}: {pins.get(one.name)}" for one in ranges if pins.get(one.name) not in one.specifier]
    assert not wrong and all(len(one.specifier) == 2 for one in ranges if one.name != "hatchling")


def test_no_address_of_a_package_index_is_in_the_lock_files() -> None:
    files = sorted((ROOT / "requirements").iterdir())
    assert [path.name for path in files] == ["dev.txt", "hydra14.txt", "train.txt", "uv.txt"]
    assert not [path.name for path in files if "://" in path.read_text()]


OUTSIDE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import twoviews
from twoviews.config.groups import CONF, options
from twoviews.data.kernel import SOURCE
assert twoviews.__file__.startswith(sys.argv[1]) and str(CONF).startswith(sys.argv[1])
assert "moco" in options("method")
encoder = twoviews.load(sys.argv[2], device="cpu")
print(encoder.features(np.zeros((2, 32, 32), np.uint8), progress=False).shape)
"""


def test_an_installed_package_works_without_the_checkout(tmp_path: Path) -> None:
    """A wheel, which pip would unpack, is built as `pip install .` builds it; the checkout stays as it was."""
    before = {path for path in ROOT.rglob("*") if path.name in ("build", "dist") or path.suffix == ".egg-info"}
    script = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    after = {path for path in ROOT.rglob("*") if path.name in ("build", "dist") or path.suffix == ".egg-info"}
    assert before == after
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    tracked = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.suffix in (".c", ".cu")}
    assert len(tracked) > 2 and all((tmp_path / "site" / path).is_file() for path in tracked)
    run = ROOT / "tests" / "folders" / "v0" / "finished"
    done = subprocess.run(
        [sys.executable, "-P", "-c", OUTSIDE, str(tmp_path / "site"), str(run)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, ")
