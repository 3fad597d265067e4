"""Values of a configuration against the signatures that they go to."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from twoviews.config.digest import REDUCED_FROM
from twoviews.config.groups import PASSED_BY_PROGRAM, PLUGIN_KEYS, files_without, groups, options, options_with, targets
from twoviews.config.values import flat, plain
from twoviews.errors import BadInput, nearest, shown
from twoviews.ranges import Count, Fraction, Range, Seed, Size, Temperature
from twoviews.signatures import Parameter, invalid_value, mismatch, signature

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Nodes that are neither a group nor a single value, and the class or function of each. Runs of earlier versions lack them.
NODES = {
    "sweep": "twoviews.sweeps.launching.SweepOptions",
    "pictures": "twoviews.figures.set_formats",
    "small_views": "twoviews.data.loader.SmallViews",
}
VIEW = "twoviews.data.draws.View"  # the class of each node below augmentation.views


@dataclass(frozen=True)
class Train:
    """Root scalars of conf/train.yaml."""

    seed: Seed
    epochs: Count
    batch_size: Size
    fresh: bool
    preview: bool
    find_batch: bool


@dataclass(frozen=True)
class Evaluate:
    """Root scalars of conf/evaluate.yaml."""

    run: str | Sequence[str]
    feature: Literal["backbone", "projection"]
    images: str | None
    format: Literal["torchvision", "timm", "safetensors", "onnx"]
    mean: Sequence[Fraction] | None
    std: Sequence[Annotated[float, Range(above=0, at_most=1)]] | None


ClusterCount = Annotated[int, Range(at_least=2)]


@dataclass(frozen=True)
class Cluster:
    """Root scalars of conf/cluster.yaml."""

    run: str
    clusters: ClusterCount | Sequence[ClusterCount]
    split: Literal["train", "memory", "test"]
    seed: Seed
    nredo: Count | None
    temperature: Temperature
    mean: Sequence[Fraction] | None
    std: Sequence[Annotated[float, Range(above=0, at_most=1)]] | None


ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate, "cluster": Cluster}

# Groups that a command cannot do without.
_NEEDED = {
    "train": ("method", "backbone", "data", "augmentation", "optimizer", "schedule", "runtime", "tracking"),
    "evaluate": ("runtime",),
    "cluster": ("runtime",),
}


def check(name: str, cfg: "DictConfig | dict[str, Any]") -> None:
    """Compare every key and value of a command's configuration, resolved or not, with the signature that it goes to.

    Raises:
        BadInput: keys are unknown or missing, values have the wrong type or are out of range; with all of them.
    """
    content, group_names = plain(cfg), groups()
    root = {field.name: Parameter(field.type, required=True) for field in fields(ROOTS[name])}
    nodes = [key for key in content if key in NODES]
    chosen = [key for key in content if key in group_names and key not in root]
    problems = [*_key_problems("", content, root, others=[*chosen, *nodes, REDUCED_FROM])]
    for group in _NEEDED[name]:
        if content.get(group) is None:
            problems.append(f"{group}=null leaves nothing to work with; choose one of: {', '.join(options(group))}.")
    for key in nodes:
        problems += _value_problems(key, content[key], NODES[key])
    for group in chosen:
        if content[group] is not None:
            problems += node_problems(group, content[group], PASSED_BY_PROGRAM.get(group, ()))
    augmentation = content.get("augmentation")
    views = augmentation.get("views") if isinstance(augmentation, Mapping) else None
    for view, recipe in views.items() if isinstance(views, Mapping) else ():
        if isinstance(recipe, Mapping):
            problems += _value_problems(f"augmentation.views.{view}", recipe, VIEW)
    if not isinstance(cfg, dict):
        problems = _without_repetitions(problems, cfg)
    if problems:
        raise BadInput(*problems)


def _without_repetitions(problems: Sequence[str], cfg: "DictConfig") -> list[str]:
    """The problems without those of keys that only repeat a root key with a problem, as schedule.epochs repeats epochs."""
    from omegaconf import OmegaConf

    keys = {problem.partition("=")[0] for problem in problems}
    raw = flat(OmegaConf.to_container(cfg, resolve=False))
    # Also with a default, as ${oc.select:format,safetensors}.
    repeated = {key: str(raw.get(key)).strip("${}").removeprefix("oc.select:").partition(",")[0] for key in keys}
    repeating = {key for key in keys if repeated[key] in keys - {key}}
    return [problem for problem in problems if problem.partition("=")[0] not in repeating]


def checked_plugin(cfg: "DictConfig", kind: Literal["launcher", "sweeper"]) -> dict[str, Any]:
    """The node from which `build` makes the launcher or the search of a sweep, from a configuration with Hydra's own node.

    Raises:
        BadInput: keys are unknown or missing, values have the wrong type or are out of range, or a plugin of Hydra's own
            was chosen.
    """
    node, key = plain(cfg.hydra[kind]), PLUGIN_KEYS[kind]
    if node.get(key) not in targets(kind):
        chosen = cfg.hydra.runtime.choices[f"hydra/{kind}"]
        raise BadInput(
            f"hydra/{kind}={chosen} is not a {kind} of this project; choose {', '.join(options(f'hydra/{kind}'))}."
        )
    values = {name: value for name, value in node.items() if name not in ("_target_", key)}
    if problems := [*_value_problems(f"hydra.{kind}", values, node[key])]:
        raise BadInput(*problems)
    return {"_target_": node[key], **values}


def is_node(value: Any) -> bool:
    """Whether a value describes an object to build."""
    return isinstance(value, Mapping) and "_target_" in value


def node_problems(path: str, node: Any, passed: Sequence[str] = ()) -> Iterator[str]:
    """A sentence for each value of a group's node that does not fit the signature of its `_target_`.

    The node of `protocol` has a node for each chosen file. It must not have parameters that the program passes.
    """
    group = path.partition(".")[0]
    if not isinstance(node, Mapping):
        choice = "protocol=[…]" if group == "protocol" else f"{group}=…"
        yield (
            f"{path}={shown(node)} is not possible, because {path} is a whole group; choose by {choice} among its files: "
            f"{', '.join(options(group))}."
        )
    elif path == "protocol" and "_target_" not in node:
        for key, value in node.items():
            yield from node_problems(f"{path}.{key}", value)
    elif node.get("_target_") not in targets(group):
        yield str(unknown_target(shown(node.get("_target_")), group))
    else:
        yield from _value_problems(path, node, node["_target_"], passed)


def _value_problems(path: str, node: Any, target: str, passed: Sequence[str] = ()) -> Iterator[str]:
    """A sentence for each value of a node that does not fit the signature of `target`."""
    parameters = {key: parameter for key, parameter in signature(target).items() if key not in passed}
    if isinstance(node, Mapping):
        values = {key: value for key, value in node.items() if key != "_target_"}
        yield from _key_problems(f"{path}.", values, parameters, target)
    else:
        keys = ", ".join(f"{path}.{key}" for key in parameters)
        yield f"{path}={shown(node)} is not possible, because {path} has keys; set them: {keys}."


def unknown_target(target: str, group: str = "") -> BadInput:
    """The error for a `_target_` that no file of a group, or of any group, names."""
    where = f"conf/{group}" if group else "conf/"
    allowed = f" (there: {', '.join(sorted(targets(group)))})" if group else ""
    return BadInput(
        f"_target_={target} is not part of twoviews: only what a file of {where} names can be built{allowed}."
    )


def _key_problems(
    prefix: str,
    values: Mapping,
    parameters: Mapping[str, Parameter],
    target: str = "",
    others: Sequence[str] = (),
) -> Iterator[str]:
    """A sentence for each key that is missing, unknown or not set, and for each value that does not fit its parameter.

    Args:
        prefix: keys above these, with a dot behind each; empty at the root.
        values: by key.
        parameters: that they are passed to.
        target: dotted path of the class or function that has the parameters; empty at the root.
        others: keys that there may be beside the parameters.
    """
    keys = [*parameters, *others]
    for key, parameter in parameters.items():
        if parameter.required and key not in values:
            yield absent_key(prefix, key, target)
    for key, value in values.items():
        if key not in keys:
            yield unknown_key(prefix, str(key), keys, [] if prefix else with_group(str(key), values, shown(value)))
        elif value == "???":
            example = {"run": "latest, or run=<the folder of a run>", "clusters": "[10,50]"}.get(str(key), "...")
            yield f"{prefix}{key} is not set; give it a value: {prefix}{key}={example}"
        elif key in parameters:
            problems = [*node_problems(f"{prefix}{key}", value)] if is_node(value) else []
            yield from problems
            annotation = parameters[key].annotation
            try:
                wrong = not problems and (mismatch(value, annotation) or invalid_value(value, annotation))
            except TypeError:
                yield _unusable_annotation(key, parameters[key], target)
                continue
            if wrong:
                wrong = wrong.replace("did you mean '", f"did you mean '{prefix}{key}=")
                yield f"{prefix}{key}={shown(value)} {wrong}."


def absent_key(prefix: str, key: str, target: str) -> str:
    """A sentence for a parameter of `target` that the configuration has no key for; `prefix` as in `unknown_key`."""
    files = files_without(key, target, prefix.removeprefix("hydra.").partition(".")[0])
    if not files:
        return f"{prefix}{key} is missing; give it a value: {prefix}{key}=..."
    return (
        f"{prefix}{key} is missing, a parameter of {target.rpartition('.')[2]}; add a line '{key}: ...' to "
        f"{' or '.join(files)}, or give it a value in this command: +{prefix}{key}=..."
    )


def _unusable_annotation(key: str, parameter: Parameter, target: str) -> str:
    """A sentence for a parameter whose annotation says nothing about values of a configuration."""
    module, _, name = target.rpartition(".")
    has = f"with the annotation {parameter.written}" if parameter.written else "without an annotation"
    return (
        f"{name} in {module} has the parameter {key} {has}, with which no value of a configuration can be compared; annotate "
        "it with a type of twoviews.ranges, such as Size, or with int, float, bool, str, Literal or Sequence of these."
    )


def unknown_key(prefix: str, key: str, keys: Sequence[str], suggestions: Sequence[str] = ()) -> str:
    """A sentence for a key that does not exist, with these overrides or the closest of the keys as a suggestion.

    `prefix` are the keys above it with a dot behind each; empty at the root.
    """
    where = f"{prefix.rstrip('.')} has no key '{shown(key)}'" if prefix else f"there is no key or group '{shown(key)}'"
    if suggestions:
        return f"{where}; write {' or '.join(suggestions)}."
    close = nearest(key, keys).replace("'", "'" + prefix, 1)
    listed = f"Known: {', '.join(keys)}." if keys else "It has none."
    return f"{where}.{close} {listed}"


def with_group(key: str, content: Any, value: str | None) -> list[str]:
    """Overrides that were probably meant by a key typed without its group: of this configuration first, then of other choices,
    then of the key that is spelt nearly so.

    `value` is as it was typed; None for a dotted key, as in a.b=1: then nothing is suggested.
    """
    if value is None:
        return []
    paths = [path for path in flat(content) if path.endswith(f".{key}") and not path.startswith("hydra.")]
    paths.sort(key=lambda path: path.startswith("protocol."))
    overrides = [f"{path}={value}" for path in paths]
    for group in groups():
        choices = [f"{group}={name}" for name in options_with(group, key)] if targets(group) else []
        if choices and not any(path.startswith(f"{group}.") for path in paths) and group != "protocol":
            overrides.append(f"{group}.{key}={value} with {' or '.join(choices)}")
    if overrides:
        return overrides
    at_root = {*content, *groups()}
    below = {path.rpartition(".")[2] for path in flat(content) if not path.startswith("hydra.")}
    close = difflib.get_close_matches(key, at_root | below, n=1, cutoff=0.8)
    return with_group(close[0], content, value) if close and close[0] in below - at_root else []
