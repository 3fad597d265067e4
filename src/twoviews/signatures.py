"""Configuration values against the signatures they go to, read from the source text: no torch is imported for it."""

import ast
import builtins
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from twoviews import ranges
from twoviews.errors import BadInput, nearest

_SOURCES = Path(__file__).resolve().parents[1]
_CONF = _SOURCES.parent / "conf"

# The key of conf/hydra/<kind>/*.yaml that names what is ours, where `_target_` names Hydra's plugin.
BUILDS = {"launcher": "dispatch", "sweeper": "search"}


@cache
def buildable(group: str) -> frozenset[str]:
    """What may be built for a group: the targets that its files in conf/ of this checkout name; nothing for other words."""
    if not re.fullmatch(r"[a-z_]+", group):
        return frozenset()
    folder = _CONF / "hydra" / group if group in BUILDS else _CONF / group
    texts = [path.read_text() for path in folder.glob("*.yaml")]
    named = re.compile(rf"^[^#\n]*\b{BUILDS.get(group, '_target_')}: *([\w.]+)", re.MULTILINE)
    return frozenset(target for text in texts for target in named.findall(text))


def complaint(value: Any, annotation: Any) -> str:
    """What is wrong with a value, as the end of a sentence that begins with it; empty when nothing is.

    Understands int, float, bool, str, None, Literal, unions, sequences, fixed tuples, dictionaries and Annotated with a
    Range; any other annotation accepts everything.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return complaint(value, arguments[0]) or _out_of_range(value, arguments[1:])
    if origin in (types.UnionType, typing.Union):
        complaints = [complaint(value, one) for one in arguments]
        return "" if "" in complaints else complaints[0]
    if origin is Literal:
        if value in arguments:
            return ""
        known = [str(one) for one in arguments]
        close = nearest(str(value), known).rstrip("?").replace(" Did you mean", "; did you mean")
        return f"is not one of {', '.join(known)}{close}"
    if origin in (Sequence, list, tuple):
        return _wrong_sequence(value, arguments, fixed=origin is tuple and Ellipsis not in arguments)
    if origin in (Mapping, dict):
        if not isinstance(value, Mapping):
            return "is not a dictionary, such as {a:1}"
        return next(filter(None, (complaint(one, arguments[1]) for one in value.values())), "")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits, sentence = {
        bool: (isinstance(value, bool), "is not true or false"),
        int: (number and isinstance(value, int), "is not a whole number"),
        float: (number, "is not a number"),
        str: (isinstance(value, str), "is a number where a text belongs; quote it twice, as in key='\"2024\"'"),
        types.NoneType: (value is None, "is not null"),
    }.get(annotation, (True, ""))
    return "" if fits else sentence


def _out_of_range(value: Any, limits: Sequence[Any]) -> str:
    broken = [limit for limit in limits if isinstance(limit, ranges.Range) and value not in limit]
    return f"is out of range: it must be {broken[0]}" if broken else ""


def _wrong_sequence(value: Any, kinds: Sequence[Any], fixed: bool) -> str:
    if not isinstance(value, list):
        return "is not a list, such as [1,2]"
    if fixed and len(value) != len(kinds):
        return f"needs {len(kinds)} numbers"
    complaints = [complaint(one, kinds[number] if fixed else kinds[0]) for number, one in enumerate(value)]
    return next(filter(None, complaints), "")


@dataclass(frozen=True)
class Parameter:
    """What a value goes to."""

    annotation: Any  # None where it cannot be checked
    required: bool


@cache
def signature(target: str) -> dict[str, Parameter]:
    """Parameters of a function, class or dataclass of this package, by name.

    Raises:
        BadInput: there is no such target, or it is not ours: a configuration must not run arbitrary code.
    """
    module, _, name = target.rpartition(".")
    path = _SOURCES.joinpath(*module.split(".")).with_suffix(".py")
    if not module.startswith("twoviews.") or not path.exists():
        raise BadInput(
            f"_target_={target} is not part of twoviews, and only its own parts can be built from a configuration."
        )
    tree = ast.parse(path.read_text())
    names = {**vars(builtins), **vars(typing), **vars(ranges), "Sequence": Sequence, "Mapping": Mapping}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = _evaluate(node.value, names)
    found = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        init = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
        if init is None:
            if not any("dataclass" in ast.unparse(one) for one in found.decorator_list):
                return {}  # annotations of an abstract class are promises, not parameters
            attributes = [node for node in found.body if isinstance(node, ast.AnnAssign)]
            own = {
                one.target.id: Parameter(_evaluate(one.annotation, names), one.value is None)
                for one in attributes
                if isinstance(one.target, ast.Name)
            }
            return {**_inherited(found, tree), **own}
        found = init
    if not isinstance(found, ast.FunctionDef):
        raise BadInput(f"_target_={target}: {module} has no '{name}'.")
    arguments = found.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    parameters = zip([*arguments.args, *arguments.kwonlyargs], defaults, strict=True)
    return {
        one.arg: Parameter(_evaluate(one.annotation, names), default is None)
        for one, default in parameters
        if one.arg != "self"
    }


def _inherited(found: ast.ClassDef, tree: ast.Module) -> dict[str, Parameter]:
    """Fields of the dataclasses that a dataclass of `tree` derives from, as far as they are imported by name."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    bases = [imported.get(base.id, "") for base in found.bases if isinstance(base, ast.Name)]
    fields: dict[str, Parameter] = {}
    for base in bases:
        if base.startswith("twoviews."):
            fields |= signature(base)
    return fields


def _evaluate(node: ast.expr | None, names: dict[str, Any]) -> Any:
    """An annotation's value, or None (accepts everything) when it needs more than ranges and standard types."""
    if node is None:
        return None
    try:
        return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}}, names)
    except Exception:  # an annotation of torch's or our own classes: not for a configuration to fill in
        return None
