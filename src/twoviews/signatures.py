"""Configuration values against the signatures they go to, read from the source text: no torch is imported for it."""

import ast
import builtins
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from twoviews import ranges
from twoviews.errors import BadInput, nearest, shown
from twoviews.ranges import Length

_SOURCES = Path(__file__).resolve().parents[1]
_KNOWN = {**vars(builtins), **vars(typing), "Sequence": Sequence, "Mapping": Mapping, **vars(ranges)}

SYNONYMS = {"gpu": "cuda"}  # of choices, as people type them


INT_LIMIT = 2**63  # whole numbers are smaller, as torch's and YAML's readers need them
LONGEST = 4096  # characters of a text, which may be a path


class Component:
    """Base class of what stands for a class of this package in an annotation: its values are nodes with a `_target_`."""

    target: str


def mismatch(value: Any, annotation: Any) -> str:
    """What is wrong with a value, as the end of a sentence that begins with it; empty when nothing is.

    Understands int, float, bool, str, None, Literal, unions, sequences, fixed tuples, dictionaries, components of this
    package, Any, and Annotated with a Range or a Length.

    Raises:
        TypeError: it does not understand the annotation.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return mismatch(value, arguments[0]) or _out_of_range(value, arguments[1:])
    if origin in (types.UnionType, typing.Union):
        mismatches = {argument: mismatch(value, argument) for argument in arguments}
        if "" in mismatches.values():
            return ""
        alike = [
            argument
            for argument in arguments
            if _container(argument) == _container(value) and argument is not types.NoneType
        ]
        return mismatches[(alike or arguments)[0]]
    if origin is Literal:
        return _wrong_choice(value, arguments)
    if annotation is Any:
        return ""
    if origin in (Sequence, list, tuple):
        if isinstance(value, (list, tuple)):
            return _wrong_elements(value, annotation)
        alone = value is not None and not _wrong_elements([value], annotation)
        example = "two numbers, such as [0.1,1]" if origin is tuple else "such as [1,2]"
        return f"is not a list; write [{shown(value)}]" if alone else f"is not a list, {example}"
    if origin in (Mapping, dict) or annotation in (Mapping, dict):
        if not isinstance(value, Mapping):
            return "is not a dictionary, such as {a:1}"
        for key, inner in value.items():
            for part, kind in zip((key, inner), arguments, strict=False):
                if wrong := mismatch(part, kind):
                    return f"has {shown(key)}={shown(inner)}, where {shown(part)} {wrong}"
        return ""
    if isinstance(annotation, type) and issubclass(annotation, Component):
        if isinstance(value, Mapping) and value.get("_target_") == annotation.target:
            return ""
        return f"is not the configuration of a {annotation.__name__}; change single keys of it, or leave it as it is"
    return _wrong_scalar(value, annotation)


def _wrong_scalar(value: Any, annotation: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is bool:
        return "" if isinstance(value, bool) else "is not true or false"
    if annotation is types.NoneType:
        return "" if value is None else "is not null"
    if annotation is str:
        return _wrong_text(value)
    if annotation not in (int, float):
        raise TypeError(f"the annotation {annotation} cannot be compared with a value of a configuration")
    if not number or (annotation is int and not isinstance(value, int)):
        return "is not a whole number" if annotation is int else "is not a number"
    return ""


def _wrong_text(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        kind = "true or false" if isinstance(value, bool) else "a number"
        return f"is {kind} where a text belongs; quote it twice, as in key='\"{shown(value)}\"'"
    return "" if isinstance(value, str) else "is not a text"


def invalid_value(value: Any, annotation: Any = None) -> str:
    """Why no parameter may have this value, as the end of a sentence that begins with it; empty where one may.

    It is empty (unless a Length of the annotation allows that), not finite, too large or too long, or has control characters.
    """
    if value in ("", []):
        lengths = [limit for limit in get_args(annotation) if isinstance(limit, Length)]
        empty = "is an empty text" if value == "" else "is an empty list"
        return "" if any(value in limit for limit in lengths) else empty
    if isinstance(value, str):
        if len(value) > LONGEST:
            return f"is longer than {LONGEST:,} characters"
        return "has a control character" if any(sign < " " for sign in value) else ""
    if isinstance(value, int):
        return f"is too large; whole numbers end at {INT_LIMIT - 1}" if abs(value) >= INT_LIMIT else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is not a finite number"
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next(filter(None, map(invalid_value, inner)), "")


def _wrong_choice(value: Any, choices: Sequence[Any]) -> str:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return ""
    names = [str(choice) for choice in choices]
    meant = nearest(SYNONYMS.get(str(value), str(value)), names)
    return f"is not one of {', '.join(names)}" + meant.rstrip("?").replace(" Did you mean", "; did you mean")


def _container(kind: Any) -> type | None:
    """Sequence or Mapping where an annotation, or a value, is of that kind."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _container(get_args(kind)[0])
    for container in (Mapping, Sequence):
        if isinstance(kind, container) or (isinstance(origin, type) and issubclass(origin, container)):
            return None if isinstance(kind, str) else container
    return None


def _out_of_range(value: Any, limits: Sequence[Any]) -> str:
    for limit in limits:
        if isinstance(limit, ranges.Range) and value not in limit:
            finite = "" if isinstance(value, int) or math.isfinite(value) else " and finite"
            return f"is out of range: it must be {limit.words(value)}{finite}"
        if isinstance(limit, Length) and value not in limit:
            return f"has {len(value)} elements and needs {limit}" if value else "is empty"
    return ""


def _wrong_elements(values: Sequence[Any], annotation: Any) -> str:
    kinds = get_args(annotation)
    fixed = get_origin(annotation) is tuple and Ellipsis not in kinds
    if fixed and len(values) != len(kinds):
        return f"needs {len(kinds)} numbers"
    mismatches = (mismatch(value, kinds[number] if fixed else kinds[0]) for number, value in enumerate(values))
    return next(filter(None, mismatches), "")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a class or function that a configuration value is passed to."""

    annotation: Any  # None where it needs more than ranges, standard types and classes of this package
    required: bool
    written: str = ""  # the annotation in the source; empty where there is none


@cache
def signature(target: str) -> dict[str, Parameter]:
    """Parameters of a function, class or dataclass of this package, by name.

    Raises:
        BadInput: there is no such target, or it is not ours: a configuration must not run arbitrary code.
    """
    module, _, name = target.rpartition(".")
    if not module.startswith("twoviews.") or (tree := _tree(module)) is None:
        raise BadInput(
            f"_target_={target} is not part of twoviews, and only its own parts can be built from a configuration."
        )
    names = _Names(tree)
    definition = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if isinstance(definition, ast.ClassDef):
        init = next((node for node in definition.body if getattr(node, "name", None) == "__init__"), None)
        if init is None:
            if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
                return {}  # annotations of an abstract class are promises, not parameters
            attributes = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
            own = {
                attribute.target.id: _parameter(attribute.annotation, names, attribute.value is None)
                for attribute in attributes
                if isinstance(attribute.target, ast.Name)
            }
            return {**_inherited(definition, tree), **own}
        definition = init
    if not isinstance(definition, ast.FunctionDef):
        elsewhere = f", which is _target_: {_imported(tree)[name]}" if name in _imported(tree) else ""
        raise BadInput(f"_target_={target}: {module} does not define '{name}'{elsewhere}.")
    arguments = definition.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    parameters = zip([*arguments.args, *arguments.kwonlyargs], defaults, strict=True)
    return {
        parameter.arg: _parameter(parameter.annotation, names, default is None)
        for parameter, default in parameters
        if parameter.arg != "self"
    }


def _inherited(definition: ast.ClassDef, tree: ast.Module) -> dict[str, Parameter]:
    """Fields of the dataclasses that a dataclass of `tree` derives from, as far as they are imported by name."""
    imported = _imported(tree)
    bases = [imported[base.id] for base in definition.bases if isinstance(base, ast.Name) and base.id in imported]
    fields: dict[str, Parameter] = {}
    for base in bases:
        fields |= signature(base)
    return fields


def _imported(tree: ast.Module) -> dict[str, str]:
    """What a module imports by name from this package, and where it is defined."""
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in imports
        if f"{node.module}.".startswith("twoviews.")
        for alias in node.names
    }


@cache
def _tree(module: str) -> ast.Module | None:
    """The parsed source of a module of this package; None if there is no such file."""
    path = _SOURCES.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text()) if path.exists() else None


class _Names(dict):
    """What the names in the annotations of a module mean, looked up when they are used.

    Args:
        tree: of the module.
    """

    def __init__(self, tree: ast.Module):
        super().__init__()
        self.tree = tree

    def __missing__(self, name: str) -> Any:
        self[name] = None  # what it is while its own definition is looked at
        self[name] = self._meaning(name)
        return self[name]

    def _meaning(self, name: str) -> Any:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
                return _evaluate(node.value, self)
        target = _imported(self.tree).get(name)
        if target is None:
            return _KNOWN[name]
        module, _, original = target.rpartition(".")
        if module == ranges.__name__:
            return vars(ranges)[original]
        tree = _tree(module)
        if tree is None or any(getattr(node, "name", None) == original for node in tree.body):
            return type(name, (Component,), {"target": target})
        return _Names(tree)[original]  # an alias of a type, such as Side = Annotated[int, Range(at_least=8)]


def _parameter(annotation: ast.expr | None, names: _Names, required: bool) -> Parameter:
    return Parameter(_evaluate(annotation, names), required, ast.unparse(annotation) if annotation else "")


def _evaluate(node: ast.expr | None, names: _Names) -> Any:
    """An annotation's value, or None when it needs more than ranges, standard types and classes of this package."""
    if node is None:
        return None
    try:
        return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}}, names)
    except Exception:  # an annotation of torch's or our own classes: not for a configuration to fill in
        return None
