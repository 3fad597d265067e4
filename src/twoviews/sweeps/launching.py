"""From the combinations that a sweeper made to points of a sweep, checked before anything starts."""

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoviews import foreign, launched
from twoviews.code import code_state, content, freeze, left_out, no_commit
from twoviews.config.building import build
from twoviews.config.checks import check, check_plugin
from twoviews.config.command_line_errors import diagnose
from twoviews.config.digest import as_float, digest, flat
from twoviews.console import Console
from twoviews.errors import BadInput
from twoviews.sweeps import collecting
from twoviews.sweeps.composing import Composer
from twoviews.sweeps.dispatch import POLL_S, Dispatch
from twoviews.sweeps.folder import New, Point, State, Sweep
from twoviews.sweeps.plan import plan
from twoviews.sweeps.truth import look
from twoviews.sweeps.words import counted
from twoviews.tracking import uris

LEFT_OUT = 5  # files that are named
_HYDRAS = ("hydra.mode=", "hydra.launcher", "hydra/launcher=", "hydra.sweeper", "hydra/sweeper=", "hydra.sweep.dir=")


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


class Launch:
    """One `train.py -m`, checked before anything is written.

    Args:
        config: the configuration without what is swept, with Hydra's own node.
        compose: the configuration of a combination.

    Raises:
        BadInput: the launcher, the sweep's name or MLflow's address is not right.
    """

    def __init__(self, config: DictConfig, compose: Callable[[list[str]], DictConfig]):
        options = cast(dict[str, Any], OmegaConf.to_container(config.sweep))
        if not isinstance(options["name"], str | None):
            raise BadInput(
                f"sweep.name={options['name']} is a number and has to be a name; quote it: 'sweep.name=\"{options['name']}\"'."
            )
        self.options, self.console = Options(**options), Console()
        typed = _parsed(list(config.hydra.overrides.task))
        for one in config.hydra.overrides.hydra:
            if not one.lstrip("+~").startswith(_HYDRAS):
                raise BadInput(f"{one} would not reach the points of a sweep; leave it out, or leave out -m.")
        self.swept = [one.get_key_element() for one in typed if one.is_sweep_override()]
        self.launcher = check_plugin(config, "launcher")
        called = self.options.name or name(config, self.swept)
        if not re.fullmatch(r"[\w+-][\w.+-]*", called):
            raise BadInput(f"sweep.name={called} is not the name of a folder; use letters, digits and any of . _ + -")
        self.folder = Path(config.hydra.sweep.dir) / called
        tracking = OmegaConf.to_container(config.tracking, resolve=True)
        self.tracking: dict[str, Any] = {**tracking, "uri": uris.resolve(tracking["uri"])}  # type: ignore[dict-item, index]
        if self.tracking["mirror"]:
            uris.check_reachable(self.tracking["uri"])
        uris.trust(self.tracking["uri"])
        self.dispatch: Dispatch = build(DictConfig(self.launcher))
        self.protocols = [*(config.get("protocol") or {})]  # whose values result.json will have
        self._composer = Composer(compose)
        self._here: dict[str, str] = {}

    def points(self, combinations: Sequence[Sequence[str]]) -> list[New]:
        """The points of these combinations, each checked; those with the same configuration are one.

        Raises:
            BadInput: a value is wrong, with the point it is in.
        """
        return composed(self._composer, combinations, self.swept)

    def add(self, new: Sequence[New]) -> tuple[Sweep, list[Point]]:
        """Make the folders of these points, with the code as it was at the first call."""
        sweep = Sweep(self.folder)
        if not self._here:
            self._say_left_out(new)
            if reason := no_commit():
                self.console.say(f"code      no commit is recorded: {reason}.")
            copy = freeze(sweep.folder / "code")
            self._here = {"cwd": str(Path.cwd()), "code": str(copy)}
            launched.remember(content(copy))
            launched.remember(json.dumps(self.launcher, sort_keys=True))
        new = [replace(one, more={**one.more, **self._here}) for one in new]
        points = sweep.add(
            new, command=shlex.join(["python", *sys.argv]), launcher=self.launcher, commit=code_state()[0]
        )
        return sweep, points

    def _say_left_out(self, new: Sequence[New]) -> None:
        files = left_out()
        modules = {file: file.removeprefix("src/").removesuffix(".py").replace("/", ".") for file in files}
        for file, module in modules.items():
            if any(f"_target_: {module}." in one.config for one in new):
                raise BadInput(
                    f"{file} is not tracked by git, so points would not have it; `git add {file}` changes that."
                )
        if files:
            named = ", ".join(files[:LEFT_OUT]) + (" …" if len(files) > LEFT_OUT else "")
            self.console.say(f"code      without {counted(len(files), 'file')} that git does not track: {named}")

    def prepare(self, sweep: Sweep, points: Sequence[Point]) -> None:
        """Before points run: MLflow's run for the sweep, if the points are mirrored there.

        Raises:
            BadInput: MLflow does not answer.
        """
        if points and self.tracking["mirror"]:
            collecting.prepare(sweep, points, self.tracking)

    def deliver(self, sweep: Sweep) -> None:
        """After the last point: MLflow gets what it does not have, if the points are mirrored there."""
        if self.tracking["mirror"]:
            collecting.deliver(sweep, self.console.say)

    def end(self, sweep: Sweep, points: Sequence[Point]) -> int:
        """Say what became of these points; the exit code: 0, or 1 when points failed."""
        points = [known for known in sweep.points if known.digest in {point.digest for point in points}]
        return report(sweep, points, self.dispatch.look(points), self.console)


def launch(order: Launch, combinations: Sequence[Sequence[str]]) -> int:
    """Start what is missing of a sweep; the exit code: 0, or 1 when points failed.

    Args:
        order: what was typed.
        combinations: overrides of each point.

    Raises:
        BadInput: a point is not right; nothing was started.
        SystemExit: a signal stopped it.
    """
    new = order.points(combinations)
    if order.options.plan:
        there = Sweep(order.folder).points if (order.folder / "sweep.json").exists() else []
        plan(order.folder, new, look(there), order.dispatch, order.console)
        return 0
    sweep, points = order.add(new)
    now = look(points)
    todo = [point for point in points if not (now[point.digest].active or now[point.digest].done)]
    say(sweep, points, now, todo, order.console)
    if todo:
        order.prepare(sweep, points)
    try:
        order.dispatch.submit(todo)
        if order.options.wait:
            wait(order.dispatch, [known for known in sweep.points if known.digest in now], order.console)
    finally:
        order.deliver(sweep)
    return order.end(sweep, points)


def again(sweep: Sweep, points: Sequence[Point]) -> None:
    """Run points as they were launched, from their checkpoints and with the code they had.

    Raises:
        BadInput: this user launched no such code or no such launcher: what came from elsewhere is not run.
    """
    code = {point.description["code"] for point in points}
    known = all(launched.remembered(content(Path(one))) for one in code)
    launcher = sweep.record["launcher"]
    if points and not (known and launched.remembered(json.dumps(launcher, sort_keys=True))):
        raise BadInput(
            f"{sweep.folder} has code or a launcher that was not launched from here, so nothing of it is run; launch the "
            "sweep with `train.py -m` and sweep.name= again, which goes on from its checkpoints with the code of this checkout."
        )
    for point in points:
        uris.refuse_untrusted(foreign.load(point.folder / "config.yaml").get("tracking", {}).get("uri"))
    build(launcher).submit(points)


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


def composed(composer: Composer, combinations: Sequence[Sequence[str]], swept: Sequence[str]) -> list[New]:
    """The points of these combinations, each checked; those with the same configuration are one.

    Raises:
        BadInput: a value is wrong, with the point it is in.
    """
    found: dict[str, New] = {}
    for combination in combinations:
        parsed = [composer.parse(override) for override in combination]
        axes = {one.key_or_group: _plain(one.value()) for one in parsed if one.get_key_element() in swept}
        try:
            content = composer(combination)
            check("train", content)
            for flag in ("fresh", "preview", "find_batch"):
                if content[flag]:
                    raise BadInput(f"{flag}=true is for one run; leave it out, or leave out -m.")
        except (BadInput, HydraException, OmegaConfBaseException) as error:
            said = error.messages if isinstance(error, BadInput) else diagnose("train", list(combination), error)
            if len(combinations) > 1 and " has no key " in said[0]:
                said[0] += (
                    " What not all points have is for a launch of those that do, which may have the same sweep.name=."
                )
            values = " ".join(f"{key}={value}" for key, value in axes.items())
            raise BadInput(*(f"point {values}: {one}" if values else one for one in said)) from error
        more = {"choices": composer.choices(combination)}
        one = New(digest(content), axes, combination, composer.text(frozen(content)), more)
        found.setdefault(one.digest, one)
    return list(found.values())


def frozen(content: Mapping[str, Any]) -> dict[str, Any]:
    """A point's configuration with nothing left that depends on where and when it runs."""
    tracking = {**content["tracking"], "uri": uris.resolve(content["tracking"]["uri"])}
    return {key: value for key, value in content.items() if key != "sweep"} | {"tracking": tracking}


def name(config: DictConfig, swept: Sequence[str]) -> str:
    """What a sweep is called: the same for other values of the same keys."""
    nodes = _without(config, *FREE)
    fixed = flat(OmegaConf.to_container(nodes, resolve=True))
    kept = {key: value for key, value in fixed.items() if not any(f"{key}.".startswith(f"{one}.") for one in swept)}
    text = repr((sorted((key, as_float(value)) for key, value in kept.items()), sorted(swept)))
    choices = config.hydra.runtime.choices
    front = [group if group in swept else choices[group] for group in ("method", "data")]
    return "-".join([*front, hashlib.blake2b(text.encode(), digest_size=4).hexdigest()])


FREE = (
    "hydra",
    "sweep",
    "tracking",
    "runtime",
    "fresh",
    "preview",
    "find_batch",
)  # may change between launches of one sweep


def say(
    sweep: Sweep, points: Sequence[Point], now: Mapping[str, State], todo: Sequence[Point], console: Console
) -> None:
    """What was found and what begins."""
    counts = {
        "finished": sum(now[point.digest].state == "FINISHED" for point in points),
        "given up by a search": sum(now[point.digest].state == "PRUNED" for point in points),
        "running or queued already": sum(now[point.digest].active for point in points),
        "to run": len(todo),
    }
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    console.say(f"sweep {sweep.name}: {counted(len(points), 'point')}, {found}; {sweep.folder}")


def report(sweep: Sweep, points: Sequence[Point], now: Mapping[str, State], console: Console) -> int:
    """One line for each point that failed, and the exit code."""
    failed = [point for point in points if not (now[point.digest].active or now[point.digest].done)]
    active = sum(now[point.digest].active for point in points)
    pruned = sum(now[point.digest].state == "PRUNED" for point in points)
    finished = len(points) - active - pruned - len(failed)
    others = (f", {pruned} given up by a search" if pruned else "") + (
        f", {active} queued or running" if active else ""
    )
    console.say(f"sweep {sweep.name}: {finished:,} of {counted(len(points), 'point')} finished{others}")
    for point in failed:
        state = now[point.digest]
        console.say(f"  {state.state} {point.label}: {state.reason}")
    if active:
        console.say(f"`python -m twoviews.sweep status {shlex.quote(sweep.name)}` shows how they are.")
    if failed:
        console.say(
            f"{counted(len(failed), 'point')} did not finish; `python -m twoviews.sweep logs {shlex.quote(sweep.name)} <point>` "
            "shows what one printed, and the same command runs them again."
        )
    return 1 if failed else 0


def _without(cfg: DictConfig, *keys: str) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in keys])


def _parsed(overrides: Sequence[str]) -> list:
    return OverridesParser.create().parse_overrides(list(overrides))


def _plain(value: Any) -> Any:
    """A value as JSON has it; quoted strings without their quotes."""
    return [_plain(one) for one in value] if isinstance(value, list) else getattr(value, "text", value)
