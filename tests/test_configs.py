"""Every file of every group composes, passes the check and builds; names follow from configurations as promised."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from twoviews.assembly import make_parts, make_views
from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.config.command_line import check_arguments
from twoviews.config.composition import register_resolvers
from twoviews.config.digest import digest
from twoviews.data.images import ImageData, Images
from twoviews.errors import BadInput

CONF = ROOT / "conf"


def composed(*overrides: str, name: str = "train"):
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(name, list(overrides))


def images(count: int, channels: int, size: int, classes: int) -> ImageData:
    """As many images as a data set has, all black, in the memory of one."""
    pixels = torch.zeros(1, channels, size, size, dtype=torch.uint8).expand(count, -1, -1, -1)
    split = Images(pixels, torch.full((count, 2), size), torch.arange(count) % classes)
    facts = {"mean": (0.5,) * channels, "std": (0.25,) * channels, "digest": "0", "notes": ()}
    names = tuple(map(str, range(classes)))
    return ImageData(
        name="black", train=split, memory=split, test=split, classes=names, channels=channels, size=size, **facts
    )


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def fitting(method: str) -> list[str]:
    """What the methods of ImageNet's size need for 50,000 images."""
    if method in ("moco_v1", "moco_v2"):
        return ["method.queue_size=4096"]
    return ["method.clusters=null", "method.negative_prototypes=null"] if method in ("pcl_v1", "pcl_v2") else []


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds(experiment: str) -> None:
    data = ["data=cifar100"] if experiment == "laptop" else []
    cfg = composed(f"experiment={experiment}", *data)
    check("train", cfg)
    cifar = images(50_000, 3, 32, 10)
    parts = make_parts(cfg, cifar, make_views(cfg, cifar), build(cfg.runtime), torch.device("cpu"))
    assert len(parts.loader) == 50_000 // cfg.batch_size


def test_pixels_that_a_backbone_leaves_over_are_said_for_each_size_of_views() -> None:
    cfg = composed(
        "method=swav", "data=cifar10", "backbone=timm", "backbone.name=convmixer_768_32", "augmentation=multicrop"
    )
    black = images(2_000, 3, 66, 10)
    parts = make_parts(cfg, black, make_views(cfg, black), build(cfg.runtime), torch.device("cpu"))
    said = [note for note in parts.notes if "not seen by convmixer_768_32" in note]
    sizes = {66, *parts.views.sizes}
    assert len(sizes) > 1
    assert {size for size in sizes if any(f"{size}x{size} px" in note for note in said)} == {
        size for size in sizes if size % 7
    }
    assert any("66x66 px, 3 row(s) and 3 column(s)" in note and "63 px have none" in note for note in said)
    cfg = composed("method=swav", "data=cifar10", "backbone=timm", "augmentation=multicrop")  # a vision transformer
    with pytest.raises(BadInput, match="cannot take views of"):
        make_parts(cfg, black, make_views(cfg, black), build(cfg.runtime), torch.device("cpu"))


@pytest.mark.parametrize("method", options("method"))
def test_every_method_can_be_put_into_the_laptop_recipe(method: str) -> None:
    cfg = composed("experiment=laptop", f"method={method}", "data=cifar10", *fitting(method))
    check("train", cfg)
    cifar = images(50_000, 3, 32, 10)
    make_parts(cfg, cifar, make_views(cfg, cifar), build(cfg.runtime), torch.device("cpu"))


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in ("method", "augmentation", "optimizer", "schedule") for o in options(g)]
)
def test_every_choice_builds(group: str, option: str) -> None:
    views = {"multicrop": ["method=supervised"], "dino": ["method=supervised"], "lejepa": ["method=lejepa"]}
    more = views.get(option, []) if group == "augmentation" else []
    more += fitting(option) if group == "method" else []
    cfg = composed("data=cifar10", "backbone=tiny", f"{group}={option}", *more)
    check("train", cfg)
    cifar = images(50_000, 3, 32, 10)
    make_parts(cfg, cifar, make_views(cfg, cifar), build(cfg.runtime), torch.device("cpu"))


@pytest.mark.parametrize("backbone", options("backbone"))
def test_every_backbone_gives_features(backbone: str) -> None:
    size = 64 if backbone in ("resnet18", "resnet34", "resnet50", "timm") else 32
    cfg = composed(f"backbone={backbone}")
    check("train", cfg)
    encoder = build(cfg.backbone, channels=4, image_size=size)
    assert encoder(torch.zeros(2, 4, size, size)).shape == (2, encoder.out_dim)


@pytest.mark.parametrize("data", options("data"))
def test_every_data_set_passes_the_check(data: str) -> None:
    check("train", composed(f"data={data}"))


@pytest.mark.parametrize(
    "choice",
    [
        "tracking=files",
        "tracking=mlflow",
        "protocol=[knn]",
        "protocol=[linear]",
        "protocol=knn",
        "protocol=[corruptions,bn,tent,t3a,tsd,tsd_mended]",
    ],
)
def test_other_groups(choice: str) -> None:
    cfg = composed(choice)
    check("train", cfg)
    for node in cfg.protocol.values():
        build(node)


def test_evaluate_composes() -> None:
    check("evaluate", composed("run=x", name="evaluate"))


def test_digests_are_those_of_earlier_versions() -> None:
    """By which runs are found again; the first is what `python train.py` trained in version 0.1.0."""
    former = ("epochs=60", "optimizer=sgd_short")
    assert digest(composed(*former)) == "8d016ac0"
    assert digest(composed(*former, "small_views.scale=0.5")) == "8d016ac0", "of epochs that there are none of"
    assert digest({"path": "/x"}) == "35f07098"


def test_digest_follows_what_changes_results() -> None:
    same = digest(composed())
    assert digest(composed("fresh=true", "tracking=files", "preview=true", "find_batch=true")) == same
    changes = ("seed=1", "small_views.share=0.5", "optimizer.lr=0.02", "method=simclr")
    assert len({same, *(digest(composed(change)) for change in changes)}) == 5


def test_choices_of_method_and_data_give_way_to_the_command() -> None:
    cfg = composed("method=byol", "data=cifar10")
    assert cfg.augmentation.views.second.solarize > 0
    assert composed("method=byol", "data=digits").augmentation == composed("augmentation=digits").augmentation
    chosen = composed("method=byol", "data=digits", "augmentation=none", "backbone=resnet18_cifar")
    assert chosen.augmentation == composed("augmentation=none").augmentation and chosen.backbone.width == 64


def test_no_two_files_of_a_group_say_the_same() -> None:
    # Augmentations are left out: two papers may well use the same numbers.
    for group in (
        path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "special", "augmentation")
    ):
        contents = [OmegaConf.to_yaml(OmegaConf.load(path)) for path in sorted(group.glob("*.yaml"))]
        assert len(contents) == len(set(contents)), group


def test_experiments_name_command_number_and_source() -> None:
    for path in sorted((CONF / "experiment").glob("*_cifar10*.yaml")):
        header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        assert f"experiment={path.stem}" in header and "Expected" in header and "Source" in header and "%" in header, (
            path
        )


def test_top_level_has_the_files_that_the_readme_maps() -> None:
    text = Path(ROOT / "README.md").read_text()
    for path in sorted((ROOT / "src" / "twoviews").glob("*.py")):
        assert (
            path.name == "__init__.py"
            or path.name in text
            or path.stem in ("distributed", "ranges", "errors", "randomness", "pictures", "console")
        ), path


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "protocol=[knn],[knn,linear]"],
        ["-m", "protocol=choice([knn],[linear])", "seed=1,2"],
        ["-m", "method='simclr','pcl'"],
        ["hydra/help=default"],
        ["~tracking"],
    ],
)
def test_choices_that_hydra_understands_are_accepted(words: list[str]) -> None:
    check_arguments("train", words)


def test_choices_of_another_folder_are_known_and_others_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    more = ["--config-dir", str(tmp_path)]
    check_arguments("train", ["experiment=mine", *more])
    for word in ("experiment=typo", "hydra/launcher=basic", "method=mine"):
        with pytest.raises(BadInput, match="there is no such"):
            check_arguments("train", [word, *more])
