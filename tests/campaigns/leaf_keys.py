"""Every key of every configuration file x values that it should not have, and some that it may have.

    python tests/campaigns/leaf_keys.py                      # all keys in this process, then 40 real commands
    python tests/campaigns/leaf_keys.py --only method.moco   # the keys whose names begin so
    python tests/campaigns/leaf_keys.py --commands 0 --table accepted.txt

A parameter that several files set gets all values through the first and a few, drawn at random, through each other.
Each case is one command: the files that hold the key, the key, and a value, composed, checked and, where it is accepted,
built into the parts of a training on 32 small images, of which one step is taken. What a value has to be is read here from
the annotation of the parameter that it goes to, by a few lines of their own. It counts, and exits with 1 unless all are 0:

    tracebacks   exceptions other than BadInput
    accepted     values that the annotation excludes, and that were taken nonetheless
    refused      values that the annotation allows, and that were called wrong by the comparison with it
    unclear      messages of more than one line for a mistake, of more than 1,000 characters, or without the key
    hangs        cases that took longer than 60 seconds

`accepted.txt` (--table) lists every accepted value of every key, for a person to look through.
"""

import argparse
import contextlib
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import typing
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src")]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  which is imported in the middle of a case otherwise, and takes as long as many
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from twoviews.assembly import check_without_data, make_parts, make_views  # noqa: E402
from twoviews.config.building import build  # noqa: E402
from twoviews.config.checks import (  # noqa: E402
    NODES,
    ROOTS,
    VIEW,
    check,
    checked_plugin,
)
from twoviews.config.command_line import parsed, wrong_choice  # noqa: E402
from twoviews.config.composition import register_resolvers  # noqa: E402
from twoviews.config.groups import CONF, PASSED_BY_PROGRAM, PLUGIN_KEYS, groups, options  # noqa: E402
from twoviews.config.values import flat  # noqa: E402
from twoviews.data.images import ImageData, Images  # noqa: E402
from twoviews.errors import BadInput  # noqa: E402
from twoviews.ranges import Length, Range  # noqa: E402
from twoviews.runtime import Runtime  # noqa: E402
from twoviews.signatures import Component, signature  # noqa: E402
from twoviews.step import TrainStep  # noqa: E402
from twoviews.sweeps.composing import Composer  # noqa: E402

LIMIT = 60  # seconds for a case; images of 4096 px take twenty on an idle core
TEXT = 1000  # characters of a message
AGAIN = 4  # values of a key whose parameter another file has given all values to
VALUES = [
    *("nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "-0.5", "1e12", "1000000000000", "-1000000000000", "-0.0"),
    *("1e-400", "1e300", "9223372036854775807", "9223372036854775808", "1" + 400 * "0", "null", "''", "' '", "abc"),
    *(
        "true",
        "false",
        "[]",
        "{}",
        "[1,null]",
        "[1]",
        "[abc]",
        "[nan]",
        "[[1]]",
        "{a:1}",
        "'1'",
        "'${nothing}'",
        "'a b'",
    ),
    *("'first\nsecond'", "'\u0000'", "x" * 10_000, "'../..'", "'???'", "[1000000000000]", "gpu", "1,2", "range(1,0)"),
]
# Small parts around the key in question; of keys that a choice does not have, nothing is set.
SMALL = {
    "batch_size": 16,
    "epochs": 100,
    "backbone.width": 4,
    "method.queue_size": 16,
    "method.embed_dim": 8,
    "method.hidden_dim": 8,
    "method.prototypes": 8,
    "method.clusters": "null",
    "method.negative_prototypes": "null",
    "runtime.device": "cpu",
    "runtime.precision": "fp32",
}
NOT_BUILT = ("cifar10", "cifar100", "stl10")  # data sets that would be downloaded


@dataclass(frozen=True)
class Key:
    """A key and where it is: `files` choose the configuration files that have it; `node` is a whole dictionary."""

    command: str
    files: tuple[str, ...]
    path: str
    annotation: Any
    node: bool = False
    target: str = ""  # what the value goes to

    def __str__(self) -> str:
        return f"{' '.join((self.command, *self.files))} {self.path}"


# --------------------------------------------------------------------------------------------------------------- keys


def keys() -> Iterator[Key]:
    """All of them: of the roots, of each file of each group, and of the launchers and sweepers."""
    for command, root in ROOTS.items():
        for field in fields(root):
            yield Key(command, (), field.name, field.type)
    for node, target in NODES.items():
        yield from _of("train", (), node, target)
    for group in groups():
        if group in ("experiment", "special", "hydra"):
            continue
        for option in options(group):
            choice = f"{group}=[{option}]" if group == "protocol" else f"{group}={option}"
            for command in ("train", "evaluate") if group in ("protocol", "runtime") else ("train",):
                yield Key(command, (choice,), group, None, node=True)
                cfg = OmegaConf.to_container(composed(command, (choice,)), resolve=True)
                for path, node in _nodes(group, cfg.get(group)):
                    yield from _of(command, (choice,), path, node["_target_"], PASSED_BY_PROGRAM.get(group, ()))
                for view in cfg["augmentation"]["views"] if group == "augmentation" else {}:
                    yield from _of(command, (choice,), f"augmentation.views.{view}", VIEW)
    for kind, builds in PLUGIN_KEYS.items():
        for option in options(f"hydra/{kind}"):
            node = OmegaConf.load(CONF / "hydra" / kind / f"{option}.yaml")
            if builds in node:
                yield from _of("train", (f"hydra/{kind}={option}",), f"hydra.{kind}", node[builds])


def _of(command: str, files: tuple[str, ...], path: str, target: str, filled_in: Sequence[str] = ()) -> Iterator[Key]:
    yield Key(command, files, path, None, node=True, target=target)
    for name, parameter in signature(target).items():
        if name not in filled_in:
            yield Key(command, files, f"{path}.{name}", parameter.annotation, target=target)


def _nodes(path: str, node: Any) -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, inner in node.items():
            yield from _nodes(f"{path}.{key}", inner)


def composed(command: str, overrides: Sequence[str], hydra: bool = False) -> DictConfig:
    """As Hydra composes it."""
    return compose(
        command,
        [*overrides, *(["run=x", "clusters=[2]"][: 2 if command == "cluster" else 1] if command != "train" else [])],
        return_hydra_config=hydra,
    )


# ------------------------------------------------------------------------------------------------------------- values


def values(annotation: Any) -> list[str]:
    """What is tried: the same for all keys, and the neighbours of the limits of this one."""
    more: list[str] = []
    for limit in _ranges(annotation):
        for bound in (limit.above, limit.at_least, limit.below, limit.at_most):
            if bound is not None:
                more += [str(bound), str(bound - 1), str(bound + 1), str(bound - 1e-3), str(bound + 1e-3)]
    for choice in get_args(annotation) if get_origin(annotation) is Literal else ():
        more += [str(choice), f"{choice}x", str(choice).upper()]
    return list(dict.fromkeys([*VALUES, *more, *(f"[{one}]" for one in more), *(f"[{one},{one}]" for one in more)]))


def _ranges(annotation: Any) -> list[Range]:
    if isinstance(annotation, Range):
        return [annotation]
    return [limit for one in get_args(annotation) for limit in _ranges(one)]


def allowed(value: Any, annotation: Any) -> bool:
    """Whether an annotation, with what is said of all numbers, texts and lists, allows a value."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        lengths = [one for one in inner[1:] if isinstance(one, Length)]
        if lengths and isinstance(value, list) and not value:
            return 0 in [one.at_least for one in lengths]
        numbers = all(value in one for one in inner[1:] if isinstance(one, Range)) if _number(value) else True
        sizes = all(value in one for one in lengths) if isinstance(value, (list, dict)) else True
        return allowed(value, inner[0]) and numbers and sizes
    if origin in (typing.Union, types.UnionType):
        return any(allowed(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, list) and len(value) == len(inner) and all(map(allowed, value, inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and bool(value) and all(allowed(one, inner[0]) for one in value)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return isinstance(value, dict) and all(allowed(one, inner[1]) for one in value.values())
    if annotation is dict:
        return isinstance(value, dict)
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return isinstance(value, dict) and value.get("_target_") == annotation.target
    if annotation in (bool, types.NoneType):
        return isinstance(value, annotation)
    if annotation is str:
        return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()
    return _number(value) and (annotation is float or isinstance(value, int))


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


# -------------------------------------------------------------------------------------------------------------- cases


class Hang(Exception):
    """A case took too long."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Hang after so many seconds."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Campaign:
    """Runs cases and counts what became of them."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.composers: dict[tuple[str, tuple[str, ...]], Composer] = {}
        self.leaves: dict[tuple[str, ...], set[str]] = {}
        self.counts: Counter[str] = Counter()
        self.failures = 0
        self.by_hydra: list[tuple[Key, str]] = []
        self.taken: dict[str, list[str]] = defaultdict(list)
        self.data = {size: noise(size) for size in (32, 64)}

    def case(self, key: Key, text: str) -> None:
        """One value of one key."""
        self.counts["cases"] += 1
        try:
            with limited(LIMIT), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                what, message = self._outcome(key, text)
        except Hang:
            what, message = "hangs", ""
        except Exception:  # every kind of it is what is looked for
            what, message = "tracebacks", traceback.format_exc()
        self.counts[what] += 1
        if what == "taken":
            self.taken[str(key)].append(text if len(text) < 40 else f"{text[:37]}…")
        elif what != "said":
            self.fail(f"{what}: {key}={text[:80]!r} {message}")

    def fail(self, failure: str) -> None:
        """Say what went wrong when it does."""
        self.failures += 1
        print(failure, file=sys.stderr, flush=True)

    def _outcome(self, key: Key, text: str) -> tuple[str, str]:
        overrides, _ = parsed([f"{key.path}={text}"])
        if any(wrong_choice(key.command, override) for override in overrides):  # which the command asks first
            self.by_hydra.append((key, text))
            return "said", ""
        try:
            value, compare, build = self._composed(key, f"{key.path}={text}")
        except (HydraException, OmegaConfBaseException, ValueError):  # which diagnosis.py puts into a sentence
            self.by_hydra.append((key, text))
            return "said", ""
        if (
            key.path == "protocol" and text == "[]"
        ):  # evaluate.py refuses it when it has the run, and train.py measures nothing
            return "said" if key.command == "evaluate" else "taken", ""
        if key.node and text == "{}":  # which is merged, and which the command refuses
            return "said", ""
        fits = not key.node and (allowed(value, key.annotation) or value == "???")
        try:
            compare()
        except OmegaConfBaseException:  # a sentence of the command, too
            self.by_hydra.append((key, text))
            return "said", ""
        except BadInput as error:
            if problem := _unclear(error, key):
                return "unclear", problem
            return ("refused", str(error)) if fits and value != "???" else ("said", "")
        if not fits:
            return "accepted", ""
        try:
            build()
        except BadInput as error:
            problem = _unclear(error, None)
            return ("unclear", problem) if problem else ("said", "")
        return "taken", ""

    def _composed(self, key: Key, override: str) -> tuple[Any, Callable[[], object], Callable[[], object]]:
        """The value that it stands for, what compares it with its annotation, and what builds the rest."""
        if key.path.startswith("hydra."):
            kind: Any = key.path.split(".")[1]
            cfg = composed("train", [*key.files, override], hydra=True)
            value = _select(OmegaConf.to_container(cfg.hydra[kind]), key.path.split(".")[2:])
            return value, lambda: checked_plugin(cfg, kind), lambda: build(DictConfig(checked_plugin(cfg, kind)))
        place = key.command, key.files
        if place not in self.composers:
            self.composers[place] = Composer(lambda overrides: composed(key.command, overrides))
        content = self.composers[place]([*key.files, *self._small(key), override]).config

        def build_rest() -> None:
            if key.command == "train":
                self._train(key, OmegaConf.create(dict(content)))
            for node in content.get("protocol", {}).values():
                build(node)

        return _select(content, key.path.split(".")), lambda: check(key.command, content), build_rest

    def _small(self, key: Key) -> list[str]:
        if key.command != "train":
            return []
        files = ["backbone=tiny"] if not key.path.startswith("backbone") else []
        there = self._leaves((*key.files, *files))
        data = ["data=folder", f"data.root={self.scratch}/images", f"data.cache={self.scratch}/cache", "data.workers=0"]
        if key.path.startswith("data"):
            data = []
            if "data.root" in there:
                data += [f"data.root={self.scratch}/{'images.npz' if key.files == ('data=array',) else 'images'}"]
            data += [f"data.cache={self.scratch}/cache"] if "data.cache" in there else []
        small = [f"{name}={value}" for name, value in SMALL.items() if name in there and name != key.path]
        return [*files, *data, *small, "tracking=files"] if "tracking" not in key.path else [*files, *data, *small]

    def _leaves(self, files: tuple[str, ...]) -> set[str]:
        if files not in self.leaves:
            self.leaves[files] = {*flat(OmegaConf.to_container(composed("train", files), resolve=False))}
        return self.leaves[files]

    def _train(self, key: Key, cfg: DictConfig) -> None:
        """What train.py makes of it, and one step."""
        device, runtime = torch.device("cpu"), build(cfg.runtime)
        assert isinstance(runtime, Runtime)
        check_without_data(cfg, runtime, runtime.torch_device())
        if key.path.startswith("data."):
            if key.files[0].partition("=")[2] in NOT_BUILT:
                return
            data = build(cfg.data)
        else:
            data = self.data[64 if key.files and key.files[0].startswith("backbone=") else 32]
        if not key.path.startswith(
            ("data.", "method", "augmentation", "backbone", "optimizer", "runtime", "batch", "seed")
        ):
            return
        views = make_views(cfg, data)
        parts = make_parts(cfg, data, views, runtime, device)
        if key.path.startswith(("method", "augmentation", "optimizer")):
            parts.loader.set_epoch(0)
            step = TrainStep(parts.method.train(), parts.optimizer, runtime, device, print)
            step(next(iter(parts.loader)), seed=0, lr_factor=1.0, step=0, steps=2, epochs=2)


def _select(content: Any, path: Sequence[str]) -> Any:
    for part in path:
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _unclear(error: BadInput, key: Key | None) -> str:
    """What is not clear about messages, which name the key if that is given; empty if nothing is."""
    for message in error.messages:
        if len(message) > TEXT or not message.strip():
            return f"a message of {len(message)} characters: {message[:200]}"
    if key and not any(key.path.rpartition(".")[2] in message for message in error.messages):
        return f"no message names {key.path}: {error}"
    return ""


def noise(size: int) -> ImageData:
    """32 images of noise in 4 classes."""
    pixels = torch.randint(256, (32, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(pixels, torch.full((32, 2), size), torch.arange(32) % 4)
    facts = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "digest": "0", "notes": ()}
    names = tuple("abcd")
    return ImageData(name="noise", train=split, memory=split, test=split, classes=names, channels=3, size=size, **facts)


def save_images(folder: Path) -> None:
    """The same as files, for data=folder and data=array."""
    import numpy as np
    from PIL import Image

    pixels = noise(32).train.pixels.numpy().transpose(0, 2, 3, 1)
    for split in ("train", "test"):
        for number, image in enumerate(pixels):
            place = folder / "images" / split / "abcd"[number % 4]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(32) % 4)


# ----------------------------------------------------------------------------------------------------------- commands


def command(key: Key, text: str, scratch: Path) -> str:
    """The same by the command itself: what is wrong with how it ends; empty if nothing is."""
    more = {
        "train": ["preview=true", "tracking=files"],
        "evaluate": ["run=nothing"],
        "cluster": ["run=nothing", "clusters=[2]"],
    }
    words = [*key.files, *(one for one in more[key.command] if one.partition("=")[0] != key.path), f"{key.path}={text}"]
    if "\0" in text:
        return ""  # which no command line can have
    words += ["-m"] if key.path.startswith("hydra.") else []
    words = [word for word in words if word != "preview=true"] + ["sweep.plan=true"] if "-m" in words else words
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / f"{key.command}.py"), *words],
            capture_output=True, text=True, cwd=scratch, timeout=180, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"hangs: {words}"
    lines = done.stderr.strip().splitlines()
    if "Traceback" in done.stderr or done.returncode not in (0, 2, 3):
        return f"exit code {done.returncode}: {words}\n{done.stderr[-2000:]}"
    if done.returncode == 2 and not (lines and all(line.startswith("error: ") for line in lines[-1:])):
        return f"no sentence: {words}\n{done.stderr[-2000:]}"
    if done.returncode == 0 and not key.node and "sweep.plan=true" not in words and text not in ("1,2",):
        value = OmegaConf.create(f"a: {text}") if len(text) < 50 and "\n" not in text else None
        if value is not None and not allowed(OmegaConf.to_container(value)["a"], key.annotation):
            return f"accepted: {words}"
    return ""


def main() -> int:
    """Run everything, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="keys whose file and name begin so, such as method.moco.temperature")
    parser.add_argument("--commands", type=int, default=40, help="cases that are tried as real commands, too")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these")
    parser.add_argument("--table", type=Path, help="where the table of accepted values goes; not given: it is printed")
    given = parser.parse_args()
    register_resolvers()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        save_images(Path(scratch))
        # A nested part is a parameter of what is around it, which says what it may be.
        known = {str(key): key for key in sorted(keys(), key=lambda key: not key.node)}
        campaign, tried = Campaign(Path(scratch)), [key for name, key in known.items() if given.only in name]
        seen, choose = set(), random.Random(given.seed)
        for number, key in enumerate(tried):
            texts, same = values(key.annotation), (key.command, key.path, key.target)
            for text in choose.sample(texts, AGAIN) if same in seen else texts:
                campaign.case(key, text)
            seen.add(same)
            if number % 20 == 19:
                print(
                    f"{number + 1} of {len(tried)} keys, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
                )
        cases = [(key, choose.choice(values(key.annotation))) for key in choose.choices(tried, k=given.commands // 2)]
        if campaign.by_hydra:
            cases += choose.choices(campaign.by_hydra, k=given.commands - len(cases))
        for key, text in cases:
            campaign.counts["commands"] += 1
            if problem := command(key, text, Path(scratch)):
                campaign.counts["commands that failed"] += 1
                campaign.fail(problem)
    table = "".join(f"{name}\n    {'  '.join(taken)}\n" for name, taken in campaign.taken.items())
    given.table.write_text(table) if given.table else print(table)
    wrong = ("tracebacks", "accepted", "refused", "unclear", "hangs", "commands that failed")
    shown = {
        "keys": len(tried),
        **{name: campaign.counts[name] for name in ("cases", "said", "taken", "commands", *wrong)},
    }
    print(", ".join(f"{count:,} {name}" for name, count in shown.items()), f"in {time.monotonic() - start:.0f} s")
    return int(campaign.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
