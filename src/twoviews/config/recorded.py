"""Configurations that runs have recorded, perhaps with an earlier version of this project."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from twoviews import foreign
from twoviews.config.building import build
from twoviews.config.digest import NOT_IN_DIGEST
from twoviews.config.groups import CONF
from twoviews.config.values import flat, plain
from twoviews.errors import BadInput


def largest_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """`scale` and `flip` of the views of a training, of several the one with the largest crops; empty without views.

    They say what leaves these images what they are: mirrored digits are other signs.

    Raises:
        BadInput: it has views that no run has.
    """
    views = (config.get("augmentation") or {}).get("views") or {}
    if not views:
        return {}
    try:
        largest = max(views.values(), key=lambda view: (*map(float, view["scale"]), float(view["flip"])))
        low, high = largest["scale"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"augmentation.views of the run is none that a run writes ({foreign.short(error)}).") from None
    return {"scale": [low, high], "flip": largest["flip"]}


def refuse_unsafe(folder: str | None, name: str | None, arguments: Sequence[str]) -> None:
    """Refuse a configuration outside of conf/, such as that of a job in a sweep, that is more than plain values.

    It is named by --config-path and --config-name of a command with these arguments.

    Raises:
        BadInput: it is, or it is not there.
    """
    path = (CONF / (folder or "") / (name or "config")).resolve()
    if path.is_relative_to(CONF):
        return
    path = path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")
    if not path.is_file():
        raise BadInput(f"{path} does not exist; --config-path= takes the folder of a run, and --config-name=config.")
    foreign.refuse_links(path.parent)
    uri = foreign.load(path).get("tracking", {}).get("uri")
    if not any(word.lstrip("+").startswith("tracking") for word in arguments):
        from twoviews.tracking import uris

        uris.refuse_untrusted(uri)
    if "@package" in path.read_text():  # a comment that Hydra follows
        raise BadInput(f"{path} is refused, because it has an @package line, which no run writes.")


def add_missing_runtime(cfg: DictConfig) -> None:
    """Give a configuration of an earlier version the keys of runtime that it lacks, where no result depends on them."""
    if "runtime" not in cfg:
        return
    defaults = plain(cast(DictConfig, OmegaConf.load(CONF / "runtime" / "default.yaml")))
    missing = [key for key in defaults if key not in cfg.runtime and f"runtime.{key}" in NOT_IN_DIGEST]
    for key in missing:
        OmegaConf.update(cfg, f"runtime.{key}", defaults[key], force_add=True)
    if missing:
        listed = ", ".join(f"runtime.{key}={defaults[key]}" for key in missing)
        print(f"the configuration is of an earlier version; missing keys are taken from conf/runtime: {listed}")


def recorded_runtime(cfg: DictConfig, recorded: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """The Runtime to evaluate a run with, and a note on recorded keys that this version does not know.

    It is the one of the training (`recorded`; empty for weights that no run recorded) except for the precision, unless the
    command sets a value. Keys that the run does not have are those of the command.

    Raises:
        BadInput: a value does not fit.
    """
    runtime = recorded.get("runtime", {})
    accepted = {key: value for key, value in runtime.items() if key in cfg.runtime and key != "precision"}
    unknown = ", ".join(f"runtime.{key}" for key, value in runtime.items() if key not in cfg.runtime and value)
    notes = [f"{unknown} of the run is not known to this version and left out."] if unknown else []
    return build(DictConfig({**cfg.runtime, **accepted, **overridden(cfg, overrides, "runtime")})), notes


def overridden(cfg: DictConfig, overrides: Sequence[str], node: str) -> dict[str, Any]:
    """The values of a root key's node that the overrides of a command set; one that chooses a file sets no value."""
    values = OmegaConf.create({node: {}})
    for key in override_keys(overrides):
        if key.startswith(f"{node}."):
            OmegaConf.update(values, key, OmegaConf.select(cfg, key), force_add=True)
    return plain(values)[node]


def override_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys that overrides set, in their order; a dictionary such as a={b:1,c:2} sets a.b and a.c."""
    keys = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        keys += flat({key: value}) if isinstance(value, dict) and value else [key]
    return keys
