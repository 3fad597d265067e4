"""Cluster images by the encoder of a run: python cluster.py run=outputs/moco-cifar10-1a2b3c4d clusters=[10,50,100]."""

from pathlib import Path

from twoviews.config.entry import entry
from twoviews.config.recorded import recorded_runtime


@entry("cluster")
def main(cfg, folder: Path) -> int:
    """Embed the images once, cluster them for every k, and leave scores, assignments and pictures in the run folder."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from twoviews.assembly import load_data, recorded_data
    from twoviews.clusters.kmeans import concentration, kmeans
    from twoviews.clusters.scores import scores
    from twoviews.clusters.sheet import draw_clusters
    from twoviews.clusters.subject import Subject
    from twoviews.console import Console
    from twoviews.errors import printable
    from twoviews.evaluation.names import by_name
    from twoviews.fallbacks import slower
    from twoviews.foreign import blamed
    from twoviews.locks import locked_for_evaluation
    from twoviews.randomness import seed_of
    from twoviews.run import Run
    from twoviews.runtime import format_name
    from twoviews.tracking.metrics import log_metrics
    from twoviews.tracking.mirror import flush
    from twoviews.tracking.state import run_page

    console, run = Console(), Run.existing(by_name(cfg.run) or cfg.run)
    with locked_for_evaluation(run.folder, console.say):
        recorded = OmegaConf.create(run.config())
        with blamed(path := run.folder / "config.yaml"):
            runtime, notes = recorded_runtime(cfg, run.config(), HydraConfig.get().overrides.task)
        data = load_data(cfg) if "data" in cfg else recorded_data(run.config(), path)
        for note in (*notes, *data.notes):
            console.say(note)
        subject = Subject(run, data, cfg.split, own="data" not in cfg)
        counts = [cfg.clusters] if isinstance(cfg.clusters, int) else cfg.clusters
        subject.check(counts)
        if subject.changed:
            console.say("warning: these are not the images of the run (their digest differs).")
        device = runtime.torch_device()
        runtime.configure_evaluation(device)
        for sentence in slower(runtime.device, device):
            console.say(sentence)
        precision = format_name(dtype := runtime.evaluation_dtype(device))
        console.say(f"features of {len(subject.images):,} images of {data.name}, split {cfg.split}, in {precision}")
        x = subject.features(device, dtype, runtime.channels_last)
        rows, values = {}, {}
        for k in sorted(set(counts)):
            clusters = kmeans(
                x, k, seed=seed_of(cfg.seed, k), nredo=cfg.nredo, iterations=50, tolerance=1e-4
            )  # to the end
            found = scores(x, clusters, labels=subject.images.labels, previous=None, seed=cfg.seed)
            subject.save(k, clusters, concentration(clusters, cfg.temperature))
            title = f"{printable(run.folder.name)}: {len(x):,} images of {data.name} ({cfg.split}) in {k} clusters"
            draw_clusters(run.folder / f"{subject.name}_{k}.png", subject.images, clusters, data.classes, title)
            last = ("largest", "smallest", "empty")
            rows[f"k = {k}"] = ", ".join(f"{key} {found[key]:.4g}" for key in sorted(found, key=last.__contains__))
            values[k] = found
        subject.record(
            {"seed": cfg.seed, "nredo": cfg.nredo, "temperature": cfg.temperature, "precision": precision}, values
        )
        log_metrics(
            run.folder, {f"{subject.name}/k{k}/{key}": v for k, one in values.items() for key, v in one.items()}
        )
        flush(run.folder, recorded.tracking.mirror, console.say)
        console.table(
            f"{run.folder.name}: {len(x):,} images of {data.name} (nmi, ari, accuracy and purity in percent)", rows
        )
        console.say(f"MLflow: {run_page(run.folder)}")
        console.say(f"written to {run.folder}: {subject.name}.json, and _<k>.npz and _<k>.png for each k")
    return 0


if __name__ == "__main__":
    main()
