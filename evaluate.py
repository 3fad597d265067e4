"""Judge encoders: python evaluate.py run=outputs/moco-cifar10-1a2b3c4d protocol=[knn,linear]."""

from pathlib import Path

from twoviews.config.entry import entry


@entry("evaluate")
def main(cfg, folder: Path) -> int:
    """Rebuild encoder and data, measure, leave the findings beside the run; several runs are compared at the end."""
    from functools import cache, partial

    from hydra.core.hydra_config import HydraConfig

    from twoviews.assembly import load_data
    from twoviews.config.building import build
    from twoviews.console import Console
    from twoviews.errors import BadInput, mistakes
    from twoviews.evaluation.comparison import compare
    from twoviews.evaluation.evaluation import evaluate
    from twoviews.evaluation.names import named
    from twoviews.evaluation.source import open_source
    from twoviews.locks import locked_for_evaluation

    if "protocol" not in cfg:
        raise BadInput("protocol=[] leaves nothing to measure; choose one or more, such as protocol=[knn,linear].")
    if problems := mistakes(*(partial(build, node) for node in cfg.protocol.values())):
        raise BadInput(*problems)
    console, asked, evaluations = Console(), HydraConfig.get().overrides.task, {}
    data = cache(lambda: load_data(cfg)) if "data" in cfg else None
    for run in named(cfg.run):
        source = open_source(run, data, cfg.mean, cfg.std)
        name = run if source.name in evaluations else source.name
        with locked_for_evaluation(source.folder, console.say):
            evaluations[name] = evaluate(source, data, cfg, asked, console)
    if len(evaluations) > 1:
        compare(evaluations, Path("outputs"), console)
    return 0


if __name__ == "__main__":
    main()
