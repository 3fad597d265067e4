"""Cluster images by an encoder: python cluster.py run=outputs/moco-cifar10-1a2b3c4d clusters=[10,50,100]."""

from pathlib import Path

from twoviews.config.entry import entry


@entry("cluster")
def main(cfg, folder: Path) -> int:
    """Cluster the images for every number of clusters; scores, assignments and pictures go beside the run."""
    from functools import partial

    from hydra.core.hydra_config import HydraConfig

    from twoviews.assembly import load_data
    from twoviews.clusters.clustering import cluster_images
    from twoviews.console import Console
    from twoviews.encoders.opening import open_encoder
    from twoviews.locks import locked_for_evaluation

    console, overrides = Console(), HydraConfig.get().overrides.task
    load_chosen = partial(load_data, cfg) if "data" in cfg else None
    loaded = open_encoder(cfg.run, load_chosen, cfg.mean, cfg.std)
    with locked_for_evaluation(loaded.folder, console.say):
        cluster_images(loaded, load_chosen, cfg, overrides, console)
    return 0


if __name__ == "__main__":
    main()
