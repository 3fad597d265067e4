"""From the command line to a checked configuration: every mistake becomes one sentence that names the remedy.

The signature of what a group builds is the schema of its YAML: names, types and ranges stand there once. They are read
from the source text, so checking a command does not import torch.
"""

import ast
import builtins
import errno
import hashlib
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews import ranges
from twoviews.errors import BadInput, nearest
from twoviews.ranges import Count, Index

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
BAD_INPUT = 2  # exit code for what the user can put right

# What a run computes does not depend on these, so they are not part of its name.
_NOT_IN_DIGEST = ("fresh", "preview", "tracking")


@dataclass(frozen=True)
class Train:
    """Root scalars of conf/train.yaml."""

    seed: Index
    epochs: Count
    batch_size: Count
    fresh: bool
    preview: bool


@dataclass(frozen=True)
class Evaluate:
    """Root scalars of conf/evaluate.yaml."""

    run: str


_ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate}


def entry(name: Literal["train", "evaluate"]) -> Callable[[Callable[[DictConfig, Path], int | None]], Callable[[], None]]:
    """A command whose configuration is conf/<name>.yaml: main(cfg, folder) gets it checked, with the run folder.

    BadInput and what Hydra finds wrong are printed in one sentence and end with exit code 2; other exceptions are
    defects and keep their traceback. A number returned by main becomes the exit code.
    """

    def decorate(main: Callable[[DictConfig, Path], int | None]) -> Callable[[], None]:
        codes: list[int] = []

        def job(cfg: DictConfig) -> None:
            # What the user can put right is not raised through Hydra, which would print the command around it, and
            # which in a sweep would keep the other points from running.
            folder = Path(HydraConfig.get().runtime.output_dir)
            try:
                check(name, cfg)
                codes.append(main(cfg, folder) or 0)
            except BadInput as error:
                codes.append(_bad_input(str(error)))
            except OSError as error:
                codes.append(_bad_input(_operating_system(error)))
            finally:
                _remove_if_empty(folder)

        def command() -> None:
            # Hydra would print its own message and exit with 1; this makes it raise instead.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            _register_run_name()
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
            except BadInput as error:
                codes.append(_bad_input(str(error)))
            except (HydraException, OmegaConfBaseException) as error:
                codes.append(_bad_input(_diagnose(name, sys.argv[1:], error)))
            except OSError as error:
                codes.append(_bad_input(_operating_system(error)))
            sys.exit(max(codes, default=0))

        return command

    return decorate


def _bad_input(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _operating_system(error: OSError) -> str:
    """A sentence for what the file system refuses; anything else is a defect and is raised again."""
    where = error.filename or "the run folder or the cache"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the device of {where}; free some, or move with hydra.run.dir= or data.cache=; checkpoints are intact."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
        return f"{where} cannot be used ({error.strerror.lower()}); choose another folder with hydra.run.dir= or data.cache=."
    raise error


# ---------------------------------------------------------------------------------------------------- the run's name


def digest(cfg: DictConfig) -> str:
    """Eight hex digits that change with everything that can change the result of a run."""
    content = {key: value for key, value in _plain(cfg).items() if key not in ("hydra", *_NOT_IN_DIGEST)}
    return hashlib.blake2b(repr(sorted(content.items())).encode(), digest_size=4).hexdigest()


def _plain(cfg: DictConfig) -> dict[str, Any]:
    open_copy = OmegaConf.create({key: cfg._get_node(key) for key in cfg if key != "hydra"})
    return typing.cast(dict[str, Any], OmegaConf.to_container(open_copy, resolve=True))


def _register_run_name() -> None:
    def run_name(*, _root_: DictConfig) -> str:
        choices = _root_.hydra.runtime.choices
        return f"{choices.method}-{choices.data}-{digest(_root_)}"

    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


# ------------------------------------------------------------------------------------------ values against signatures


def check(name: str, cfg: DictConfig) -> None:
    """Compare every key and value with the signature it goes to.

    Raises:
        BadInput: a key is unknown or missing, a value has the wrong type or is out of range.
    """
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    root = {field.name: field.type for field in fields(_ROOTS[name])}
    groups = [key for key in content if key not in root and key in _groups()]
    _check_keys("", content, root, [*root, *groups])
    for group in groups:
        _check_node(group, content[group])


def _check_node(path: str, node: Any) -> None:
    if not isinstance(node, Mapping):
        if node is not None:
            raise BadInput(f"{path}={node} is a whole group; choose one of its files: {', '.join(_options(path))}.")
    elif "_target_" in node:
        parameters = signature(str(node["_target_"]))
        given = {key: value for key, value in node.items() if key != "_target_"}
        _check_keys(f"{path}.", given, parameters, [*parameters])
    else:
        for key, value in node.items():
            _check_node(f"{path}.{key}", value)


def _check_keys(prefix: str, given: Mapping, annotations: Mapping[str, Any], known: Sequence[str]) -> None:
    for key, value in given.items():
        if key not in known:
            raise BadInput(_unknown_key(prefix, str(key), known))
        complaint = "is not set; give it a value" if value == "???" else _complaint(value, annotations.get(key))
        if complaint:
            shown = f"{prefix}{key}" if value == "???" else f"{prefix}{key}={value}"
            raise BadInput(f"{shown} {complaint}.")


def _unknown_key(prefix: str, key: str, known: Sequence[str]) -> str:
    close = nearest(key, known).replace("'", "'" + prefix, 1)
    where = f"{prefix.rstrip('.')} has no key '{key}'" if prefix else f"there is no key or group '{key}'"
    return f"{where}.{close} Known: {', '.join(known)}."


def _complaint(value: Any, annotation: Any) -> str:
    """What is wrong with a value, as the end of a sentence; empty when nothing is."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        complaint = _complaint(value, arguments[0])
        limits = [limit for limit in arguments[1:] if isinstance(limit, ranges.Range) and value not in limit] if not complaint else []
        return complaint or (f"is out of range: it must be {limits[0]}" if limits else "")
    if origin in (types.UnionType, typing.Union):
        complaints = [_complaint(value, one) for one in arguments]
        return "" if "" in complaints else complaints[0]
    if origin is Literal:
        return "" if value in arguments else f"is not one of {', '.join(map(str, arguments))}.{nearest(str(value), map(str, arguments))}".rstrip("?.") + (
            "?" if nearest(str(value), map(str, arguments)) else ""
        )
    if origin in (Sequence, list, tuple):
        if not isinstance(value, list):
            return "is not a list, such as [1,2]"
        kinds = arguments if origin is tuple and Ellipsis not in arguments else [arguments[0]] * len(value)
        if len(kinds) != len(value):
            return f"needs {len(kinds)} numbers"
        return next((complaint for one, kind in zip(value, kinds, strict=True) if (complaint := _complaint(one, kind))), "")
    if annotation is bool:
        return "" if isinstance(value, bool) else "is not true or false"
    if annotation is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else "is not a whole number"
    if annotation is float:
        return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else "is not a number"
    if annotation is str:
        return "" if isinstance(value, (str, int, float)) else "is not a text"
    if annotation is types.NoneType or annotation is None:
        return "" if value is None or annotation is None else "is not null"
    return ""


@cache
def signature(target: str) -> dict[str, Any]:
    """Parameter names of a function, class or dataclass of this package, with those annotations that can be checked."""
    module, _, name = target.rpartition(".")
    path = ROOT / "src" / Path(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if not module.startswith("twoviews") or not path.exists():
        raise BadInput(f"_target_={target} is not part of twoviews; only its own classes and functions can be built from a configuration.")
    tree = ast.parse(path.read_text())
    names = {**vars(builtins), **vars(typing), **vars(ranges), "Sequence": Sequence, "Mapping": Mapping}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = _evaluate(node.value, names)
    found = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if found is None:
        raise BadInput(f"_target_={target}: {module} has no '{name}'.")
    if isinstance(found, ast.ClassDef):
        init = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
        if init is None:
            return {
                node.target.id: _evaluate(node.annotation, names)
                for node in found.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
        found = init
    assert isinstance(found, ast.FunctionDef)
    parameters = [*found.args.args, *found.args.kwonlyargs]
    return {one.arg: _evaluate(one.annotation, names) for one in parameters if one.arg != "self"}


def _evaluate(node: ast.expr | None, names: dict[str, Any]) -> Any:
    """An annotation's value, or None (no check) when it needs more than the ranges and the standard types."""
    if node is None:
        return None
    try:
        return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}}, names)
    except Exception:  # an annotation of torch's or our own classes: not for a configuration to fill in
        return None


# --------------------------------------------------------------------------------------------- what Hydra could not do


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _diagnose(name: str, arguments: list[str], error: Exception) -> str:
    """One sentence for a command that Hydra refused, found by going through its overrides one by one."""
    GlobalHydra.instance().clear()
    overrides: list[Override] = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            return f"'{argument}' cannot be read as key=value; quote values with spaces or special characters: 'key=\"value\"'."
    choices = []
    for override in overrides:
        if (CONF / override.key_or_group).is_dir():
            choices.append(override.input_line)
            for value in _values(override):
                if value not in _options(override.key_or_group):
                    known = _options(override.key_or_group)
                    return f"{override.key_or_group}={value}: there is no such {override.key_or_group}.{nearest(value, known)} Known: {', '.join(known)}."
    known_content = _compose(name, [choice for choice in choices if "," not in choice])
    for override in overrides:
        sentence = _unknown_override(override, known_content)
        if sentence:
            return sentence
    return " ".join(str(error).split())


def _compose(name: str, choices: list[str]) -> Any:
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return OmegaConf.to_container(hydra.compose(name, choices), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return None


def _values(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, Sweep):
        value = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    values = value if isinstance(value, list) else [value]
    return [one.text if isinstance(one, QuotedString) else str(one) for one in values]


def _unknown_override(override: Override, content: Any) -> str:
    """The first part of a dotted key that the composed configuration does not have."""
    if content is None or override.key_or_group.startswith("hydra"):
        return ""
    prefix = ""
    for part in override.key_or_group.split("."):
        if isinstance(content, list):
            return ""
        if not isinstance(content, dict):
            return f"{prefix.rstrip('.')} is a single value and has no key '{part}'."
        if part not in content:
            known = [key for key in content if key != "_target_"] + ([group for group in _groups() if group not in content and group != "hydra"] if not prefix else [])
            return _unknown_key(prefix, part, known)
        prefix, content = f"{prefix}{part}.", content[part]
    return ""
