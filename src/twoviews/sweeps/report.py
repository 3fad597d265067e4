"""The report of a sweep: a page, a table and plots in its folder, made from the results so far."""

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from twoviews.console import duration
from twoviews.errors import counted
from twoviews.figures import BASELINES, files_of
from twoviews.files import write_atomic
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.formatting import short_names, text, typed
from twoviews.sweeps.job import SEED, JobState
from twoviews.sweeps.plots import CURVES, plot_all
from twoviews.sweeps.results import (
    ACCURACIES,
    CONFIDENCE,
    FINISHED,
    NO_ESTIMATE,
    Comparison,
    ConfigResults,
    Results,
    compare,
    gather,
)
from twoviews.tables import as_latex, as_markdown, span
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import log_report

NOT_FAILED = ("QUEUED", "RUNNING", "INTERRUPTED", "PRUNED", FINISHED)
MAX_ROWS = 40  # of a table on the page; the CSV has all
MAX_PLOTS = 12  # on the page


def report(
    sweep: Sweep, states: Mapping[str, JobState] | None = None, say: Callable[[str], None] = lambda _: None
) -> Results:
    """Write report.md, .csv, .tex and plots into the sweep folder, and to the sweep's MLflow run if it has one.

    Args:
        sweep: whose jobs may be running.
        states: by digest, from `job_status.status`; without one, that in state.json.
        say: called with sentences for the user.

    Raises:
        OSError: the folder cannot be written.
    """
    results = gather(sweep, states)
    plots = plot_all(sweep.folder, results)
    page, table, latex = (sweep.folder / f"report.{kind}" for kind in ("md", "csv", "tex"))
    write_atomic(table, _csv(results))
    write_atomic(page, _page(sweep, results, plots))
    files = [page, table, *(file for path in plots.values() for file in files_of(path))]
    if results.metric:
        write_atomic(latex, as_latex(_config_rows(results, len(results.configs)), _metrics(results)))
        files.append(latex)
    if results.best:
        label = f"{_label(results, results.best)}: " if results.axes else ""
        accuracies = ", ".join(f"{name} {value}" for name, value in _accuracies(results.best).items())
        say(f"{_verdict(results, results.best).rstrip('.')}: {label}{accuracies}")
    say(f"report: {page}")
    if sweep.record["parent"] and "tracking" in sweep.record:
        _send(sweep, results, files, say)
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
    for title, path in list(plots.items())[:MAX_PLOTS]:
        file = files_of(path)[0].name
        parts.append(f"## {title}\n\n{'!' if file.endswith('png') else ''}[{title}]({file})")
    if len(plots) > MAX_PLOTS:
        parts.append(f"Beside this page: {counted(len(plots) - MAX_PLOTS, 'more plot')}.")
    once = [name for name in CURVES if name in results.metrics and results.measured_once(name)]
    if once:
        parts.append(
            f"{' and '.join(once)}: measured at one epoch, so there is no learning curve; the numbers are above."
        )
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
        f"Accuracies in percent. ± and whiskers: {CONFIDENCE}% t-intervals of the mean over seeds, "
        "mean ± t(0.975, n − 1) s / √n; one seed has none, and that of two is wide."
    )
    title = f"# {results.title}" + (f"\n\nSweep {results.name}." if results.title != results.name else "")
    return "\n\n".join(part for part in (title, summary, commands, note) if part)


def _label(results: Results, config: ConfigResults) -> str:
    return config.label(results.axes, short_names(results.axes))


def _accuracies(config: ConfigResults) -> dict[str, str]:
    """The measured accuracies of a config by their names."""
    estimates = {name: config.estimate(metric) for metric, name in ACCURACIES.items()}
    return {name: str(value) for name, value in estimates.items() if value}


def _verdict(results: Results, best: ConfigResults) -> str:
    """What the ranking is worth, as the heading of its part of the page."""
    ranked = [config for config in results.configs if results.metric and len(config.values(results.metric))]
    if results.metric == "knn/top1" and all(_mean(config, results.metric) <= config.floor for config in ranked):
        return "No config beats the baselines" if len(ranked) > 1 else "The baselines are not beaten"
    if not (pair := results.comparison):
        return "Result"
    if not pair.difference or len(pair.seeds) < 2:
        return "Highest, by one seed each" if len(best.values(results.metric or "")) == 1 else "Highest, without a test"
    if pair.difference.mean == 0:
        return "A tie"
    return "No clear best" if pair.p > 0.05 else "Best"


def _mean(config: ConfigResults, metric: str) -> float:
    return (config.estimate(metric) or NO_ESTIMATE).mean


def _best(results: Results) -> str:
    best, metric = results.best, results.metric
    if not best or not metric:
        return "No accuracy of a finished job is there yet."
    most, verdict = len(best.values(metric)), _verdict(results, best)
    values = ", ".join(f"{name} **{value}**" for name, value in _accuracies(best).items())
    label = f"**{_label(results, best)}**: " if results.axes else ""
    sentence = f"{label}{values} over {counted(most, 'seed')}, by {ACCURACIES[metric]} accuracy."
    if verdict not in ("Best", "Result"):
        sentence = f"The highest mean has {sentence}" if results.axes else sentence
    for config in results.configs:
        count = len(config.values(metric))
        if 0 < count < most and _mean(config, metric) > _mean(best, metric):
            at = f"{config.estimate(metric)} with {counted(count, 'seed')}"
            sentence += f" {_label(results, config)} is at {at}; it is ranked when it has as many."
            break
    paragraphs = [f"## {verdict}", sentence, _baselines(results), "To run it again:\n\n    " + _command(best)]
    for name in [name for name in ACCURACIES if name != metric]:
        complete = [config for config in results.configs if len(config.values(name)) == most]
        other = max(complete, key=lambda config: _mean(config, name), default=best)
        if other is not best:
            label = _label(results, other)
            paragraphs.append(f"By {ACCURACIES[name]} accuracy the highest is {label}: {other.estimate(name)}.")
    if results.comparison:
        paragraphs.append(_comparison(results, results.comparison, metric))
    return "\n\n".join(filter(None, paragraphs))


def _baselines(results: Results) -> str:
    """The kNN accuracies that a method has to beat, in a sentence; "" if they are not known."""
    known = [f"{BASELINES[name][0]} {span(values)}" for name, values in results.baselines.items()]
    return f"Baselines, kNN: {', '.join(known)}." if known else ""


def _comparison(results: Results, pair: Comparison, metric: str) -> str:
    label, second = _label(results, pair.second), pair.second.estimate(metric)
    start = f"The next is {label}: {ACCURACIES[metric]} {second}. "
    if not pair.difference:
        return start + "The two have no seed in common, so they cannot be compared in pairs."
    differ = f"They differ by {pair.difference.mean:.2f} on"
    if len(pair.seeds) < 2:
        return f"{start}{differ} the one seed that both have; a paired test needs two, better five."
    if math.isnan(pair.p):
        return f"{start}{differ} every common seed, so there is nothing to test."
    seeds = counted(len(pair.seeds), "seed")
    sentence = f"Paired t-test over {seeds}: the first is ahead by {pair.difference}, p = {pair.p:.2g}"
    sentence += "." if pair.p <= 0.05 else ", which chance alone may do."
    measured = [config for config in results.configs if len(config.values(metric))]
    if near := [one for one in measured[2:] if not compare(pair.best, one, metric).p <= 0.05]:
        sentence += f" {counted(len(near), 'config')} more cannot be told from it."
    if len(measured) > 2:
        sentence += f" It was chosen among {len(measured)} configs on the same numbers, which flatters it."
    if len(pair.seeds) < 5:
        sentence += " With fewer than five seeds only large differences show."
    return start + sentence


def _command(config: ConfigResults) -> str:
    """The command that trains the first finished job of a config by itself."""
    jobs = config.jobs[config.jobs["state"] == FINISHED]
    overrides = [override for override in jobs["overrides"].iloc[0] if not override.startswith("sweep.")]
    return shlex.join(["python", "train.py", *overrides])


def _metrics(results: Results) -> list[str]:
    return [ACCURACIES[name] for name in ACCURACIES if name in results.metrics]


def _config_rows(results: Results, count: int) -> list[dict[str, str]]:
    """A row for each of the first configs, and for each baseline."""
    names, rows = short_names(results.axes), []
    for config in results.configs[:count]:
        finished = config.jobs["state"] == FINISHED
        missing = config.jobs[SEED][~finished & (config.jobs[SEED] != "-")]
        jobs = f"{finished.sum()} of {len(config.jobs)}"
        jobs += f" (seed {', '.join(missing)} missing)" if len(missing) else ""
        row = {names[key]: typed(config.axes, key) for key in results.axes} | {"jobs": jobs}
        row |= {
            short: str(config.estimate(name) or "-") for name, short in ACCURACIES.items() if short in _metrics(results)
        }
        time = duration(config.jobs["seconds"][finished].mean()) if finished.any() else "-"
        rows.append(row | {"training per job": time})
    for name, values in results.baselines.items() if rows and "kNN" in rows[0] else ():
        rows.append({**dict.fromkeys(rows[0], ""), next(iter(rows[0])): BASELINES[name][0], "kNN": span(values)})
    return rows


def _configs(results: Results) -> str:
    rows, more = _config_rows(results, MAX_ROWS), len(results.configs) - MAX_ROWS
    note = (f"{counted(more, 'more config')}: " if more > 0 else "") + "report.csv has every job."
    return f"## Configs\n\n{as_markdown(rows)}\n\n{note}" if rows else ""


def _cost(results: Results) -> str:
    jobs = results.jobs[results.jobs["seconds"] > 0]
    if not len(jobs):
        return ""
    rows = []
    groups = jobs.assign(hours=jobs["seconds"] * jobs["width"] / 3600, running=jobs["state"] != FINISHED)
    for (device, running), group in groups.groupby(["device", "running"]):  # type: ignore[misc]
        unit = "core-hours (threads x hours)" if device == "CPU" else "GPU-hours"
        hours = group["hours"].sum()
        shown = f"{hours:.1f}" if hours >= 10 else f"{hours:.3g}"
        count = f"{len(group)} {'not finished, so far' if running else 'finished'}"
        rows.append({"device": device, "jobs": count, "hours": shown, "unit": unit})
    return "## Cost\n\nOf training, without the starts of programs.\n\n" + as_markdown(rows)


def _failures(sweep: Sweep, results: Results) -> str:
    failed = results.jobs[~results.jobs["state"].isin(NOT_FAILED)]
    if not len(failed):
        return ""
    rows = []
    for digest, job in failed.head(MAX_ROWS).iterrows():
        values = job.reindex(results.parameters).dropna()
        names = short_names([str(key) for key in values.index])
        parameters = ", ".join(f"{names[str(key)]}={value}" for key, value in values.items())
        log = f"`python -m twoviews.sweep logs {shlex.quote(sweep.folder.name)} {digest}`"
        found = {
            "state": job["state"],
            "at epoch": f"{job['epoch']:g}",
            "reason": job["reason"] or "unknown",
            "log": log,
        }
        rows.append({"job": digest, "parameters": parameters, **found})
    more = f"\n\n{len(failed) - MAX_ROWS} more: report.csv." if len(failed) > MAX_ROWS else ""
    return "## Failures\n\n" + as_markdown(rows) + more
