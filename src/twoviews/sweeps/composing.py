"""The configurations of many jobs, composed by Hydra once for each choice of files, and their specifications."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews.config.checks import check
from twoviews.config.command_line import diagnose
from twoviews.config.digest import digest
from twoviews.config.groups import changes_value, chooses, is_group
from twoviews.config.values import plain
from twoviews.errors import BadInput
from twoviews.sweeps.job import JobSpec
from twoviews.tracking import uris

SINGLE_RUN_FLAGS = ("fresh", "preview", "find_batch")  # root keys of conf/train.yaml that sweeps refuse


class Composed(NamedTuple):
    """The configuration of a job."""

    config: dict[str, Any]  # resolved, without Hydra's own node
    choices: dict[str, Any]  # the file chosen in each group, without Hydra's own groups and those that may have several


class Composer:
    """Composes the configurations of jobs, which share the work for the overrides that they have in common.

    Hydra takes some tenths of a second for a configuration, nearly all of them to find and merge files, so that 2,000 jobs would
    take minutes. Here it composes one configuration for each choice of files. The values of a job are then set in it by
    `OmegaConf.update`, as Hydra does it, which takes a millisecond. Overrides that do more than change one value are left to
    Hydra.

    Args:
        compose: composes a configuration from all of its overrides.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig]):
        self._compose = compose
        self._bases: dict[tuple[tuple[str, ...], frozenset[str]], tuple[DictConfig, dict[str, Any]]] = {}
        self._yaml: dict[str, str] = {}  # by repr, which distinguishes 1, 1.0 and true

    def __call__(self, overrides: Sequence[str]) -> Composed:
        """The configuration with these overrides.

        Raises:
            HydraException, OmegaConfBaseException: Hydra refuses an override.
        """
        parsed = [_parsed(override) for override in overrides]
        structural = [override for override in parsed if not changes_value(override)]
        values = [override for override in parsed if changes_value(override) and not _overlaps(override, structural)]
        left_to_hydra = tuple(str(override.input_line) for override in parsed if override not in values)
        # Jobs that set the same keys share the configuration: each sets them all, so nothing of another job is left.
        key = left_to_hydra, frozenset(override.key_or_group for override in values)
        config, choices = self._bases.get(key) or self._base(left_to_hydra)
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            self._bases.pop(key, None)
            self._compose(list(overrides))  # raises the same with Hydra's message
            raise
        self._bases[key] = config, choices
        return Composed(plain(config), choices)

    def _base(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """The configuration with these overrides, whose values may be changed, and the chosen files."""
        whole = self._compose(list(overrides))
        config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        OmegaConf.set_struct(config, True)  # which the copy does not keep: unknown keys are refused
        chosen = OmegaConf.select(whole, "hydra.runtime.choices") or {}
        choices = {key: file for key, file in chosen.items() if is_group(key) and not key.startswith("hydra/")}
        return config, choices

    def yaml(self, config: Mapping[str, Any]) -> str:
        """A configuration as YAML that OmegaConf reads back; the text of a node that several jobs share is made once."""
        nodes = {repr((key, value)): {key: value} for key, value in config.items()}
        for shown, node in nodes.items():
            if shown not in self._yaml:
                self._yaml[shown] = OmegaConf.to_yaml(OmegaConf.create(node))
        return "".join(self._yaml[shown] for shown in nodes)


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _overlaps(override: Override, others: Sequence[Override]) -> bool:
    """Whether one of the others sets a part of what this override sets, or the reverse: then their order matters."""
    path = f"{override.key_or_group}."
    others_paths = [f"{other.key_or_group}." for other in others if not chooses(other)]
    return any(path.startswith(other) or other.startswith(path) for other in others_paths)


def job_specs(composer: Composer, combinations: Sequence[Sequence[str]], swept: Sequence[str]) -> list[JobSpec]:
    """The jobs of these combinations of overrides, checked; combinations with the same configuration are one job.

    Args:
        composer: makes the configurations.
        combinations: all overrides of each job.
        swept: keys whose values are swept.

    Raises:
        BadInput: a value is wrong; the message names the job.
    """
    specs: dict[str, JobSpec] = {}
    for combination in combinations:
        parsed = [override for override in map(_parsed, combination) if override.get_key_element() in swept]
        parameters = {override.key_or_group: _json_value(override.value()) for override in parsed}
        try:
            composed = composer(combination)
            check("train", composed.config)
            for flag in SINGLE_RUN_FLAGS:
                if composed.config[flag]:
                    raise BadInput(f"{flag}=true is for one run; leave it out, or leave out -m.")
        except (BadInput, HydraException, OmegaConfBaseException) as error:
            messages = error.messages if isinstance(error, BadInput) else diagnose("train", list(combination), error)
            if any(map(chooses, parsed)) and " has no key " in messages[0]:
                messages[0] += (
                    " If only some of the swept choices have it, launch these by themselves; with the same sweep.name= they "
                    "are in one report."
                )
            values = " ".join(f"{key}={value}" for key, value in parameters.items())
            raise BadInput(*(f"job {values}: {line}" if values else line for line in messages)) from error
        yaml = composer.yaml(stored_config(composed.config))
        spec = JobSpec(digest(composed.config), parameters, combination, yaml, {"choices": composed.choices})
        specs.setdefault(spec.digest, spec)
    return list(specs.values())


def stored_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a job as config.yaml has it: without the node `sweep`, and with the complete tracking URI."""
    tracking = {**config["tracking"], "uri": uris.resolve(config["tracking"]["uri"])}
    return {key: value for key, value in config.items() if key != "sweep"} | {"tracking": tracking}


def _json_value(value: Any) -> Any:
    """A value of Hydra's grammar as JSON has it; quoted strings without their quotes."""
    return [_json_value(element) for element in value] if isinstance(value, list) else getattr(value, "text", value)
