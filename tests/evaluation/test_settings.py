"""Which settings an evaluation has: the run's own, but for what the command says, whose last override counts."""

from typing import Any

import pytest
from omegaconf import OmegaConf
from test_configs import composed

from twoviews.config.recorded import recorded_runtime
from twoviews.evaluation.evaluation import protocol_nodes
from twoviews.protocols.protocol import named_protocols


def recorded(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(composed(*overrides), resolve=True)  # type: ignore[return-value]


def settings(*asked: str, run: dict[str, Any]) -> dict[str, Any]:
    cfg = composed("run=x", *asked, name="evaluate")
    nodes = protocol_nodes(cfg, named_protocols(cfg.protocol), asked, run)
    return OmegaConf.to_container(nodes, resolve=True)  # type: ignore[return-value]


def test_nested_settings_are_those_of_the_run() -> None:
    typed = [
        "protocol=[linear,tent,corruptions,predict]",
        "protocol.linear.iterations=7",
        "protocol.tent.severities=[1,2]",
        "protocol.tent.images=50",
        "protocol.tent.lr=0.5",
        "protocol.tent.linear.iterations=9",
        "protocol.corruptions.severities=[3]",
        "protocol.corruptions.images=60",
    ]
    run = recorded(*typed)
    for asked in ("protocol=[tent,corruptions]", "protocol=[linear,tent,corruptions]"):
        found = settings(asked, run=run)
        assert found["tent"] == run["protocol"]["tent"]
        assert found["corruptions"]["severities"] == [3] and found["corruptions"]["images"] == 60
    tuned = settings("protocol=[finetune]", run=run)["finetune"]
    assert tuned["linear"]["iterations"] == 7
    scales = [view["scale"][0] for view in run["augmentation"]["views"].values()]
    assert tuned["smallest_crop"] in scales and tuned["flip"] == 0  # of the digits
    assert settings("protocol=[finetune]", "protocol.finetune.flip=0.3", run=run)["finetune"]["flip"] == 0.3
    few = settings("protocol=[few_labels_finetune]", run=run)["few_labels"]["finetune"]
    assert few["flip"] == 0 and few["epochs"] == 60 and few["lr"] == 0.05
    assert settings("protocol=[few_labels]", run=run)["few_labels"]["finetune"] is None
    assert settings("protocol=[finetune]", run={})["finetune"]["flip"] == 0.5
    assert settings("protocol=[tent]", "protocol.tent.images=8", run=run)["tent"] == {
        **run["protocol"]["tent"],
        "images": 8,
    }
    assert settings("protocol=[t3a]", run=run)["t3a"]["linear"]["iterations"] == 7, (
        "the run's probe, where it has no t3a"
    )


@pytest.mark.parametrize(
    ("asked", "k"),
    [
        (["protocol.knn.k=5"], 5),
        (["++protocol.knn.k=5"], 5),
        (["++protocol.knn={k:5}"], 5),
        (["++protocol={knn:{k:5}}"], 5),
        (["protocol.knn.k=5", "protocol.knn.k=6"], 6),
        (["protocol.knn.k=5", "++protocol.knn.k=6"], 6),
        (["++protocol.knn.k=6", "protocol.knn.k=5"], 5),
        (["protocol.knn.k=5", "++protocol.knn={k:6}"], 6),
        (["protocol.knn.temperature=0.5"], 30),
        ([], 30),
    ],
)
def test_the_last_override_of_a_protocol_wins(asked: list[str], k: int) -> None:
    assert settings(*asked, run=recorded("protocol.knn.k=30"))["knn"]["k"] == k


@pytest.mark.parametrize("name", ["evaluate", "cluster"])
@pytest.mark.parametrize(
    ("asked", "precision"),
    [
        (["runtime.precision=fp32"], "fp32"),
        (["++runtime.precision=fp32"], "fp32"),
        (["++runtime={precision:fp32}"], "fp32"),
        (["runtime.precision=fp16", "++runtime.precision=fp32"], "fp32"),
        (["runtime.device=cpu"], "auto"),  # the precision of a training is not that of its evaluations
    ],
)
def test_the_last_override_of_the_runtime_wins(name: str, asked: list[str], precision: str) -> None:
    cfg = composed("run=x", *asked, name=name)
    runtime, notes = recorded_runtime(cfg, recorded("runtime.precision=bf16", "runtime.device=cpu"), asked)
    assert runtime.precision == precision and runtime.device == "cpu" and not notes
