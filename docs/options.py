"""Writes docs/options.md: every group with its choices, and every key with its type, range, default and meaning.

    python docs/options.py

Types and ranges are those of the signatures that the values go to, defaults those of the files of conf/, and meanings the
comments beside the keys there or the docstrings.
"""

import ast
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from twoviews.config.checks import NODES, ROOTS, VIEW
from twoviews.config.groups import CONF, PASSED_BY_PROGRAM, PLUGIN_KEYS
from twoviews.ranges import Corruption, Length, Range
from twoviews.signatures import Component, signature

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
GROUPS = {
    "method": "The loss. Each method is one paper.",
    "data": "The images. `folder` and `array` are your own.",
    "backbone": "The network that is trained.",
    "augmentation": "How the views of an image are made.",
    "optimizer": "How weights are updated.",
    "schedule": "The learning rate over time: its multiplier at each epoch.",
    "protocol": "How an encoder is evaluated; [evaluate.md](evaluate.md) says what the numbers mean.",
    "runtime": "Device, number format, logging and checkpoints.",
    "tracking": "Where results are recorded beside the run folder.",
    "launcher": "Where the jobs of a sweep run, written as `hydra/launcher=pool`; its keys as `hydra.launcher.<key>=`.",
    "sweeper": "Which jobs a sweep has, written as `hydra/sweeper=random`; its keys as `hydra.sweeper.<key>=`.",
}
HEADER = """# Options

This page is written by `make docs` from the code, and a test compares it with the code. Choices are written as
`method=simclr`, values as `method.temperature=0.1`. Words such as bank and protocol are in the
[glossary](../CONTRIBUTING.md#words). Where the files of a group have different defaults, each is listed with the choices that
have it.

    python train.py --help                            # the groups, and every value as it is with these choices
    python train.py method=byol --cfg job --resolve   # the whole configuration of a run
"""


def words(annotation: Any) -> str:
    """The values that an annotation allows, for a person."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = " and ".join(str(limit) for limit in arguments[1:] if isinstance(limit, Range))
        sizes = " and ".join(f"{limit} elements" for limit in arguments[1:] if isinstance(limit, Length))
        inner = words(arguments[0])
        return ", ".join(filter(None, (inner, limits, sizes)))
    if origin in (types.UnionType, typing.Union):
        return "; or ".join(words(one) for one in arguments)
    if annotation == Corruption:
        return "name of a corruption"
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"list of {len(arguments)}: {words(arguments[0])}"
    if origin in (Sequence, list, tuple):
        return f"list of: {words(arguments[0])}"
    if origin in (Mapping, dict) or annotation in (Mapping, dict):
        return "dictionary"
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return f"keys of `{annotation.__name__}`"
    return {bool: "true, false", int: "whole number", float: "number", str: "text", types.NoneType: "null", Any: "any"}[
        annotation
    ]


@cache
def _definition(target: str) -> tuple[ast.Module, ast.ClassDef | ast.FunctionDef]:
    module, _, name = target.rpartition(".")
    tree = ast.parse((ROOT / "src" / Path(*module.split(".")).with_suffix(".py")).read_text())
    found = next(node for node in tree.body if getattr(node, "name", None) == name)
    assert isinstance(found, ast.ClassDef | ast.FunctionDef)
    return tree, found


def described(target: str) -> dict[str, str]:
    """Meanings of parameters by the docstring of a class or function, or of the class that it derives from."""
    tree, found = _definition(target)
    text = ast.get_docstring(found) or ""
    block = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", block[1], re.MULTILINE) if block else []
    own = {name: re.sub(r"\s+", " ", meaning) for name, meaning in entries}
    inherited: dict[str, str] = {}
    for base in found.bases if isinstance(found, ast.ClassDef) else ():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and ast.unparse(base) in names and "twoviews." in f"{node.module}.":
                inherited |= described(f"{node.module}.{ast.unparse(base)}")
    return inherited | own


def _letters(target: str) -> str:
    """What the letters of a paper mean, by the docstring of its module; empty where it says nothing of them."""
    text = ast.get_docstring(_definition(target)[0]) or ""
    found = re.search(r"^(?:Shapes|Letters): (.*(?:\n.+)*)", text, re.MULTILINE)
    return _sentence(re.sub(r"\s+", " ", found[1])) if found and target.startswith("twoviews.methods.") else ""


def comments(path: Path) -> dict[str, str]:
    """The comments beside the keys of a file by dotted key, with the lines of comment that continue them."""
    found: dict[str, str] = {}
    key, above = "", ""
    parents: dict[int, str] = {}  # dotted key by indentation, of the node that the line is in
    for line in path.read_text().splitlines():
        above = f"{above} {line[2:]}" if line.startswith("# ") and (above or not key) else above
        if match := re.match(r"^( *)(\w+):.*?(?:\s+# (.*))?$", line):
            parents = {indent: parent for indent, parent in parents.items() if indent < len(match[1])}
            dotted = ".".join([*([*parents.values()][-1:]), match[2]])
            parents[len(match[1])] = dotted
            key = dotted if match[3] else ""
            if key:
                found[key] = match[3]
            elif above:
                found[dotted] = above.strip()
            above = ""
        elif (
            key and line.startswith("# ") and found[key].count(" ") > 12
        ):  # a sentence that does not fit beside its key
            found[key] += " " + line[2:]
        elif not line.startswith("#"):
            key, above = "", ""
    return found


def about(path: Path) -> str:
    """The first sentence of the comment at the head of a file."""
    lines = []
    for line in path.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    text = re.sub(r"^conf/\S+: ", "", " ".join(lines))
    sentence = re.split(r"(?<!sec)(?<!app)(?<!fig)(?<!e[.]g)(?<=[a-z0-9)%])[.](?: |$)|:\s+python ", text)[0]
    return _cell(sentence)


def nodes(path: Path, group: str) -> dict[str, Any]:
    """The values of a file of a group, with those of the files that its defaults list names."""
    content = yaml.safe_load(path.read_text()) or {}
    values: dict[str, Any] = {}
    for default in content.pop("defaults", []):
        name = default if isinstance(default, str) else ""
        name, _, package = name.partition("@")
        if name and name != "_self_" and package in ("", "_here_"):
            values |= nodes(path.with_name(f"{name}.yaml"), group)
    return values | content.get(group, {} if "_target_" not in content and group in content else content)


def shown(value: Any) -> str:
    """A default as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list):
        inner = ",".join(shown(each).strip("`") for each in value)
        return f"`[{inner}]`" if len(inner) < 60 else f"{len(value)} names"
    if isinstance(value, str) and "TWOVIEWS_CACHE" in value:
        return "`~/.cache/twoviews`, or `$TWOVIEWS_CACHE`"
    if found := re.fullmatch(r"\$\{largest_view:(\w+),(.*)\}", str(value)):
        return f"`{found[1]}` of the training's largest view, or `{found[2]}` without one"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


def _sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name or a formula."""
    text = re.sub(r"\bNone(?=:| is| for)", "null", _cell(text).rstrip("."))
    word = text.split(" ")[0]
    return (
        (text if re.search(r"[._=*]|^(none|true|false)\b", word) else text[:1].upper() + text[1:]) + "." if text else ""
    )


def rows(
    target: str, files: Mapping[str, Mapping[str, Any]], passed: Sequence[str], notes: Mapping[str, str]
) -> list[str]:
    """Lines of a table, one for each parameter of a target.

    Args:
        target: dotted path of the class or function.
        files: values of each file that names it, by the name of the choice.
        passed: parameters that the program passes.
        notes: comments beside these keys.
    """
    meanings, lines = described(target), []
    for key, parameter in signature(target).items():
        if key in passed:
            continue
        defaults: dict[str, list[str]] = {}
        for name, values in files.items():
            if key in values:
                defaults.setdefault(shown(values[key]), []).append(name)
        whole = len(defaults) == 1
        default = ", ".join(value if whole else f"{value} ({', '.join(names)})" for value, names in defaults.items())
        if any(isinstance(values.get(key), dict) for values in files.values()):
            default = "see the file"
        meaning = notes.get(key) or meanings.get(key) or ""
        longer = meanings.get(key, "")
        if longer and len(longer) > len(meaning):
            meaning = longer
        lines.append(f"| `{key}` | {_cell(words(parameter.annotation))} | {default or '-'} | {_sentence(meaning)} |")
    return lines


HEAD = ["| key | values | default | meaning |", "|---|---|---|---|"]


def group_lines(group: str) -> list[str]:
    """The section of a group."""
    folder = CONF / "hydra" / group if group in PLUGIN_KEYS else CONF / group
    paths = sorted(folder.glob("*.yaml"))
    lines = [f"## {group}", "", GROUPS[group], "", "| choice | what it is |", "|---|---|"]
    lines += [f"| `{path.stem}` | {_sentence(about(path))} |" for path in paths]
    files = {path.stem: nodes(path, group) for path in paths}
    notes: dict[str, dict[str, str]] = {
        path.stem: {key.removeprefix(f"{group}."): note for key, note in comments(path).items()} for path in paths
    }
    by_target: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in files.items():
        if target := values.get(PLUGIN_KEYS.get(group, "_target_")):
            by_target.setdefault(target, {})[name] = values
    for target, own in by_target.items():
        merged: dict[str, str] = {}
        for name in own:
            merged = {**notes[name], **merged}
        table = rows(target, own, PASSED_BY_PROGRAM.get(group, ()), merged)
        if table and group != "augmentation":
            lines += ["", f"Keys of {', '.join(f'`{name}`' for name in own)} (`{target}`):", "", *HEAD, *table]
            if letters := _letters(target):
                lines += ["", f"Letters: {letters}"]
    if group == "augmentation":
        views = {name: dict(view) for name, each in files.items() for view in each["views"].values()}
        lines += ["", "Keys of each view, as `augmentation.views.both.blur=0.5` (`twoviews.data.draws.View`):", ""]
        lines += ["| key | values | meaning |", "|---|---|---|"]
        found = rows(VIEW, views, (), {})
        lines += [re.sub(r"^(\| `\w+` \| (?:[^|]|\\\|)*\|) (?:[^|]|\\\|)*\|", r"\1", row) for row in found]
    return [*lines, ""]


def root_lines(name: str) -> list[str]:
    """The section of an entry point's own keys."""
    path = CONF / f"{name}.yaml"
    values, notes = yaml.safe_load(path.read_text()), comments(path)
    lines = [f"## {name}.py", "", "Keys outside the groups:", "", *HEAD]
    for field in fields(ROOTS[name]):
        value = values[field.name]
        default = "required" if value == "???" else shown(value)
        lines.append(
            f"| `{field.name}` | {_cell(words(field.type))} | {default} | {_sentence(notes.get(field.name, ''))} |"
        )
    for node, target in NODES.items():
        if node in values:
            inside = {key.removeprefix(f"{node}."): note for key, note in notes.items() if key.startswith(f"{node}.")}
            found = rows(target, {name: values[node]}, (), inside)
            lines += [line.replace("| `", f"| `{node}.", 1) for line in found]
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    lines = HEADER.splitlines() + [""]
    for name in ROOTS:
        lines += root_lines(name)
    for group in GROUPS:
        lines += group_lines(group)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
