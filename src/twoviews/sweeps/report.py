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
from twoviews.protocols.units import KNN_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import SEED, JobState, assigned, short_names, text, typed
from twoviews.sweeps.plots import CURVES, plot_all
from twoviews.sweeps.results import (
    ACCURACIES,
    CONFIDENCE,
    FINISHED,
    Comparison,
    ConfigResults,
    Results,
    compare,
    gather,
)
from twoviews.tables import as_latex, as_markdown, span
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import update_run

NOT_FAILED = ("QUEUED", "RUNNING", "INTERRUPTED", "PRUNED", FINISHED)
MAX_ROWS = 40  # of a table on the page; the CSV has all
MAX_PLOTS = 12  # on the page


def report(
    sweep: Sweep, states: Mapping[str, JobState] | None = None, say: Callable[[str], None] = lambda _: None
) -> Results:
    """Write report.md, .csv, .tex and plots into the sweep folder, and to the sweep's MLflow run if it has one.

    Args:
        sweep: whose jobs may be running.
        states: by digest, from `job_states.current_states`; without one, that in state.json.
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
        write_atomic(latex, as_latex(_config_rows(results, len(results.configs)), [*ACCURACIES.values()]))
        files.append(latex)
    for best in results.ranked[:1]:
        label = f"{_label(results, best)}: " if results.varying else ""
        accuracies = ", ".join(f"{name} {value}" for name, value in _accuracies(best).items())
        say(f"{_verdict(results)}: {label}{accuracies}")
    say(f"report: {page}")
    if sweep.record["parent"] and "tracking" in sweep.record:
        _send(sweep, results, files, say)
    return results


def _send(sweep: Sweep, results: Results, files: Sequence[Path], say: Callable[[str], None]) -> None:
    """Send page, files and mean accuracies to MLflow; a failure is said, not raised."""
    finished = results.jobs[results.jobs["state"] == FINISHED]
    means = finished.reindex(columns=[*ACCURACIES]).mean()
    # By these names MLflow's charts have them behind those of the jobs.
    metrics = {"sweep/jobs_finished": float(len(finished)), **means.dropna().add_suffix("_mean").to_dict()}
    tags = {}
    for best in results.ranked[:1]:
        metrics |= {f"{name}_best": best.estimate(name).mean for name in ACCURACIES if best.estimate(name).count}
        tags = {f"best.{key}": text(value) for key, value in best.parameters.items()}
    run, tracking = sweep.record["parent"], sweep.record["tracking"]
    # The best first: MLflow shows the first lines, the others after a click. Its code blocks do not wrap lines.
    parts = [_best(results), _configs(results), *_heading(sweep, results).split("\n\n")[1:], _cost(results)]
    note = re.sub("^    (.+)$", r"`\1`", "\n\n".join([*parts, _failures(sweep, results)]), flags=re.MULTILINE)
    try:
        more = {
            "tags": tags,
            "metrics": metrics,
            "step": len(finished),
            "note": note,
            "files": files,
            "place": "report",
        }
        update_run(tracking["uri"], tracking["experiment"], run, **more)
    except Exception as error:  # whatever fails in MLflow, the report is in the folder
        say(f"MLflow does not have the report ({short_error(error)}); the same command sends it again.")


def _csv(results: Results) -> str:
    """A row for each job; a metric that a job did not measure is an empty cell."""
    table = results.jobs.assign(
        seconds=results.jobs["seconds"].map("{:.1f}".format),
        device_hours=results.jobs["seconds"] * results.jobs["device_count"] / 3600,
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
            f"{' and '.join(once)}: measured at one epoch, so not among the learning curves; the numbers are above."
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
    return config.label(results.varying, short_names(results.varying))


def _accuracies(config: ConfigResults) -> dict[str, str]:
    """The measured accuracies of a config by their names."""
    estimates = {name: config.estimate(metric) for metric, name in ACCURACIES.items()}
    return {name: str(value) for name, value in estimates.items() if value.count}


def _verdict(results: Results) -> str:
    """What the ranking of at least one config is worth, as the heading of its part of the page."""
    ranked, metric = results.ranked, results.metric
    if metric == KNN_TOP1 and all(config.estimate(metric).mean <= config.floor for config in ranked):
        return "No config beats the baselines" if len(ranked) > 1 else "The baselines are not beaten"
    if not (pair := results.comparison):
        return "Result"
    if pair.difference.count < 2:
        return "Highest, by one seed each" if len(ranked[0].values(metric or "")) == 1 else "Highest, without a test"
    if pair.difference.mean == 0:
        return "A tie"
    return "No clear best" if pair.p > 0.05 else "Best"


def _best(results: Results) -> str:
    if not results.ranked or not (metric := results.metric):
        return "No accuracy of a finished job is there yet."
    best, verdict = results.ranked[0], _verdict(results)
    most = len(best.values(metric))
    values = ", ".join(f"{name} **{value}**" for name, value in _accuracies(best).items())
    label = f"**{_label(results, best)}**: " if results.varying else ""
    sentence = f"{label}{values} over {counted(most, 'seed')}, by {ACCURACIES[metric]} accuracy."
    if verdict not in ("Best", "Result"):
        sentence = f"The highest mean has {sentence}" if results.varying else sentence
    for config in results.configs:
        value = config.estimate(metric)
        if 0 < value.count < most and value.mean > best.estimate(metric).mean:
            at = f"{value} with {counted(value.count, 'seed')}"
            sentence += f" {_label(results, config)} is at {at}; it is ranked when it has as many."
            break
    paragraphs = [f"## {verdict}", sentence, _baselines(results), "To run it again:\n\n    " + _command(best)]
    for name in ACCURACIES:
        complete = [config for config in results.configs if len(config.values(name)) == most]
        highest = max(complete, key=lambda config: config.estimate(name).mean, default=best)
        if highest is not best:
            label = _label(results, highest)
            paragraphs.append(f"By {ACCURACIES[name]} accuracy the highest is {label}: {highest.estimate(name)}.")
    if pair := results.comparison:
        paragraphs.append(_comparison(results, pair, metric))
    return "\n\n".join(filter(None, paragraphs))


def _baselines(results: Results) -> str:
    """The kNN accuracies that a method has to beat, in a sentence; "" if they are not known."""
    shown = [f"{BASELINES[name][0]} {span(values)}" for name, values in results.baselines.items()]
    return f"Baselines, kNN: {', '.join(shown)}." if shown else ""


def _comparison(results: Results, pair: Comparison, metric: str) -> str:
    label, second = _label(results, pair.second), pair.second.estimate(metric)
    start = f"The next is {label}: {ACCURACIES[metric]} {second}. "
    if not pair.difference.count:
        return start + "The two have no seed in common, so they cannot be compared in pairs."
    differ = f"They differ by {pair.difference.mean:.2f} on"
    if pair.difference.count < 2:
        return f"{start}{differ} the one seed that both have; a paired test needs two, better five."
    if math.isnan(pair.p):
        return f"{start}{differ} every common seed, so there is nothing to test."
    seeds = counted(pair.difference.count, "seed")
    sentence = f"Paired t-test over {seeds}: the first is ahead by {pair.difference}, p = {pair.p:.2g}"
    sentence += "." if pair.p <= 0.05 else ", which chance alone may do."
    ranked = results.ranked
    if near := [config for config in ranked[2:] if not compare(pair.best, config, metric).p <= 0.05]:
        sentence += f" {counted(len(near), 'config')} more cannot be told from it."
    if len(ranked) > 2:
        sentence += f" It was chosen among {len(ranked)} configs on the same numbers, which flatters it."
    if pair.difference.count < 5:
        sentence += " With fewer than five seeds only large differences show."
    return start + sentence


def _command(config: ConfigResults) -> str:
    """The command that trains the first finished job of a config by itself."""
    jobs = config.jobs[config.jobs["state"] == FINISHED]
    overrides = [override for override in jobs["overrides"].iloc[0] if not override.startswith("sweep.")]
    return shlex.join(["python", "train.py", *overrides])


def _config_rows(results: Results, count: int) -> list[dict[str, str]]:
    """A row for each of the first configs, and for each baseline."""
    names, rows = short_names(results.varying), []
    for config in results.configs[:count]:
        finished = config.jobs["state"] == FINISHED
        missing = config.jobs[SEED][~finished & (config.jobs[SEED] != "-")]
        jobs = f"{finished.sum()} of {len(config.jobs)}"
        jobs += f" (seed {', '.join(missing)} missing)" if len(missing) else ""
        row = {names[key]: typed(config.parameters, key) for key in results.varying} | {"jobs": jobs}
        row |= {short: str(config.estimate(name)) for name, short in ACCURACIES.items() if name in results.metrics}
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
    groups = jobs.assign(hours=jobs["seconds"] * jobs["device_count"] / 3600, running=jobs["state"] != FINISHED)
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
        values, log = job.reindex(results.parameters).dropna(), f"logs {shlex.quote(sweep.name)} {digest}"
        row = {"job": digest, "parameters": assigned(values.to_dict(), short_names(values.index), ", ")}
        row |= {"state": job["state"], "at epoch": f"{job['epoch']:g}", "reason": job["reason"] or "unknown"}
        rows.append(row | {"log": f"`python -m twoviews.sweep {log}`"})
    more = f"\n\n{len(failed) - MAX_ROWS} more: report.csv." if len(failed) > MAX_ROWS else ""
    return "## Failures\n\n" + as_markdown(rows) + more
