"""Cluster the images of a split by an encoder's features, and keep scores, assignments and a picture for each k."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import foreign
from twoviews.clusters.kmeans import Clusters, concentration, kmeans
from twoviews.clusters.scores import clustering_scores
from twoviews.clusters.sheet import draw_clusters
from twoviews.console import Console, progress_of
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.errors import BadInput, printable
from twoviews.evaluation.evaluation import prepare_evaluation
from twoviews.figures import files_of
from twoviews.files import open_atomic, shortened, write_atomic
from twoviews.randomness import seed_of
from twoviews.runtime import format_name
from twoviews.tracking.metrics import log_metrics
from twoviews.tracking.mirror import flush
from twoviews.tracking.state import run_page

PERCENT = ("nmi", "ari", "accuracy", "purity")  # of the scores; they come first in the table on the console


def cluster_images(
    loaded: LoadedEncoder,
    load_chosen: Callable[[], ImageData] | None,
    cfg: DictConfig,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Compute the features of a split once, and cluster them for every number of clusters.

    `prepare_evaluation` explains the arguments.

    Raises:
        BadInput: the data have no such split, fewer images than clusters, or images that the encoder cannot take.
    """
    context = prepare_evaluation(loaded, load_chosen, cfg, overrides, console)
    data, images, folder = context.data, context.images(cfg.split), loaded.folder
    counts = sorted({cfg.clusters} if isinstance(cfg.clusters, int) else set(cfg.clusters))
    if counts[-1] > len(images):
        raise BadInput(
            f"clusters={counts[-1]} is more than the {len(images)} images of {data.name}, split {cfg.split}; use at most "
            f"{len(images)}."
        )
    precision = format_name(context.dtype)
    console.say(f"features of {len(images):,} images of {data.name}, split {cfg.split}, in {precision}")
    x = nnf.normalize(context.embed(images), dim=1)  # kNN and PCL compare directions, too
    stem, scores, shown = file_stem(data, cfg.split, own=load_chosen is None), {}, []
    with progress_of("clusterings", len(counts), "values of k") as advance:
        for k in counts:
            # Until they stop to improve: a clustering is made once here, not every epoch.
            clusters = kmeans(x, k, seed=seed_of(cfg.seed, k), nredo=cfg.nredo, iterations=50, tolerance=1e-4)
            save_clusters(folder / f"{stem}_{k}.npz", clusters, concentration(clusters, cfg.temperature), images.paths)
            title = f"{printable(loaded.title)}: {len(x):,} images of {data.name} ({cfg.split}) in {k} clusters"
            draw_clusters(folder / f"{stem}_{k}.png", images, clusters, data.classes, title)
            values = clustering_scores(x, clusters, labels=images.labels, previous=None, seed=cfg.seed)
            scores[k] = values
            names = sorted(values, key=lambda name: name not in PERCENT)
            shown.append({"k": k} | {f"{name}, %" if name in PERCENT else name: values[name] for name in names})
            advance(1)
    settings = {
        **{"data": data.name, "digest": data.digest, "split": cfg.split, "images": len(images)},
        **{"features": x.shape[1], "step": loaded.run.read("result.json").get("step") if loaded.run else None},
        **{"rows": "unit length", "seed": cfg.seed, "nredo": cfg.nredo, "temperature": cfg.temperature},
        "precision": precision,
    }
    if loaded.preprocessing.statistics_source is not None:  # a run's are in its encoder.json
        settings |= {"mean": list(loaded.preprocessing.mean), "std": list(loaded.preprocessing.std)}
    record_scores(folder / f"{stem}.json", settings, scores)
    console.rows(f"{loaded.title}: {len(x):,} images of {data.name}, split {cfg.split}", shown)
    if loaded.in_run_folder:
        flat = {f"{stem}/k{k}/{name}": value for k, values in scores.items() for name, value in values.items()}
        log_metrics(folder, flat)
        flush(folder, loaded.config["tracking"]["mirror"], console.say)
        console.say(f"MLflow: {run_page(folder)}")
    files = [path for k in counts for path in (Path(f"{stem}_{k}.npz"), *files_of(Path(f"{stem}_{k}.png")))]
    console.say(f"written to {shortened(folder)}: {', '.join([f'{stem}.json', *map(str, files)])}")


def file_stem(data: ImageData, split: str, own: bool) -> str:
    """How the names of the files begin: "clusters" for the run's own training images, longer for others.

    Args:
        data: the images.
        split: of them.
        own: whether they are the run's own.
    """
    other = [] if own else [re.sub(r"[^\w.-]", "_", data.name)]
    return "_".join(["clusters", *other, *([] if split == "train" else [split])])


def save_clusters(
    path: Path, clusters: Clusters, concentrations: Float[Tensor, " K"], image_paths: Sequence[str] | None
) -> None:
    """Write an .npz file; row i of an array [N] belongs to image i of the split, or to the file paths[i]."""
    arrays = {
        "assignment": clusters.assignment,
        "distance": clusters.distance,
        "centroids": clusters.centroids,
        "concentration": concentrations,
    }
    content: dict[str, np.ndarray] = {name: value.cpu().numpy() for name, value in arrays.items()}
    if image_paths is not None:
        content["paths"] = np.array(image_paths)
    with open_atomic(path) as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]


def record_scores(path: Path, settings: Mapping[str, Any], scores: Mapping[int, Mapping[str, float]]) -> None:
    """Write settings, and scores by k, with those that the file already has for other k if its settings are the same."""
    before = foreign.load(path)
    kept = before["scores"] if before.get("settings") == settings else {}
    merged = {**kept, **{str(k): values for k, values in scores.items()}}
    content = {"settings": settings, "scores": {k: merged[k] for k in sorted(merged, key=int)}}
    write_atomic(path, json.dumps(content, indent=2) + "\n")
