"""From the combinations that a sweeper made to points of a sweep, checked before anything starts."""

import hashlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from twoviews.code import code_state, freeze
from twoviews.config import build, check, check_launcher, digest, flat
from twoviews.console import Console
from twoviews.errors import BadInput
from twoviews.sweeps.composing import Composer, Texts
from twoviews.sweeps.dispatch import POLL_S, Dispatch
from twoviews.sweeps.folder import New, Point, State, Sweep
from twoviews.sweeps.plan import plan
from twoviews.sweeps.truth import look
from twoviews.tracking import stores

@dataclass(frozen=True)
class Options:
    """The node `sweep` of conf/train.yaml.

    Args:
        name: of the folder below multirun/; None: <method>-<data>-<digest of what is fixed and which keys are swept>.
        wait: stay until the last point ended, where a cluster runs them.
        plan: say what would be started, and start nothing.
    """

    name: str | None
    wait: bool
    plan: bool


def launch(
    config: DictConfig, compose: Callable[[list[str]], DictConfig], combinations: Sequence[Sequence[str]]
) -> int:
    """Start what is missing of a sweep; the exit code: 0, or 1 when points failed.

    Args:
        config: the configuration without what is swept, with Hydra's own node.
        compose: the configuration of a combination.
        combinations: overrides of each point.

    Raises:
        BadInput: a point, the launcher or the sweep's name is not right; nothing was started.
        SystemExit: a signal stopped it.
    """
    options, console = Options(**OmegaConf.to_container(config.sweep)), Console()  # type: ignore[arg-type]
    typed = list(config.hydra.overrides.task)
    swept = [one.get_key_element() for one in _parsed([*typed, *_defaults(config)]) if one.is_sweep_override()]
    launcher = check_launcher(config)
    new = composed(compose, combinations, swept)
    folder = Path(config.hydra.sweep.dir) / (options.name or name(config, swept))
    if not re.fullmatch(r"[\w.+-]+", folder.name):
        raise BadInput(f"sweep.name={folder.name} is not the name of a folder; use letters, digits and any of . _ + -")
    dispatch = build(OmegaConf.create(launcher))
    if options.plan:
        there = Sweep(folder).points if (folder / "sweep.json").exists() else []
        plan(folder, new, look(there), dispatch, console)
        return 0
    sweep = Sweep(folder)
    code = freeze(sweep.folder / "code")
    here = {"cwd": str(Path.cwd()), "code": str(code)}
    new = [New(one.digest, one.axes, one.overrides, one.config, here) for one in new]
    command = ["python", *sys.argv]
    points = sweep.add(new, command=command, launcher=launcher, commit=code_state()[0])
    now = look(points)
    todo = [point for point in points if now[point.digest].state not in ("FINISHED", "RUNNING", "QUEUED")]
    say(sweep, points, now, todo, console)
    dispatch.submit(todo)
    points = [point for point in sweep.points if point.digest in now]
    if options.wait:
        wait(dispatch, points, console)
    return report(sweep, points, dispatch.look(points), console)


def wait(dispatch: Dispatch, points: Sequence[Point], console: Console) -> None:
    """Return when nobody runs any of these points any more; say what happens meanwhile."""
    before: dict[str, str] = {}
    while True:
        now = dispatch.look(points)
        for point in points:
            state = now[point.digest]
            if before.get(point.digest, state.state) != state.state:
                console.say(f"{point.label}: {state.state}{': ' if state.reason else ''}{state.reason}")
            before[point.digest] = state.state
        if not any(state.active for state in now.values()):
            return
        time.sleep(POLL_S)


def composed(
    compose: Callable[[list[str]], DictConfig], combinations: Sequence[Sequence[str]], swept: Sequence[str]
) -> list[New]:
    """The points of these combinations, each checked; those with the same configuration are one.

    Raises:
        BadInput: a value is wrong, with the point it is in.
    """
    composer, texts, found = Composer(compose), Texts(), {}
    for combination in combinations:
        parsed = [composer.parse(override) for override in combination]
        axes = {one.key_or_group: _plain(one.value()) for one in parsed if one.get_key_element() in swept}
        try:
            content = composer(combination)
            check("train", content)
            for flag in ("fresh", "preview"):
                if content[flag]:
                    raise BadInput(f"{flag}=true is for one run; leave it out, or leave out -m.")
        except BadInput as error:
            values = " ".join(f"{key}={value}" for key, value in axes.items())
            raise BadInput(f"point {values}: {error}" if values else str(error)) from error
        one = New(digest(content), axes, combination, texts(frozen(content)))
        found.setdefault(one.digest, one)
    return list(found.values())


def frozen(content: Mapping[str, Any]) -> dict[str, Any]:
    """A point's configuration with nothing left that depends on where and when it runs."""
    tracking = {**content["tracking"], "uri": stores.resolved(content["tracking"]["uri"])}
    return {key: value for key, value in content.items() if key != "sweep"} | {"tracking": tracking}


def name(config: DictConfig, swept: Sequence[str]) -> str:
    """What a sweep is called: the same for other values of the same keys."""
    nodes = _without(config, *_FREE)
    fixed = flat(OmegaConf.to_container(nodes, resolve=True))
    kept = {key: value for key, value in fixed.items() if not any(f"{key}.".startswith(f"{one}.") for one in swept)}
    text = repr((sorted((key, _number(value)) for key, value in kept.items()), sorted(swept)))
    choices = config.hydra.runtime.choices
    front = [group if group in swept else choices[group] for group in ("method", "data")]
    return "-".join([*front, hashlib.blake2b(text.encode(), digest_size=4).hexdigest()])


_FREE = ("hydra", "sweep", "tracking", "runtime", "fresh", "preview")  # may change between launches of one sweep


def say(
    sweep: Sweep, points: Sequence[Point], now: Mapping[str, State], todo: Sequence[Point], console: Console
) -> None:
    """What was found and what begins."""
    counts = {
        "finished": sum(now[point.digest].state == "FINISHED" for point in points),
        "running or queued already": sum(now[point.digest].active for point in points),
        "to run": len(todo),
    }
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    console.say(f"sweep {sweep.name}: {len(points)} points, {found}; {sweep.folder}")


def report(sweep: Sweep, points: Sequence[Point], now: Mapping[str, State], console: Console) -> int:
    """One line for each point that failed, and the exit code."""
    failed = [point for point in points if not now[point.digest].active and now[point.digest].state != "FINISHED"]
    active = sum(now[point.digest].active for point in points)
    finished = len(points) - active - len(failed)
    under_way = f", {active} queued or running" if active else ""
    console.say(f"sweep {sweep.name}: {finished} of {len(points)} points finished{under_way}")
    for point in failed:
        state = now[point.digest]
        console.say(f"  {state.state} {point.label}: {state.reason}")
    if active:
        console.say(f"`python -m twoviews.sweep status {shlex.quote(sweep.name)}` shows how they are.")
    if failed:
        console.say(
            f"{len(failed)} points did not finish; `python -m twoviews.sweep logs {shlex.quote(sweep.name)} <point>` shows what "
            "one printed, and the same command runs them again."
        )
    return 1 if failed else 0


def _without(cfg: DictConfig, *keys: str) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in keys])


def _parsed(overrides: Sequence[str]) -> list:
    return OverridesParser.create().parse_overrides(list(overrides))


def _defaults(config: DictConfig) -> list[str]:
    """What hydra.sweeper.params sweeps."""
    return [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]


def _plain(value: Any) -> Any:
    """A value as JSON has it; quoted strings without their quotes."""
    return [_plain(one) for one in value] if isinstance(value, list) else getattr(value, "text", value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value  # 1 is 1.0
