"""Evaluate encoders: python evaluate.py run=outputs/moco-cifar10-1a2b3c4d protocol=[knn,linear]."""

from pathlib import Path

from twoviews.config.entry import entry


@entry("evaluate")
def main(cfg, folder: Path) -> int:
    """Evaluate each encoder by the protocols, and compare several of them at the end; results go beside the run."""
    from functools import cache, partial

    from hydra.core.hydra_config import HydraConfig

    from twoviews.assembly import load_data
    from twoviews.console import Console
    from twoviews.encoders.loaded import LoadedEncoder
    from twoviews.encoders.opening import open_encoder
    from twoviews.encoders.run_names import expand_runs
    from twoviews.errors import BadInput, mistakes
    from twoviews.evaluation.comparison import compare
    from twoviews.evaluation.evaluation import evaluate
    from twoviews.locks import locked_for_evaluation
    from twoviews.protocols.protocol import named_protocols

    if "protocol" not in cfg:
        raise BadInput("protocol=[] leaves nothing to measure; choose one or more, such as protocol=[knn,linear].")
    protocols = named_protocols(cfg.protocol)
    console, overrides, evaluations = Console(), HydraConfig.get().overrides.task, {}
    load_chosen = cache(partial(load_data, cfg)) if "data" in cfg else None

    def opened(run: str) -> LoadedEncoder:
        return open_encoder(run, load_chosen, cfg.mean, cfg.std)

    runs, labelled = expand_runs(cfg.run), any(protocol.needs_labels for protocol in protocols.values())
    checks = [lambda run=run: opened(run).check_images(load_chosen, labelled) for run in runs] if len(runs) > 1 else []
    if problems := mistakes(*checks):
        raise BadInput(*problems)  # of all runs, before the first is evaluated
    for run in runs:
        loaded = opened(run)
        name = run if loaded.name in evaluations else loaded.name
        with locked_for_evaluation(loaded.folder, console.say):
            evaluations[name] = evaluate(loaded, load_chosen, cfg, protocols, overrides, console)
    if len(evaluations) > 1:
        compare(evaluations, Path("outputs"), console)
    return 0


if __name__ == "__main__":
    main()
