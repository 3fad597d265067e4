"""What cluster.py clusters: a split of images as the encoder of a run sees it, and the files that come of it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.clusters.kmeans import Clusters
from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.features import embed
from twoviews.run import Run


class Subject:
    """A split of images and the run whose encoder they are seen by.

    Args:
        run: with an encoder.
        data: the run's own or others; they are brought to the size and the channel statistics of the run's.
        split: train, memory or test.
        own: whether `data` are the run's own.

    Raises:
        BadInput: the run has no encoder or the data no such split, or the encoder takes other images.
    """

    def __init__(self, run: Run, data: ImageData, split: str, own: bool):
        self.run, self.encoder, facts = run, run.encoder(), run.read("encoder.json")
        if data.channels != facts["channels"]:
            raise BadInput(
                f"the encoder of {run.folder} takes images of {facts['channels']} channel(s), and those of {data.name} "
                f"have {data.channels}; choose others (for picture files, data.channels=1 and 3 are possible)."
            )
        images = getattr(data, split)
        if images is None:
            raise BadInput(f"{data.name} has no labelled images to be split={split}; use split=train.")
        self.images, self.own = images, own
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
        self.data = replace(data, size=facts["image_size"], mean=mean, std=std)
        other = [] if own else [re.sub(r"[^\w.-]", "_", data.name)]
        # The run's own training images are the usual case; others get names that leave the results of these alone.
        self.name = "_".join(["clusters", *other, *([] if split == "train" else [split])])
        self.facts = {"data": data.name, "digest": data.digest, "split": split, "images": len(images)}

    @property
    def changed(self) -> bool:
        """Whether the run's own images are not what they were."""
        return self.own and self.data.digest != self.run.read("data.json", needed=True)["digest"]

    def check(self, clusters: Sequence[int]) -> None:
        """Refuse before the images are embedded what could not be done with them afterwards.

        Raises:
            BadInput: there are more clusters than images.
        """
        if max(clusters) > len(self.images):
            raise BadInput(
                f"clusters={max(clusters)} is more than the {len(self.images)} images of {self.data.name}, split "
                f"{self.facts['split']}; use at most {len(self.images)}."
            )

    def features(self, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Float[Tensor, "N F"]:
        """The encoder's features of all images as unit rows: kNN and PCL compare directions, not lengths."""
        x = embed(self.encoder.to(device), self.images, self.data, device, dtype, channels_last)
        return nnf.normalize(x, dim=1)

    def save(self, k: int, clusters: Clusters, concentration: Float[Tensor, " K"]) -> None:
        """Write <name>_<k>.npz; row i of an array [N] belongs to image i of the split, or to the file paths[i]."""
        arrays = {
            "assignment": clusters.assignment,
            "distance": clusters.distance,
            "centroids": clusters.centroids,
            "concentration": concentration,
        }
        content: dict[str, np.ndarray] = {name: value.cpu().numpy() for name, value in arrays.items()}
        if self.images.paths is not None:
            content["paths"] = np.array(self.images.paths)
        path = self.run.folder / f"{self.name}_{k}.npz"
        new = path.with_name(path.name + ".new")
        with new.open("wb") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]
        new.replace(path)

    def record(self, settings: dict[str, Any], scores: dict[int, dict[str, float]]) -> None:
        """Write <name>.json: settings, and scores by k, with those of an earlier command that had the same settings."""
        steps = {"step": self.run.read("result.json").get("step"), "rows": "unit length"}
        settings = {**self.facts, "features": self.encoder.out_dim, **steps, **settings}
        before = self.run.read(f"{self.name}.json")
        kept = before["scores"] if before.get("settings") == settings else {}
        merged = {**kept, **{str(k): found for k, found in scores.items()}}
        ordered = {k: merged[k] for k in sorted(merged, key=int)}
        self.run.write(f"{self.name}.json", {"settings": settings, "scores": ordered})
