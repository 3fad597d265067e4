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
from twoviews.protocols.units import ACCURACIES, KNN_TOP1
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import SEED, JobState, assigned, short_names, summary, text, typed
from twoviews.sweeps.plots import CURVES, plot_all
from twoviews.sweeps.results import CONFIDENCE, FINISHED, Results, compare, gather
from twoviews.tables import as_latex, as_markdown, span
from twoviews.tracking.client import short_error
from twoviews.tracking.parent_run import update_run

NOT_FAILED = ("QUEUED", "RUNNING", "INTERRUPTED", "PRUNED", FINISHED)
MAX_ROWS = 40  # of a table on the page; the CSV has all


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
    files = [page, table, *(file for path in plots.values() for file in files_of(path))]
    best, summary, configs = _best(results), _summary(sweep, results), _configs(results)
    last = [_cost(results), _failures(sweep, results)]
    write_atomic(table, _csv(results))
    write_atomic(page, _text(f"# {results.title}", *summary, *best, configs, *_plots(results, plots), *last) + "\n")
    if results.metric:
        write_atomic(latex, as_latex(_config_rows(results), [*ACCURACIES.values()]))
        files.append(latex)
    for first in results.ranked[:1]:
        accuracies = ", ".join(f"{ACCURACIES[name]} {value}" for name, value in first.accuracies.items())
        highest = f"the highest mean has {results.label(first)}" if results.varying else ""
        say(": ".join(filter(None, [_ranking(results)[0], highest, accuracies])))
    say(f"report: {page}")
    if sweep.record["parent"] and "tracking" in sweep.record:
        # The best first: MLflow shows the first lines, the others after a click. Its code blocks do not wrap lines.
        note = re.sub("^    (.+)$", r"`\1`", _text(*best, configs, *summary, *last), flags=re.MULTILINE)
        _upload(sweep, results, note, files, say)
    return results


def _text(*paragraphs: str) -> str:
    return "\n\n".join(filter(None, paragraphs))


def _upload(sweep: Sweep, results: Results, note: str, files: Sequence[Path], say: Callable[[str], None]) -> None:
    """Upload a note, files and mean accuracies to MLflow; a failure is said, not raised."""
    finished = results.jobs[results.jobs["state"] == FINISHED]
    means = finished.reindex(columns=[*ACCURACIES]).mean().dropna()
    # By these names MLflow's charts have them behind those of the jobs.
    metrics, tags = {"sweep/jobs_finished": float(len(finished)), **means.add_suffix("_mean").to_dict()}, {}
    for best in results.ranked[:1]:
        metrics |= {f"{name}_best": accuracy.mean for name, accuracy in best.accuracies.items()}
        tags = {f"best.{key}": text(value) for key, value in best.parameters.items()}
    tracking = sweep.record["tracking"]
    target = tracking["uri"], tracking["experiment"], sweep.record["parent"]
    try:
        update_run(
            *target, tags=tags, metrics=metrics, step=len(finished), note=note, files=files, artifact_folder="report"
        )
    except Exception as error:  # whatever fails in MLflow, the report is in the folder
        say(f"MLflow does not have the report ({short_error(error)}); the same command sends it again.")


def _csv(results: Results) -> str:
    """A row for each job; a metric that a job did not measure is an empty cell."""
    columns = [*results.parameters, "state", "step", "epoch", *results.metrics]
    columns += ["seconds", "device", "device_hours", "reason"]
    table = results.jobs[columns].assign(seconds=results.jobs["seconds"].map("{:.1f}".format))
    return table.to_csv(index_label="job", float_format="%.6g", lineterminator="\n")


def _summary(sweep: Sweep, results: Results) -> list[str]:
    """How far the sweep is, its commands, and how its numbers are to be read."""
    states, count = results.jobs["state"], len(results.jobs)
    finished, others = (states == FINISHED).sum(), summary(states[states != FINISHED])
    progress = f"{finished:,} of {counted(count, 'job')} finished" + (f"; {others}." if others else ".")
    if finished < count:
        progress += f" **{count - finished} missing**: means, tests and accuracy plots are of finished jobs only."
    if newest := max((curve["time"].iloc[-1] for curve in results.curves.values() if len(curve)), default=None):
        progress += f" Newest number: {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC."
    note = (
        f"Accuracies in percent. ± and whiskers: {CONFIDENCE}% t-intervals of the mean over seeds, "
        "mean ± t(0.975, n − 1) s / √n; one seed has none, and that of two is wide."
    )
    name = f"Sweep {sweep.name}." if results.title != sweep.name else ""
    return [name, progress, "\n".join(f"    {command}" for command in sweep.commands), note]


def _best(results: Results) -> list[str]:
    """The best config, its accuracies and command, and how it compares with the baselines and the other configs."""
    if not (metric := results.metric):
        return ["No accuracy of a finished job is there yet."]
    best, (heading, comparison) = results.ranked[0], _ranking(results)
    mean, seeds = best.accuracies[metric].mean, best.accuracies[metric].count
    values = ", ".join(f"{ACCURACIES[name]} **{value}**" for name, value in best.accuracies.items())
    sentence = f"{values} over {counted(seeds, 'seed')}, by {ACCURACIES[metric]} accuracy."
    if results.varying:
        start = "" if heading in ("Best", "Result") else "The highest mean has "
        sentence = f"{start}**{results.label(best)}**: {sentence}"
    for lucky in [config for config in results.ranked if config.accuracies[metric].mean > mean][:1]:
        at = f"{lucky.accuracies[metric]} with {counted(lucky.accuracies[metric].count, 'seed')}"
        sentence += f" {results.label(lucky)} is at {at}; it is ranked when it has as many."
    baselines = ", ".join(f"{BASELINES[name][0]} {span(values)}" for name, values in results.baselines.items())
    finished = best.jobs[best.jobs["state"] == FINISHED]
    overrides, names = finished["overrides"].iloc[0], finished[SEED].unique()
    words = ["python", "train.py", *(override for override in overrides if not override.startswith("sweep."))]
    of = f" with the first of its seeds ({', '.join(names)})" if len(names) > 1 else ""
    again = f"To run it again{of}:\n\n    {shlex.join(words)}"
    paragraphs = [f"## {heading}", sentence, f"Baselines, kNN: {baselines}." if baselines else "", again]
    for name, short in ACCURACIES.items():
        complete = [config for config in results.configs if len(config.values(name)) == seeds]
        highest = max(complete, key=lambda config: config.accuracies[name].mean, default=best)
        if highest is not best:
            value = f"{results.label(highest)}: {highest.accuracies[name]}."
            paragraphs.append(f"By {short} accuracy the highest is {value}")
    return [*paragraphs, comparison]


def _ranking(results: Results) -> tuple[str, str]:
    """A heading that says what the ranking is worth, and a comparison of the best config with the next, if there is one."""
    ranked, metric, heading, sentence = results.ranked, str(results.metric), "Result", ""
    if len(ranked) > 1:
        first, second, *others = ranked
        difference, p = compare(first, second, metric)
        seeds = difference.count
        sentence = f"The next is {results.label(second)}: {ACCURACIES[metric]} {second.accuracies[metric]}. "
        differ = f"They differ by {difference.mean:.2f} on"
        if seeds < 2:
            heading = "Highest, by one seed each" if first.accuracies[metric].count == 1 else "Highest, without a test"
        else:
            heading = "A tie" if difference.mean == 0 else "No clear best" if p > 0.05 else "Best"
        if not seeds:
            sentence += "The two have no seed in common, so they cannot be compared in pairs."
        elif seeds == 1:
            sentence += f"{differ} the one seed that both have; a paired test needs two, better five."
        elif math.isnan(p):
            sentence += f"{differ} every common seed, so there is nothing to test."
        else:
            chance = "." if p <= 0.05 else ", which chance alone may do."
            sentence += f"Paired t-test over {seeds} seeds: the first is ahead by {difference}, p = {p:.2g}{chance}"
            if near := sum(not compare(first, config, metric)[1] <= 0.05 for config in others):
                sentence += f" {counted(near, 'config')} more cannot be told from it."
            if others:
                sentence += f" It was chosen among {len(ranked)} configs on the same numbers, which flatters it."
            if seeds < 5:
                sentence += " With fewer than five seeds only large differences show."
    floors = [config.jobs.reindex(columns=[*BASELINES]).mean().max() for config in ranked]
    beaten = [not config.accuracies[metric].mean <= floor for config, floor in zip(ranked, floors, strict=True)]
    if metric == KNN_TOP1 and not any(beaten):
        heading = "No config beats the baselines" if len(ranked) > 1 else "The baselines are not beaten"
    return heading, sentence


def _configs(results: Results) -> str:
    rows, left_out = _config_rows(results, MAX_ROWS), len(results.configs) - MAX_ROWS
    note = (f"{counted(left_out, 'more config')}: " if left_out > 0 else "") + "report.csv has every job."
    return f"## Configs\n\n{as_markdown(rows)}\n\n{note}" if rows else ""


def _config_rows(results: Results, count: int | None = None) -> list[dict[str, str]]:
    """A row for each of the first configs, and for each baseline."""
    rows, measured = [], {name: short for name, short in ACCURACIES.items() if name in results.metrics}
    for config in results.configs[:count]:
        finished, seeds = config.jobs["state"] == FINISHED, config.jobs[SEED]
        missing = ", ".join(seeds[~finished & (seeds != "-")])
        row = {name: typed(config.parameters, key) for key, name in results.varying.items()}
        row["jobs"] = f"{finished.sum()} of {len(finished)}" + (f" (seed {missing} missing)" if missing else "")
        row |= {short: str(config.accuracies.get(name, "-")) for name, short in measured.items()}
        row["training per job"] = duration(config.jobs["seconds"][finished].mean()) if finished.any() else "-"
        rows.append(row)
    for name, values in results.baselines.items() if rows and "kNN" in rows[0] else ():
        rows.append({**dict.fromkeys(rows[0], ""), next(iter(rows[0])): BASELINES[name][0], "kNN": span(values)})
    return rows


def _plots(results: Results, plots: Mapping[str, Path]) -> list[str]:
    paragraphs = []
    for title, path in plots.items():
        file = files_of(path)[0]
        paragraphs.append(f"## {title}\n\n{'!' if file.suffix == '.png' else ''}[{title}]({file.name})")
    if once := [name for name in CURVES if name in results.metrics and results.measured_once(name)]:
        reason = "measured at one epoch, so not among the learning curves; the numbers are above."
        paragraphs.append(f"{' and '.join(once)}: {reason}")
    return paragraphs


def _cost(results: Results) -> str:
    jobs, rows = results.jobs[results.jobs["seconds"] > 0], []
    for (device, unfinished), hours in jobs.groupby(["device", jobs["state"] != FINISHED])["device_hours"]:
        count = f"{len(hours)} {'not finished, so far' if unfinished else 'finished'}"
        shown = f"{hours.sum():.1f}" if hours.sum() >= 10 else f"{hours.sum():.3g}"
        unit = "core-hours (threads x hours)" if device == "CPU" else "GPU-hours"
        rows.append({"device": device, "jobs": count, "hours": shown, "unit": unit})
    return f"## Cost\n\nOf training, without the starts of programs.\n\n{as_markdown(rows)}" if rows else ""


def _failures(sweep: Sweep, results: Results) -> str:
    failed = results.jobs[~results.jobs["state"].isin(NOT_FAILED)]
    names, logs = short_names(results.parameters), f"python -m twoviews.sweep logs {shlex.quote(sweep.name)}"
    rows = [
        {
            "job": digest,
            "parameters": assigned(job.reindex(results.parameters).dropna().to_dict(), names, ", "),
            "state": job["state"],
            "at epoch": f"{job['epoch']:g}",
            "reason": job["reason"] or "unknown",
            "log": f"`{logs} {digest}`",
        }
        for digest, job in failed.head(MAX_ROWS).iterrows()
    ]
    more = f"{len(failed) - MAX_ROWS} more: report.csv." if len(failed) > MAX_ROWS else ""
    return _text("## Failures", as_markdown(rows), more) if rows else ""
