"""Measure the encoder of a run: python evaluate.py run=outputs/moco-cifar10-1a2b3c4d."""

import re
from pathlib import Path

from twoviews.config import build, entry


@entry("evaluate")
def main(cfg, folder: Path) -> int:
    """Rebuild encoder and data from the run, measure, and write evaluation.json beside its results."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from twoviews.assembly import load_data
    from twoviews.console import Console
    from twoviews.errors import BadInput
    from twoviews.features import Judged
    from twoviews.run import Run

    console, run = Console(), Run.existing(cfg.run)
    recorded = OmegaConf.create(run.config())
    asked = HydraConfig.get().overrides.task
    dotted = OmegaConf.from_dotlist([one for one in asked if one.startswith(("protocol.", "runtime."))])
    runtime = build(DictConfig({**recorded.runtime, **dotted.get("runtime", {})}))
    device = runtime.torch_device()
    data = load_data(recorded).to(device)
    if data.test is None:
        raise BadInput(f"the data of {run.folder} has no labelled test images; kNN and linear accuracy need them.")
    if data.digest != run.read("data.json")["digest"]:
        console.say(
            "warning: these are not the images of the run (their digest differs), so the numbers are not the run's."
        )
    # Numbers of a protocol: what the run used, unless another file (knn_small) was chosen; then what this command says.
    plain = re.findall(r"\w+", next((one for one in asked if one.startswith("protocol=")), "knn linear"))
    used = {name: recorded.protocol[name] for name in cfg.protocol if name in recorded.protocol and name in plain}
    protocols = OmegaConf.merge(cfg, {"protocol": used}, {"protocol": dotted.get("protocol", {})}).protocol
    encoder = run.encoder().to(device)
    judged = Judged(encoder, data, device, runtime.dtype(device), runtime.channels_last)
    values = {}
    for name, node in protocols.items():
        values.update({f"{name}/{key}": value for key, value in build(node)(judged).values.items()})
        console.say(
            f"{name}: "
            + ", ".join(f"{key} {value}" for key, value in node.items() if key[0] != "_" and key != "every_epochs")
        )
    run.write("evaluation.json", {**values, "protocol": OmegaConf.to_container(protocols, resolve=True)})
    rows = {name: f"{value:.2f} %" if name.endswith("top1") else f"{value:g}" for name, value in values.items()}
    console.table(f"{run.folder.name}: kNN bank {len(data.memory or ()):,}, test {len(data.test):,} images", rows)
    console.say(f"written to {run.folder / 'evaluation.json'}")
    return 0


if __name__ == "__main__":
    main()
