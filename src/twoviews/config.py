"""From the command line to a checked configuration: every mistake becomes one sentence that names the remedy.

The signature of what a group builds is the schema of its YAML: names, types and ranges stand there once.
"""

import hashlib
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews import foreign, processes
from twoviews.command_line import understood
from twoviews.errors import BadInput, Stopped, nearest, shown, without_secrets
from twoviews.files import file_error
from twoviews.ranges import Count, Fraction, Range, Seed, Size, Temperature
from twoviews.signatures import BUILDS, Parameter, buildable, complaint, signature, unusable

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
BAD_INPUT = 2  # exit code for what the user can put right
STOPPED = 128  # plus the signal's number: exit code of a run that was stopped and can go on

# What a run computes does not depend on these, so they are not part of its name.
NOT_IN_DIGEST = (
    "fresh",
    "preview",
    "find_batch",
    "sweep",
    "tracking",
    "runtime.log_every",
    "runtime.checkpoint_seconds",
    "runtime.checkpoint_minutes",
    "runtime.cuda_graph",
    "runtime.deterministic",
    "data.workers",
    "data.cache",
)

# Nodes that are neither a group nor a single value, and what they go to. A point of a sweep has them no more.
_NODES = {"sweep": "twoviews.sweeps.launching.Options"}

# Parameters that the program fills in: a configuration must not, or the value would be replaced in silence.
_FILLED_IN = {
    "backbone": ("channels", "image_size"),
    "augmentation": ("size", "channels", "mean", "std"),
    "method": ("encoder", "labels", "classes"),
    "optimizer": ("param_groups", "batch_size"),
}


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


_ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate, "cluster": Cluster}

_LESS_MEMORY = {
    "train": "find_batch=true finds the largest batch_size that fits",
    "evaluate": "close other programs, or choose other protocols",
    "cluster": "close other programs, or cluster fewer images",
}

# Groups that a command cannot do without.
_NEEDED = {
    "train": ("method", "backbone", "data", "augmentation", "optimizer", "schedule", "runtime", "tracking"),
    "evaluate": ("runtime",),
    "cluster": ("runtime",),
}


def entry(
    name: Literal["train", "evaluate", "cluster"],
) -> Callable[[Callable[[DictConfig, Path], int | None]], Callable[[], None]]:
    """A command whose configuration is conf/<name>.yaml: main(cfg, folder) gets it checked, with the run folder.

    BadInput and what Hydra finds wrong are printed in one sentence and end with exit code 2; other exceptions are
    defects and keep their traceback. A number returned by main becomes the exit code.
    """

    def decorate(main: Callable[[DictConfig, Path], int | None]) -> Callable[[], None]:
        codes: list[int] = []
        begun: list[str] = []

        def job(cfg: DictConfig) -> None:
            begun.append("composed")
            # What the user can put right is not raised through Hydra, which would print the command around it, and
            # which in a sweep would keep the other points from running.
            folder = Path(HydraConfig.get().runtime.output_dir)
            try:
                if (
                    name == "train" and "method" not in HydraConfig.get().runtime.choices
                ):  # it came whole, from elsewhere
                    _complete(cfg)
                check(name, cfg)
                if name == "train":  # the others look at no folder of this name
                    foreign.refuse_links(folder)
                if sys.stdout.isatty():
                    print("loading torch …", flush=True)  # some seconds, in which a person would see nothing
                codes.append(main(cfg, folder) or 0)
                if codes[-1] >= STOPPED:
                    sys.exit(codes[-1])  # the points of a sweep after this one shall not begin
            except Stopped as stopped:
                if os.environ.get("RANK", "0") == "0":
                    print("stopped before the training began; the same command begins again.", file=sys.stderr)
                sys.exit(STOPPED + stopped.number)
            except BadInput as error:
                codes.append(_bad_input(*error.messages))
            except OSError as error:
                codes.append(_bad_input(_operating_system(error)))
            except (MemoryError, RuntimeError) as error:
                from twoviews.data.decoding import worker_trouble
                from twoviews.memory import ran_out

                if ran_out(error):
                    codes.append(_bad_input(f"the memory does not suffice ({shown(error)}); {_LESS_MEMORY[name]}."))
                elif isinstance(error, RuntimeError) and (sentence := worker_trouble(error)):
                    codes.append(_bad_input(sentence))
                else:
                    raise
            finally:
                _remove_if_empty(folder)

        def command() -> None:
            # Hydra would print its own message and exit with 1; this makes it raise instead.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            # Threads that spin while they wait for one that lost its core to another program make a step several times
            # slower on a busy machine; waiting asleep costs some per cent on an idle one. Read when torch is imported.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            # argparse takes overrides from one place only: none behind a -m that has some before it.
            sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
            _register_resolvers()
            _leave_out(sys.argv[1:])
            codes.clear()
            begun.clear()
            try:
                processes.settle(name, sweep=not {"-m", "--multirun"}.isdisjoint(sys.argv[1:]))
                _known_options(sys.argv[1:])
                _plain_configuration(sys.argv[1:])
                _known_choices(name, sys.argv[1:])
                sys.argv[1:] = understood(name, sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
            except BadInput as error:
                codes.append(_bad_input(*error.messages))
            except (HydraException, OmegaConfBaseException) as error:
                codes.append(_bad_input(*_sentences(name, sys.argv[1:], error)))
            except ValueError as error:
                if begun:
                    raise
                codes.append(_bad_input(*_sentences(name, sys.argv[1:], error)))
            except BrokenPipeError:  # the reader of `train.py --help | head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                codes.append(STOPPED + signal.SIGPIPE)
            except OSError as error:
                codes.append(_bad_input(_operating_system(error)))
            except KeyboardInterrupt:
                more = "goes on from the last checkpoint" if name == "train" else "begins again"
                print(f"interrupted; the same command {more}.", file=sys.stderr)
                codes.append(STOPPED + signal.SIGINT)
            sys.exit(max(codes, default=0))

        return command

    return decorate


def _leave_out(arguments: list[str]) -> None:
    """Two things that Hydra does at every start and nobody sees: together they take as long as all the rest.

    It composes the configuration twice, once only to read `hydra.mode`, which -m says here and no file; and for --help
    it lists the files of all groups, its own too, which our templates in conf/hydra/help do by `options`.
    """
    from hydra._internal.hydra import Hydra

    if not any("hydra.mode" in argument for argument in arguments):
        Hydra.get_mode = lambda *_, **__: None
    if "--hydra-help" not in arguments:
        Hydra.format_config_groups = lambda *_, **__: ""


def _known_options(arguments: list[str]) -> None:
    """Refuse what looks like an option and is none of Hydra's, for which argparse has a page and no remedy."""
    from hydra._internal.utils import get_args_parser

    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    for word in arguments:
        name = word.partition("=")[0]
        short = word[:2] in options  # whose value may follow without a space
        if word.startswith("-") and not short and not any(option.startswith(name) for option in options):
            key = name.lstrip("-").replace("-", "_")
            raise BadInput(f"there is no option {name}; values have no dashes, {key}=..., and --help lists them.")


def _known_choices(name: str, arguments: list[str]) -> None:
    """Refuse what Hydra would pass over without a word, or fall over: choices that are none, and empty dictionaries."""
    for word in arguments:
        key, _, value = word.partition("=")
        if value.strip() == "{}" and not key.startswith("hydra."):
            raise BadInput(
                f"{word} changes nothing, because dictionaries are merged; set single keys of {key} instead."
            )
    if any((CONF / re.split("[@=]", word.lstrip("+"))[0]).is_dir() for word in arguments if "=" in word):
        from twoviews.diagnosis import diagnose, unknown_choices

        if sentence := unknown_choices(arguments):
            raise BadInput(*dict.fromkeys([sentence, *diagnose(name, arguments)]))


def _plain_configuration(arguments: list[str]) -> None:
    """Refuse a configuration from elsewhere, as of a point of a sweep, that is more than plain values.

    Raises:
        BadInput: it is.
    """
    from hydra._internal.utils import get_args_parser

    given, _ = get_args_parser().parse_known_args(arguments)
    if given.config_path is None and given.config_name is None:
        return
    path = (CONF / (given.config_path or "") / (given.config_name or "config")).resolve()
    if not path.is_relative_to(CONF):
        path = path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")
        if not path.is_file():
            raise BadInput(f"{path} is not there; --config-path= takes the folder of a run, and --config-name=config.")
        foreign.refuse_links(path.parent)
        store = foreign.load(path).get("tracking", {}).get("uri")
        if not any(word.lstrip("+").startswith("tracking") for word in arguments):
            from twoviews.tracking import stores

            stores.refuse_unknown(store)
        if "@package" in path.read_text():  # a comment that Hydra follows
            raise BadInput(f"{path} is refused, because it has an @package line, which no run writes.")


def _complete(cfg: DictConfig) -> None:
    """Give a configuration of an earlier version what it lacks of the runtime, as far as no result depends on it."""
    if "runtime" not in cfg:
        return
    text = (CONF / "runtime" / "default.yaml").read_text()
    defaults = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    missing = [key for key in defaults if key not in cfg.runtime and f"runtime.{key}" in NOT_IN_DIGEST]
    for key in missing:
        OmegaConf.update(cfg, f"runtime.{key}", defaults[key], force_add=True)
    if missing:
        shown = ", ".join(f"runtime.{key}={defaults[key]}" for key in missing)
        print(f"the configuration is of an earlier version; what it lacks is taken from conf/runtime: {shown}")


def _sentences(name: str, arguments: list[str], error: Exception) -> list[str]:
    from twoviews.diagnosis import diagnose  # only needed for what is wrong

    sentences = diagnose(name, arguments, error)
    for argument in arguments:
        if "://" in argument or "tracking.uri" in argument:  # it may hold a password, however it is quoted
            sentences = [one.replace(argument, f"{argument.partition('=')[0]}=…") for one in sentences]
    return sentences


def _bad_input(*messages: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # several processes of torchrun find the same mistakes
        for message in messages:
            print(f"error: {without_secrets(message)}", file=sys.stderr)
    return BAD_INPUT


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder before anything is checked; a refused command leaves nothing behind."""
    for empty in (folder, Path("outputs").resolve()):
        if empty != Path.cwd() and empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def _operating_system(error: OSError) -> str:
    """A sentence for an error of the file system that a user can put right; any other is a defect and is raised again."""
    sentence = file_error(
        error, "the run folder or the cache", "choose another folder with hydra.run.dir= or data.cache="
    )
    if sentence is None:
        raise error
    return sentence


# ---------------------------------------------------------------------------------------------------- the run's name


def digest(cfg: DictConfig | dict[str, Any]) -> str:
    """Eight hex digits that change with everything that can change the result of a run."""
    values = {key: value for key, value in flat(_plain(cfg)).items() if not key.startswith(NOT_IN_DIGEST)}
    if any(key.startswith("runtime.") for key in values):  # of a run
        values.setdefault("runtime.compile", False)  # a former option: runs that did not use it keep their names
    numbers = {key: number(value) for key, value in values.items()}
    return hashlib.blake2b(repr(sorted(numbers.items())).encode(), digest_size=4).hexdigest()


def number(value: Any) -> Any:
    """The value, as a float where that is the same number: 1 is 1.0."""
    return float(value) if isinstance(value, int) and abs(value) <= 2**53 else value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, node in tree.items() for key, value in flat(node, f"{prefix}{name}.").items()}


def _plain(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    if isinstance(cfg, dict):
        return cfg
    open_copy = OmegaConf.create({key: cfg._get_node(key) for key in cfg if key != "hydra"})
    return typing.cast(dict[str, Any], OmegaConf.to_container(open_copy, resolve=True))


def _register_resolvers() -> None:
    def run_name(*, _root_: DictConfig) -> str:
        choices = _root_.hydra.runtime.choices
        return f"{choices.method}-{choices.data}-{digest(_root_)}"

    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("options", lambda group: ", ".join(options(group)), replace=True)  # for --help


def build(node: DictConfig | dict[str, Any], **given: Any) -> Any:
    """What a group's `_target_` makes of its values and those `given` beside them; `_partial_=True` leaves the call out.

    Raises:
        BadInput: no file of conf/ names this `_target_`, or a value does not fit its signature.
    """
    tree = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    target = tree.get("_target_") if isinstance(tree, dict) else None
    group = next((one for one in (*groups(), *BUILDS) if target in buildable(one)), None)
    if group is None:
        raise _not_ours(str(target))
    left_out = given.pop("_partial_", False)
    if problems := [*_node_problems(group, tree, (*given, *_FILLED_IN.get(group, ())))]:
        raise BadInput(*problems)
    made = _made(typing.cast(dict[str, Any], tree), given)
    return made if left_out else made()


def _made(node: Mapping[str, Any], given: Mapping[str, Any]) -> partial:
    """The call that a checked node stands for. Not Hydra's instantiate, which builds more than what was checked."""
    values = {key: _made(one, {})() if _builds(one) else one for key, one in node.items() if key != "_target_"}
    module, _, name = node["_target_"].rpartition(".")
    return partial(getattr(import_module(module), name), **values, **given)


def recorded_runtime(cfg: DictConfig, recorded: Mapping[str, Any], asked: Sequence[str]) -> tuple[Any, list[str]]:
    """How a run is evaluated, and a note on what this version does not know any more.

    That is as it was trained but for the precision, unless the command says otherwise.

    Args:
        cfg: of the command; keys that the run does not have are as there.
        recorded: the run's configuration; empty if it is no run.
        asked: the command's overrides.

    Raises:
        BadInput: a value does not fit.
    """
    there = recorded.get("runtime", {})
    known = {key: value for key, value in there.items() if key in cfg.runtime and key != "precision"}
    dotted = said(cfg, asked, "runtime")
    unknown = ", ".join(f"runtime.{key}" for key, value in there.items() if key not in cfg.runtime and value)
    notes = [f"{unknown} of the run is not known to this version and left out."] if unknown else []
    return build(DictConfig({**cfg.runtime, **known, **dotted})), notes


def said(cfg: DictConfig, asked: Sequence[str], node: str) -> dict[str, Any]:
    """The values of a node that the command sets, as they are in its configuration, where the last override has won.

    Args:
        cfg: of the command.
        asked: its overrides.
        node: a key at the root; choices of files for it are no values.
    """
    found = OmegaConf.create({node: {}})
    for override in OverridesParser.create().parse_overrides(list(asked)):
        key, value = override.key_or_group, override.value()
        for one in (f"{key}.{inner}" for inner in flat(value)) if isinstance(value, dict) and value else (key,):
            if one.startswith(f"{node}."):
                OmegaConf.update(found, one, OmegaConf.select(cfg, one), force_add=True)
    return typing.cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))[node]


def _builds(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _not_ours(target: str, group: str = "") -> BadInput:
    where = f"conf/{group}" if group else "conf/"
    known = f" (there: {', '.join(sorted(buildable(group)))})" if group else ""
    return BadInput(
        f"_target_={target} is not part of twoviews: only what a file of {where} names can be built{known}."
    )


# ------------------------------------------------------------------------------------------ values against signatures


def check(name: str, cfg: DictConfig | dict[str, Any]) -> None:
    """Compare every key and value of a configuration, resolved or not, with the signature it goes to.

    Raises:
        BadInput: keys are unknown or missing, values have the wrong type or are out of range; with all of them.
    """
    content = cfg if isinstance(cfg, dict) else typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    root = {field.name: field.type for field in fields(_ROOTS[name])}
    known = groups()
    chosen = [key for key in content if key not in root and key in known]
    nodes = [key for key in content if key in _NODES]
    annotations = {key: Parameter(annotation, required=True) for key, annotation in root.items()}
    problems = [*_key_problems("", content, annotations, [*root, *chosen, *nodes])]
    for group in _NEEDED[name]:
        if content.get(group) is None:
            problems.append(f"{group}=null leaves nothing to work with; choose one of: {', '.join(options(group))}.")
    for node in nodes:
        problems += _part_problems(node, content[node], _NODES[node])
    for group in chosen:
        if content[group] is not None:
            problems += _node_problems(group, content[group], _FILLED_IN.get(group, ()))
    views = _inside(_inside(content.get("augmentation")).get("views"))
    for view, recipe in views.items():
        if isinstance(recipe, Mapping):
            problems += _part_problems(f"augmentation.views.{view}", recipe, "twoviews.data.views.View")
    if isinstance(cfg, DictConfig):
        problems = _causes(problems, cfg)
    if problems:
        raise BadInput(*problems)


def _causes(problems: Sequence[str], cfg: DictConfig) -> list[str]:
    """The problems, without those of keys that only repeat a key at the root which has one, as schedule.epochs does."""
    keys = {problem.partition("=")[0] for problem in problems}
    raw = flat(OmegaConf.to_container(cfg, resolve=False))
    repeated = {key for key in keys if str(raw.get(key)).strip("${}") in keys - {key}}
    return [problem for problem in problems if problem.partition("=")[0] not in repeated]


def check_plugin(cfg: DictConfig, kind: Literal["launcher", "sweeper"]) -> dict[str, Any]:
    """What `build` makes the dispatch or the search of a sweep from, after its values were compared with its signature.

    Raises:
        BadInput: keys are unknown or missing, values have the wrong type or are out of range, or one of Hydra's own was
            chosen.
    """
    given, key = _inside(OmegaConf.to_container(cfg.hydra[kind], resolve=True)), BUILDS[kind]
    if given.get(key) not in buildable(kind):
        chosen = cfg.hydra.runtime.choices[f"hydra/{kind}"]
        raise BadInput(f"hydra/{kind}={chosen} is not ours; choose {', '.join(options(f'hydra/{kind}'))}.")
    values = {name: value for name, value in given.items() if name not in ("_target_", key)}
    if problems := [*_part_problems(f"hydra.{kind}", values, given[key])]:
        raise BadInput(*problems)
    return {"_target_": given[key], **values}


def _inside(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else {}


def _part_problems(path: str, node: Any, target: str) -> Iterator[str]:
    """What is wrong with the values of a node that goes to `target` without naming it."""
    parameters = signature(target)
    if isinstance(node, Mapping):
        yield from _key_problems(f"{path}.", node, parameters, [*parameters])
    else:
        keys = ", ".join(f"{path}.{key}" for key in parameters)
        yield f"{path}={shown(node)} is not possible, because {path} has keys; set them: {keys}."


def _node_problems(path: str, node: Any, filled_in: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with a node that a group's files make, or with `protocol`, which has a node for each of them."""
    group = path.partition(".")[0]
    if not isinstance(node, Mapping):
        choice = "protocol=[…]" if group == "protocol" else f"{group}=…"
        yield (
            f"{path}={shown(node)} is not possible, because {path} is a whole group; choose by {choice} among its files: "
            f"{', '.join(options(group))}."
        )
    elif path == "protocol" and "_target_" not in node:
        for key, value in node.items():
            yield from _node_problems(f"{path}.{key}", value)
    elif node.get("_target_") not in buildable(group):
        yield str(_not_ours(shown(node.get("_target_")), group))
    else:
        parameters = {key: value for key, value in signature(node["_target_"]).items() if key not in filled_in}
        given = {key: value for key, value in node.items() if key != "_target_"}
        yield from _key_problems(f"{path}.", given, parameters, [*parameters])


def _key_problems(
    prefix: str, given: Mapping, parameters: Mapping[str, Parameter], known: Sequence[str]
) -> Iterator[str]:
    for key, parameter in parameters.items():
        if parameter.required and key not in given:
            yield f"{prefix}{key} is missing; give it a value: {prefix}{key}=..."
    for key, value in given.items():
        if key not in known:
            yield unknown_key(prefix, str(key), known, [] if prefix else elsewhere(str(key), given, shown(value)))
        elif value == "???":
            example = {"run": "latest, or run=<the folder of a run>", "clusters": "[10,50]"}.get(str(key), "...")
            yield f"{prefix}{key} is not set; give it a value: {prefix}{key}={example}"
        elif key in parameters:
            problems = [*_node_problems(f"{prefix}{key}", value)] if _builds(value) else []
            yield from problems
            annotation = parameters[key].annotation
            if not problems and (wrong := complaint(value, annotation) or unusable(value, annotation)):
                wrong = wrong.replace("did you mean '", f"did you mean '{prefix}{key}=")
                yield f"{prefix}{key}={shown(value)} {wrong}."


def unknown_key(prefix: str, key: str, known: Sequence[str], meant: Sequence[str] = ()) -> str:
    """A sentence for a key that is not there, with what was probably meant: of `meant`, what could be typed, or of `known`."""
    where = f"{prefix.rstrip('.')} has no key '{shown(key)}'" if prefix else f"there is no key or group '{shown(key)}'"
    if meant:
        return f"{where}; write {' or '.join(meant)}."
    close = nearest(key, known).replace("'", "'" + prefix, 1)
    listed = f"Known: {', '.join(known)}." if known else "It has none."
    return f"{where}.{close} {listed}"


def elsewhere(key: str, content: Any, value: str | None) -> list[str]:
    """What could be typed for a key without its group: the keys of that name in a configuration, else in other files.

    Args:
        key: as it was typed.
        content: of the command; what is none is passed over.
        value: as it was typed; None: there was more behind the key.
    """
    if value is None:
        return []
    paths = [path for path in flat(content) if path.endswith(f".{key}") and not path.startswith("hydra.")]
    paths.sort(key=lambda path: path.startswith("protocol."))
    typed = [f"{path}={value}" for path in paths]
    for group in groups():
        files = {Path(file).stem: OmegaConf.load(file) for file in sorted((CONF / group).glob("*.yaml"))}
        choices = [f"{group}={name}" for name, file in files.items() if "_target_" in file and key in file]
        if choices and not any(path.startswith(f"{group}.") for path in paths) and group != "protocol":
            typed.append(f"{group}.{key}={value} with {' or '.join(choices)}")
    return typed


def groups() -> list[str]:
    """The config groups."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """What can be chosen in a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
