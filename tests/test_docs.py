"""README and docs: their commands, numbers, messages, links and examples are those of the code."""

import ast
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL, UNTRACKED_METHODS

DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS), str(ROOT / "benchmarks")]

import check as docs_check  # noqa: E402
import options  # noqa: E402
import table  # noqa: E402

PAGES = docs_check.pages()
GROUP = re.compile(r"\b(?:method|data|optimizer|runtime)[.](?=\w+=)")  # that messages get on their way to the user


def test_every_command_composes() -> None:
    commands = docs_check.all_commands()
    wrong = {command.text: problem for command in commands if (problem := docs_check.checked(command, None)[1])}
    assert not wrong
    assert len(commands) > 80


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("python train.py method=moco method.temperatur=0.1", "temperatur"),
        ("python train.py method=moko", "moko"),
        ("python train.py -m data=digits seed=0,1 optimizer.lrr=0.1,0.2", "lrr"),
        ("python train.py -m seed=0,1 hydra/launcher=slurm hydra.launcher.timeout=5", "timeout"),
        ("python evaluate.py run=latest protocol=knn protocol.knn.kk=20", "kk"),
        ("make trian", "trian"),
        ("python benchmarks/step.py --profiel moco", "profiel"),
    ],
)
def test_a_wrong_command_is_found(text: str, problem: str) -> None:
    assert problem in docs_check.checked(docs_check.Command("README.md", 1, text), None)[1]


def test_commands_are_found_in_blocks_in_lines_and_over_several_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Text `python train.py seed=1` and\n\n    make train    # what it does\n    python train.py \\\n        a=1\n"
    )
    page.write_text(page.read_text() + "\n```\npython cluster.py run=latest\n```\n\n```python\npython = 1\n```\n")
    found = [(command.line, command.text) for command in docs_check.commands(page)]
    assert found == [
        (1, "python train.py seed=1"),
        (3, "make train"),
        (4, "python train.py a=1"),
        (8, "python cluster.py run=latest"),
    ]


def test_options_are_up_to_date_and_every_key_is_explained() -> None:
    assert options.PAGE.read_text() == options.page(), "run `make docs`"
    unexplained = [line for line in options.page().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unexplained


def test_tables_are_those_of_the_results() -> None:
    found = list(table.results())
    for name, text in {"speed": table.speed(found), "results": table.accuracies()}.items():
        assert table.between((DOCS / f"{name}.md").read_text()) == text, "run python benchmarks/table.py"
    assert table.between((ROOT / "benchmarks" / "speedrun.md").read_text()) == table.ladder()


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Cells of the rows of the first table below a heading, by the first cell."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in lines if not first.endswith("=`")}


def test_every_recipe_has_a_row_with_the_number_of_its_header() -> None:
    found = rows((DOCS / "results.md").read_text(), "Recipes")
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        epochs, published, _, ours = found.pop(path.stem)
        header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        for number in re.findall(r"\d+(?:[.]\d+)?(?= %)", published):
            assert number in re.findall(r"\d+(?:[.]\d+)?", header), path
        assert f"epochs: {epochs}\n" in path.read_text() or yaml.safe_load(path.read_text())["defaults"][0] in (
            "moco_cifar10",
            "simsiam_cifar10_fastsiam",
            "speedrun_cifar10_80",
        )
        assert ours.strip(), path
    assert not found


def test_numbers_of_the_ladder_in_results_are_the_measured_ones() -> None:
    ours = rows((DOCS / "results.md").read_text(), "Recipes")["speedrun_cifar10_50"][-1]
    for name in ("speedrun_50", "speedrun_50_h200"):
        facts = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert f"{facts['knn_mean']:.2f} % ± {facts['knn_deviation']:.2f}" in ours


def test_the_table_of_the_laptop_has_a_row_for_each_method() -> None:
    text = (DOCS / "results.md").read_text()
    own = text.partition("<!-- laptop begins")[2].partition("<!-- laptop ends")[0]
    listed = set(re.findall(r"^\| `(\w+)` (?:\| \d+\.\d+ ){3}\|$", own, re.MULTILINE))
    of_imagenet = {"moco_v1", "moco_v2", "pcl_v1", "pcl_v2"}
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - of_imagenet
    assert methods - set(UNTRACKED_METHODS) <= listed <= methods


def messages() -> list[str]:
    """Every text of the code, a space where an f-string has a value."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [GROUP.sub("", text) for text in found]


def test_messages_of_the_page_of_troubles_are_those_of_the_code() -> None:
    code, quoted = messages(), []
    for line in (DOCS / "trouble.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and len(cells) > 2 and cells[1].startswith("`"):
            quoted.append(cells[1].strip("`"))
    assert len(quoted) > 35
    for message in quoted:
        fragments = [fragment.strip() for fragment in GROUP.sub("", message).split("…") if fragment.strip(" ();")]
        pattern = re.compile(".*".join(map(re.escape, fragments)), re.DOTALL)
        assert any(map(pattern.search, code)), message


def test_links_lead_to_files_and_headings() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], target


def test_the_readme_is_a_page_and_links_every_other() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for path in DOCS.glob("*.md"):
        assert f"(docs/{path.name})" in text, path


# ------------------------------------------------------------------------------------------------------------- examples


def copy_of_checkout(folder: Path) -> Path:
    """The code, its configuration and its tests."""
    for name in ("src", "conf", "tests", "train.py", "evaluate.py", "cluster.py", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_in(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_of_extend_train_and_keep_the_contract(tmp_path: Path) -> None:
    text = (DOCS / "extend.md").read_text()
    blocks = re.findall(r"^ *`((?:src|conf)/[\w/.]+)`:\n\n( *)```\w+\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    folder = copy_of_checkout(tmp_path / "checkout")
    for name, indent, block in blocks:
        path = folder / name
        assert not path.exists()
        path.write_text(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE))
    small = [word for word in SMALL if not word.startswith("backbone.depths")]
    last = re.findall(r"^python (train[.]py .*data=shapes.*)$", text, re.MULTILINE)[0].split()
    out = run_in(folder, *last, *small, "backbone=tiny")
    result = json.loads((Path(out.strip().splitlines()[-1].removeprefix("run: ")) / "result.json").read_text())
    assert result["state"] == "finished" and 0 <= result["class_means/top1"] <= 100
    assert result["train/alignment"] >= 0 >= result["train/uniformity"] >= -8
    contract = ["-k", "align_uniform and not learns", "-q", "-p", "no:cacheprovider", "tests/test_contract.py"]
    assert re.search(r"\d+ passed", run_in(folder, "-m", "pytest", *contract))


def test_code_of_the_page_about_python_runs(tmp_path: Path, monkeypatch, command) -> None:
    from PIL import Image

    done = command("train", *SMALL, "method.queue_size=64", "method.embed_dim=16", "hydra.run.dir=outputs/example")
    assert done.code == 0, done.err
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 50), (80 * number, 20, 200)).save(tmp_path / "photos" / f"{number}.png")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(blocks).replace("outputs/<run>", "outputs/example"), names)
    assert names["x"].shape == (3, names["encoder"].num_features)  # type: ignore[attr-defined]
    assert len(names["z"]) == 2  # type: ignore[arg-type]


def test_the_notebook_runs(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    cells = json.loads((DOCS / "first_steps.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    short = code.replace('"epochs=30"', '"epochs=3", "data.train_images=512"')
    assert short != code
    (tmp_path / "cells.py").write_text(short)
    names = runpy.run_path(str(tmp_path / "cells.py"))
    assert names["x"].shape == (1797, names["encoder"].num_features)
    assert names["accuracy"] > 50  # in percent; ten would be chance
    assert (tmp_path / "outputs" / "first-steps" / "plane.png").stat().st_size > 10_000
    importlib.import_module("matplotlib.pyplot").close("all")
