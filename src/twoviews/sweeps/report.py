"""The report of a sweep: a page, a table and plots in its folder, made from the results so far."""

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from twoviews.console import duration
from twoviews.files import write_atomic
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.formatting import counted, short_names, text, typed
from twoviews.sweeps.job import SEED, JobState
from twoviews.sweeps.plots import plot_all
from twoviews.sweeps.results import (
    ACCURACIES,
    CONFIDENCE,
    FINISHED,
    NO_ESTIMATE,
    Comparison,
    ConfigResults,
    Results,
    gather,
)
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import log_report

NOT_FAILED = ("QUEUED", "RUNNING", "INTERRUPTED", "PRUNED", FINISHED)
MAX_ROWS = 40  # of a table on the page; the CSV has all
MAX_PLOTS = 12  # on the page


def report(
    sweep: Sweep, states: Mapping[str, JobState] | None = None, say: Callable[[str], None] = lambda _: None
) -> Results:
    """Write report.md, report.csv and plots into the sweep folder, and to the sweep's MLflow run if it has one.

    Args:
        sweep: whose jobs may be running.
        states: by digest, from `job_status.status`; without one, that in state.json.
        say: called with sentences for the user.

    Raises:
        OSError: the folder cannot be written.
    """
    results = gather(sweep, states)
    plots = plot_all(sweep.folder, results)
    page, table = sweep.folder / "report.md", sweep.folder / "report.csv"
    write_atomic(table, _csv(results))
    write_atomic(page, _page(sweep, results, plots))
    if results.best:
        label = f"{_label(results, results.best)}: " if results.axes else ""
        say(f"best: {label}{', '.join(f'{name} {value}' for name, value in _accuracies(results.best).items())}")
    say(f"report: {page}")
    if sweep.record["parent"] and "tracking" in sweep.record:
        _send(sweep, results, [page, table, *plots.values()], say)
    return results


def _send(sweep: Sweep, results: Results, files: Sequence[Path], say: Callable[[str], None]) -> None:
    """Send page, files and mean accuracies to MLflow; a failure is said, not raised."""
    done = results.jobs[results.jobs["state"] == FINISHED]
    means = done.reindex(columns=[*ACCURACIES]).mean()
    # By these names MLflow's charts have them behind those of the jobs.
    metrics = {
        "sweep/jobs_finished": float(len(done)),
        **{f"{name}_mean": means[name] for name in means.dropna().index},
    }
    if results.best:
        estimates = {metric: results.best.estimate(metric) for metric in ACCURACIES}
        metrics |= {f"{metric}_best": value.mean for metric, value in estimates.items() if value}
    tags = {f"best.{key}": text(value) for key, value in results.best.axes.items()} if results.best else {}
    run, tracking = sweep.record["parent"], sweep.record["tracking"]
    # The best first: MLflow shows the first lines, the others after a click. Its code blocks do not wrap lines.
    parts = [_best(results), _configs(results), *_heading(sweep, results).split("\n\n")[1:], _cost(results)]
    note = re.sub("^    (.+)$", r"`\1`", "\n\n".join([*parts, _failures(sweep, results)]), flags=re.MULTILINE)
    try:
        log_report(tracking["uri"], tracking["experiment"], run, note, files, metrics, len(done), tags)
    except Exception as error:  # whatever fails in MLflow, the report is in the folder
        say(f"MLflow does not have the report ({short_error(error)}); the same command sends it again.")


def _csv(results: Results) -> str:
    """A row for each job; a metric that a job did not measure is an empty cell."""
    table = results.jobs.assign(
        seconds=results.jobs["seconds"].map("{:.1f}".format),
        device_hours=results.jobs["seconds"] * results.jobs["width"] / 3600,
    )
    columns = [*results.parameters, "state", "step", "epoch", *results.metrics]
    columns += ["seconds", "device", "device_hours", "reason"]
    return table[columns].to_csv(index_label="job", float_format="%.6g", lineterminator="\n")


def _page(sweep: Sweep, results: Results, plots: Mapping[str, Path]) -> str:
    parts = [_heading(sweep, results), _best(results), _configs(results)]
    parts += [f"## {title}\n\n![{title}]({path.name})" for title, path in list(plots.items())[:MAX_PLOTS]]
    if len(plots) > MAX_PLOTS:
        parts.append(f"Beside this page: {counted(len(plots) - MAX_PLOTS, 'more plot')}.")
    parts += [_cost(results), _failures(sweep, results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(sweep: Sweep, results: Results) -> str:
    states, count = results.jobs["state"].value_counts().to_dict(), len(results.jobs)
    finished = states.pop(FINISHED, 0)
    others = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    summary = f"{finished:,} of {counted(count, 'job')} finished" + (f"; {others}." if others else ".")
    if finished < count:
        summary += f" **{count - finished} missing**: means, tests and accuracy plots are of finished jobs only."
    if newest := max((curve["time"].iloc[-1] for curve in results.curves.values() if len(curve)), default=None):
        summary += f" Newest number: {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC."
    commands = "\n".join(f"    {command}" for command in sweep.commands)
    note = (
        f"Accuracies in percent. ± and bands: {CONFIDENCE}% t-intervals of the mean over seeds, mean ± t(0.975, n − 1) s / √n; "
        "one seed has none."
    )
    return "\n\n".join(part for part in (f"# {results.name}", summary, commands, note) if part)


def _label(results: Results, config: ConfigResults) -> str:
    return config.label(results.axes, short_names(results.axes))


def _accuracies(config: ConfigResults) -> dict[str, str]:
    """The measured accuracies of a config by their names."""
    estimates = {name: config.estimate(metric) for metric, name in ACCURACIES.items()}
    return {name: str(value) for name, value in estimates.items() if value}


def _best(results: Results) -> str:
    best, metric = results.best, results.metric
    if not best or not metric:
        return "No accuracy of a finished job is there yet."
    most = len(best.values(metric))
    values = ", ".join(f"{name} **{value}**" for name, value in _accuracies(best).items())
    label = f"**{_label(results, best)}**: " if results.axes else ""
    sentence = f"{label}{values} over {counted(most, 'seed')}, by {ACCURACIES[metric]} accuracy."
    mean = (best.estimate(metric) or NO_ESTIMATE).mean
    for config in results.configs:
        count, value = len(config.values(metric)), config.estimate(metric) or NO_ESTIMATE
        if 0 < count < most and value.mean > mean:
            at = f"{value} with {counted(count, 'seed')}"
            sentence += f" {_label(results, config)} is at {at}; it is ranked when it has as many."
            break
    paragraphs = ["## Best", sentence, "To run it again:\n\n    " + _command(best)]
    for name in [name for name in ACCURACIES if name != metric]:
        complete = [config for config in results.configs if len(config.values(name)) == most]
        other = max(complete, key=lambda config: (config.estimate(name) or NO_ESTIMATE).mean, default=best)
        if other is not best:
            label = _label(results, other)
            paragraphs.append(f"By {ACCURACIES[name]} accuracy the best is {label}: {other.estimate(name)}.")
    if results.comparison:
        paragraphs.append(_comparison(results, results.comparison, metric))
    return "\n\n".join(paragraphs)


def _comparison(results: Results, pair: Comparison, metric: str) -> str:
    label, second = _label(results, pair.second), pair.second.estimate(metric)
    start = f"The next best is {label}: {ACCURACIES[metric]} {second}. "
    if not pair.difference:
        return start + "The two have no seed in common, so they cannot be compared in pairs."
    differ = f"They differ by {pair.difference.mean:.2f} on"
    if len(pair.seeds) < 2:
        return f"{start}{differ} the one seed that both have; a paired test needs two, better five."
    if math.isnan(pair.p):
        return f"{start}{differ} every common seed, so there is nothing to test."
    seeds = counted(len(pair.seeds), "seed")
    sentence = f"Paired t-test over {seeds}: the best is ahead by {pair.difference}, p = {pair.p:.2g}."
    measured = sum(len(config.values(metric)) > 0 for config in results.configs)
    if measured > 2:
        sentence += f" The best was chosen among {measured} configs on the same numbers, which flatters it."
    if len(pair.seeds) < 5:
        sentence += " With fewer than five seeds only large differences show."
    return start + sentence


def _command(config: ConfigResults) -> str:
    """The command that trains the first finished job of a config by itself."""
    jobs = config.jobs[config.jobs["state"] == FINISHED]
    overrides = [override for override in jobs["overrides"].iloc[0] if not override.startswith("sweep.")]
    return shlex.join(["python", "train.py", *overrides])


def _configs(results: Results) -> str:
    names = short_names(results.axes)
    metrics = [name for name in ACCURACIES if name in results.metrics]
    rows = [
        [*(names[key] for key in results.axes), "jobs", *(ACCURACIES[name] for name in metrics), "training per job"]
    ]
    for config in results.configs[:MAX_ROWS]:
        finished = config.jobs["state"] == FINISHED
        jobs, missing = (
            f"{finished.sum()} of {len(config.jobs)}",
            config.jobs[SEED][~finished & (config.jobs[SEED] != "-")],
        )
        jobs += f" (seed {', '.join(missing)} missing)" if len(missing) else ""
        time = duration(config.jobs["seconds"][finished].mean()) if finished.any() else "-"
        values = [str(config.estimate(name) or "-") for name in metrics]
        rows.append([*(typed(config.axes, key) for key in results.axes), jobs, *values, time])
    more = len(results.configs) - MAX_ROWS
    note = (f"{counted(more, 'more config')}: " if more > 0 else "") + "report.csv has every job."
    return f"## Configs\n\n{_markdown(rows)}\n\n{note}"


def _cost(results: Results) -> str:
    jobs = results.jobs[results.jobs["seconds"] > 0]
    if not len(jobs):
        return ""
    rows = [["device", "jobs", "hours", "unit"]]
    groups = jobs.assign(hours=jobs["seconds"] * jobs["width"] / 3600, running=jobs["state"] != FINISHED)
    for (device, running), group in groups.groupby(["device", "running"]):  # type: ignore[misc]
        unit = "core-hours (threads x hours)" if device == "CPU" else "GPU-hours"
        hours = group["hours"].sum()
        shown = f"{hours:.1f}" if hours >= 10 else f"{hours:.3g}"
        rows.append([device, f"{len(group)} {'not finished, so far' if running else 'finished'}", shown, unit])
    return "## Cost\n\nOf training, without the starts of programs.\n\n" + _markdown(rows)


def _failures(sweep: Sweep, results: Results) -> str:
    failed = results.jobs[~results.jobs["state"].isin(NOT_FAILED)]
    if not len(failed):
        return ""
    rows = [["job", "parameters", "state", "at epoch", "reason", "log"]]
    for digest, job in failed.head(MAX_ROWS).iterrows():
        values = job.reindex(results.parameters).dropna()
        names = short_names([str(key) for key in values.index])
        parameters = ", ".join(f"{names[str(key)]}={value}" for key, value in values.items())
        log = f"`python -m twoviews.sweep logs {shlex.quote(sweep.folder.name)} {digest}`"
        rows.append([str(digest), parameters, job["state"], f"{job['epoch']:g}", job["reason"] or "unknown", log])
    more = f"\n\n{len(failed) - MAX_ROWS} more: report.csv." if len(failed) > MAX_ROWS else ""
    return "## Failures\n\n" + _markdown(rows) + more


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first row is the head."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
