"""What MLflow is told about a run beside its metrics: parameters, tags, data set, and a description in words."""

import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews import foreign
from twoviews.errors import counted, printable, without_secrets
from twoviews.figures import BASELINES
from twoviews.protocols.units import ACCURACIES
from twoviews.tracking.client import (
    MAX_DATASET_DIGEST_LENGTH,
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    mlflow_key,
    mlflow_tags,
    shortened,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# What `describe` reads; files that are missing are left out.
DESCRIPTION_FILES = ("config.yaml", "environment.json", "data.json", "result.json", "commit.txt")
SIGNATURE = "\n\n<!-- twoviews "  # before the digest of a description
MAX_NOTE_LENGTH = MAX_TAG_LENGTH - 100
NOTE_TAG = "mlflow.note.content"  # MLflow shows this tag as the description of a run, in Markdown


def describe(client: "MlflowClient", run: "Run", folder: Path, tags: Mapping[str, str]) -> None:
    """Send parameters, data set, description, and tags, with those of a run that is a job of a sweep.

    MLflow never changes a parameter: a new value becomes the tag changed.<key>.
    """
    from mlflow.entities import Dataset, DatasetInput, Param, RunTag

    config, environment, data, result = (foreign.load(folder / name) for name in DESCRIPTION_FILES[:-1])
    params, sent, commit = dict(_flat(config)), run.data.params, folder / DESCRIPTION_FILES[-1]
    tags = {
        **tags,
        "folder": str(folder.resolve()),
        "host": environment.get("host", platform.node()),
        "method": config.get("method", {}).get("_target_", "").rpartition(".")[0].rpartition(".")[2],
        "data": data.get("name", ""),
        "data.digest": data.get("digest", ""),
        "mlflow.source.name": "train.py",
        "mlflow.source.git.commit": commit.read_text(errors="replace").strip() if commit.is_file() else "",
    }
    for key, value in params.items():
        if sent.get(key, value) != value or f"changed.{key}" in run.data.tags:
            tags[f"changed.{key}"] = value
    new = [Param(key, value) for key, value in params.items() if key not in sent]
    filled = [RunTag(key, value) for key, value in mlflow_tags(tags).items() if value]
    client.log_batch(run.info.run_id, params=new, tags=filled, synchronous=True)
    if data.get("name") and data.get("digest"):
        name, digest = data["name"], data["digest"][:MAX_DATASET_DIGEST_LENGTH]
        dataset = Dataset(name, digest, source_type="local", source=json.dumps({"name": name}))
        client.log_inputs(run.info.run_id, [DatasetInput(dataset, [])])
    set_note(client, run, _note(folder, config, environment, data, result))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as on the command line) of every leaf, shortened to MLflow's limits."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield mlflow_key(f"{prefix}{key}"), shortened(text, MAX_PARAM_LENGTH)


def _note(
    folder: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    result: Mapping[str, Any],
) -> str:
    """A run in some lines of Markdown: method, data, results, command, length and folder."""
    method, name = config.get("method", {}).get("_target_", "").rpartition(".")[2], data.get("name", "")
    title = " on ".join(f"**{part}**" for part in (method, name) if part) or f"**{folder.name}**"
    if overrides := foreign.load(folder / "point.json").get("overrides"):  # of a job: the command that trains it alone
        words = ["python", "train.py", *(word for word in overrides if not word.startswith("sweep."))]
        command = shlex.join(map(without_secrets, words))
    else:
        command = " ".join(map(without_secrets, environment.get("command", "").split()))
    baselines = _listed(result, {name: f"{label} {{:.2f}} %" for name, (label, _) in BASELINES.items()})
    length = [counted(config["epochs"], "epoch", "")] if "epochs" in config else []
    length += [f"{key.replace('_', ' ')} {config[key]}" for key in ("batch_size", "seed") if key in config]
    if environment:
        length.append(" of ".join(filter(None, (environment.get("gpu") or "CPU", environment.get("host")))))
    length.append(result.get("precision", ""))
    # MLflow shows the first lines, the others after a click.
    parts = [
        ": ".join(filter(None, (title, _results(config, result)))),
        f"`{command}`" if command else "",
        f"kNN of {baselines}" if baselines else "",
        ", ".join(filter(None, length)),
        f"Folder: `{folder.resolve()}`",
    ]
    return "\n\n".join(filter(None, parts))


def _results(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the training ended with, as part of a sentence; empty while it goes on."""
    if not result:
        return ""
    length = counted(result.get("epoch", 0), "epoch", ".4g")
    if result["state"] != "finished" and "epochs" in config:
        length = f"{result.get('epoch', 0):.4g} of {counted(config['epochs'], 'epoch', '')}"
    after = f"{result['state']} after {length}" if "epoch" in result else result["state"]
    reason = f" ({without_secrets(result['reason'])})" if result.get("reason") else ""
    accuracies = {name: f"{short} **{{:.2f}} %**" for name, short in ACCURACIES.items()}
    return ", ".join(filter(None, (_listed(result, accuracies), after + reason)))


def _listed(result: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    return ", ".join(text.format(result[key]) for key, text in texts.items() if key in result)


def set_note(client: "MlflowClient", run: "Run", text: str) -> None:
    """Set the description of a run, in Markdown, unless a user has edited it in MLflow.

    What is written here ends with a digest of itself, in a comment that MLflow does not show. Lines beyond MLflow's limit are
    left out.
    """
    before = run.data.tags.get(NOTE_TAG, "")
    if before and before != _signed(before.rpartition(SIGNATURE)[0]):
        return
    lines = printable(text).split("\n")
    while len("\n".join(lines)) > MAX_NOTE_LENGTH:
        lines[-2:] = ["…"]
    if (new := _signed("\n".join(lines))) != before:
        client.set_tag(run.info.run_id, NOTE_TAG, new)


def _signed(text: str) -> str:
    return f"{text}{SIGNATURE}{sha256(text.encode()).hexdigest()[:16]} -->"
