"""cluster.py as a user meets it: the files, the scores, the run's MLflow page, and the picture sheet."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL_MOCO, refused, start
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from test_configs import composed, options
from torch.nn import functional as nnf

from twoviews.clusters import sheet
from twoviews.clusters.kmeans import Clusters
from twoviews.config.checks import check
from twoviews.data.images import Images
from twoviews.data.sources import digits
from twoviews.features import embed
from twoviews.locks import training_lock
from twoviews.run import Run
from twoviews.tracking.__main__ import main as tracking
from twoviews.tracking.metrics import Metrics, log_metrics, read
from twoviews.tracking.state import run_id, set_target
from twoviews.tracking.upload import upload

PER_K = ("largest", "smallest", "empty", "concentration_min", "concentration_max", "nmi", "ari", "accuracy", "purity")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a small run with tracking=files; tests that write into it work on a copy, `run`."""
    place = tmp_path_factory.mktemp("trained")
    arguments = [*SMALL_MOCO, "protocol=[knn]", "hydra.run.dir=outputs/run"]
    assert start([str(ROOT / "train.py"), *arguments], place).wait(300) == 0, (place / "stderr.txt").read_text()
    return place / "outputs" / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "outputs" / "run")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """An SQLite store: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def mirror(run: Path, uri: str, experiment: str) -> None:
    """Make it a run that was trained with tracking=mlflow."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("mirror: false", "mirror: true"))
    set_target(run, uri, experiment)


def test_files_scores_and_names(run: Path, command) -> None:
    done = command("cluster", f"run={run}", "clusters=[20,5]")
    assert done.code == 0, done.err
    head, *rows = [re.findall(r"[^│┃\s]+", line) for line in done.out.splitlines() if line[:1] in "│┃" and line]
    assert head[0] == "k" and "nmi," in head and [row[0] for row in rows] == ["5", "20"], "a row for each k"
    files = "clusters.json, clusters_5.npz, clusters_5.png, clusters_20.npz, clusters_20.png"
    assert f"written to outputs/run: {files}\n" in done.out  # below the working directory
    written = json.loads((run / "clusters.json").read_text())
    assert list(written["scores"]) == ["5", "20"] and written["settings"]["images"] == 256
    data = digits(train_images=256)
    x = embed(Run(run).encoder(), data.train, data, torch.device("cpu"), torch.float32, channels_last=True)
    x = nnf.normalize(x, dim=1)
    for k in (5, 20):
        saved = {name: torch.from_numpy(value) for name, value in np.load(run / f"clusters_{k}.npz").items()}
        assert saved.keys() == {"assignment", "distance", "centroids", "concentration"}
        assert saved["centroids"].shape == (k, x.shape[1])
        distance = (x - saved["centroids"][saved["assignment"]]).square().sum(1)
        torch.testing.assert_close(saved["distance"], distance, rtol=1e-3, atol=1e-5)
        assert saved["concentration"].mean() == pytest.approx(0.2, rel=1e-4)
        assert written["scores"][str(k)].keys() == set(PER_K)
        nmi = 100 * normalized_mutual_info_score(data.train.labels, saved["assignment"])
        assert written["scores"][str(k)]["nmi"] == pytest.approx(nmi)
        assert Image.open(run / f"clusters_{k}.png").format == "PNG"
    last = list(read(run))[-1]
    assert last["step"] == json.loads((run / "result.json").read_text())["step"]
    for k, scores in written["scores"].items():
        assert {key: last[f"clusters/k{k}/{key}"] for key in scores} == scores


def test_the_same_again_adds_nothing_and_k_does_not_depend_on_the_others(run: Path, command) -> None:
    def assignment(name: str) -> np.ndarray:
        return np.load(run / f"{name}.npz")["assignment"]

    assert command("cluster", f"run={run}", "clusters=[5,20]").code == 0
    both, lines = assignment("clusters_20"), (run / "metrics.jsonl").read_bytes()
    scores = json.loads((run / "clusters.json").read_text())["scores"]
    assert command("cluster", f"run={run}", "clusters=[20]").code == 0
    assert (assignment("clusters_20") == both).all()
    assert (run / "metrics.jsonl").read_bytes() == lines
    assert json.loads((run / "clusters.json").read_text())["scores"] == scores  # of k = 5 too
    assert command("cluster", f"run={run}", "clusters=[20]", "seed=1").code == 0
    assert (assignment("clusters_20") != both).any()
    assert list(json.loads((run / "clusters.json").read_text())["scores"]) == ["20"]


def test_the_starts_of_k_means_are_settings(run: Path, command) -> None:
    inertia = {}
    for nredo in (1, 20, "null"):
        assert command("cluster", f"run={run}", "clusters=[10]", f"nredo={nredo}").code == 0
        inertia[nredo] = np.load(run / "clusters_10.npz")["distance"].sum()
        written = json.loads((run / "clusters.json").read_text())
        assert written["settings"]["nredo"] == (None if nredo == "null" else nredo)
    assert inertia[20] < inertia[1] and inertia["null"] < inertia[1]
    found = written["scores"]["10"]
    phi = np.load(run / "clusters_10.npz")["concentration"] / 0.2
    assert (found["concentration_min"], found["concentration_max"]) == (
        pytest.approx(phi.min(), rel=1e-5),
        pytest.approx(phi.max(), rel=1e-5),
    )
    assert {"clusters/k10/concentration_min", "clusters/k10/concentration_max"} < list(read(run))[-1].keys()
    refused(command("cluster", f"run={run}", "clusters=[10]", "nredo=0"), "nredo=0", "at least 1")


def test_another_split_leaves_the_first_alone(run: Path, command) -> None:
    assert command("cluster", f"run={run}", "clusters=[5]").code == 0
    before = (run / "clusters.json").read_bytes()
    done = command("cluster", f"run={run}", "clusters=[5]", "split=test")
    assert done.code == 0, done.err
    assert (run / "clusters.json").read_bytes() == before
    assert json.loads((run / "clusters_test.json").read_text())["settings"]["images"] == 360
    assert len(np.load(run / "clusters_test_5.npz")["assignment"]) == 360
    assert "clusters_test/k5/nmi" in list(read(run))[-1]


def test_other_pictures_without_labels(run: Path, command, tmp_path: Path) -> None:
    photo = Image.fromarray(_flower())
    (tmp_path / "my photos").mkdir()
    for number in range(40):
        left, top = 12 * number, 7 * number
        photo.crop((left, top, left + 90, top + 60)).save(tmp_path / "my photos" / f"{number:02}.png")
    other = ("data=folder", "data.root=my photos", "data.workers=0", "data.cache=cache")
    refused(command("cluster", f"run={run}", "clusters=[4]", *other), "1 channel", "have 3", "data.channels=1")
    done = command("cluster", f"run={run}", "clusters=[4]", *other, "data.channels=1")
    assert done.code == 0, done.err
    written = json.loads((run / "clusters_my_photos.json").read_text())
    assert written["scores"]["4"].keys() == {*PER_K[:5], "silhouette"}
    saved = np.load(run / "clusters_my_photos_4.npz")
    assert [Path(path).name for path in saved["paths"]] == [f"{number:02}.png" for number in range(40)]
    assert "clusters_my_photos/k4/silhouette" in list(read(run))[-1]
    assert Image.open(run / "clusters_my_photos_4.png").height > 4 * 60
    refused(command("cluster", f"run={run}", "clusters=[4]", *other, "data.channels=1", "split=test"), "split=train")


# (arguments, what the sentence names)
COMMANDS = [
    (["clusters=[0]"], ["clusters=[0]", "at least 2"]),
    (["clusters=[1]"], ["clusters=[1]", "at least 2"]),
    (["clusters=[]"], ["clusters=[]", "empty list"]),
    (["clusters=ten"], ["clusters=ten", "not a whole number"]),
    (["clusters=[ten]"], ["clusters=['ten']", "whole number"]),
    ([], ["clusters", "not set"]),
    (["clusters=[5,257]"], ["clusters=257", "256 images", "at most 256"]),
    (["clusters=[5]", "split=nonsense"], ["split=nonsense", "train, memory, test"]),
    (["clusters=[5]", "splt=test"], ["splt", "'split'"]),
    (["clusters=[5]", "seed=-1"], ["seed=-1", "at least 0"]),
    (["clusters=[5]", "temperature=0"], ["temperature=0", "above 0"]),
    (["clusters=[5]", "runtime.device=gpu"], ["gpu", "cuda"]),
    (["clusters=[5]", "data.root=photos"], ["data.root", "choose one of: array"]),
    (["clusters=[5]", "data=folder"], ["data.root"]),
    (["clusters=[5]", "data=nonsense"], ["nonsense", "folder"]),
]


@pytest.mark.parametrize(("arguments", "parts"), COMMANDS, ids=[" ".join(one) or "nothing" for one, _ in COMMANDS])
def test_bad_input(trained: Path, command, arguments: list[str], parts: list[str]) -> None:
    before = sorted(trained.iterdir())
    refused(command("cluster", f"run={trained}", *arguments), *parts)
    assert sorted(trained.iterdir()) == before


@pytest.mark.parametrize("data", [name for name in options("data") if name != "digits"])
def test_other_data_compose(data: str) -> None:
    # digits.yaml is a whole recipe, with a network and an optimizer.
    check("cluster", composed("run=x", "clusters=[2]", f"data={data}", name="cluster"))


def test_folders_that_cannot_be_clustered(run: Path, command, tmp_path: Path) -> None:
    refused(command("cluster", "clusters=[5]"), "run")
    refused(command("cluster", f"run={run.parent}/other", "clusters=[5]"), "holds no run", str(run))
    with training_lock(run):
        refused(command("cluster", f"run={run}", "clusters=[5]"), "is being trained", "Ctrl-C")
    (run / "encoder.safetensors").unlink()
    refused(command("cluster", f"run={run}", "clusters=[5]"), "holds no encoder")


# (run=, what it needs to know; images of the run itself)
ENCODERS = {
    "run/last.pt": True,  # a checkpoint in a run folder
    "run/encoder.safetensors": False,
    "alone.pt": False,  # weights alone
    "torchvision:resnet18": False,
    "torchvision:resnet18:pretrained": False,
    "timm:vit_tiny_patch16_224": False,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder(trained: Path, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    own_images, name = ENCODERS[name], name.replace("run/", f"{trained}/")
    torch.manual_seed(0)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (cache := tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    for path in (Path("alone.pt"), cache / "resnet18-f37072fd.pth"):
        torch.save(weights, path)
    channels = 1 if str(trained) in name else 3
    for number in range(12):
        values = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        (folder := tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(values).save(folder / f"{number:02}.png")
    other = ("data=folder", "data.root=pictures", "data.workers=0", "data.cache=cache", f"data.channels={channels}")
    before = sorted(path.name for path in trained.iterdir())
    done = command("cluster", f"run={name}", "clusters=[3]", *([] if own_images else other), "runtime.device=cpu")
    assert done.code == 0, done.err
    assert sorted(path.name for path in trained.iterdir()) == before  # results of a file are not those of the run
    (folder,) = Path("outputs").glob("evaluation-*")
    stem = "clusters" if own_images else "clusters_pictures"
    assert {path.name for path in folder.iterdir()} >= {f"{stem}.json", f"{stem}_3.npz", f"{stem}_3.png"}
    settings = json.loads((folder / f"{stem}.json").read_text())["settings"]
    assert settings["images"] == len(np.load(folder / f"{stem}_3.npz")["assignment"]) == (256 if own_images else 12)
    assert "images are normalised with mean=[" in done.out and len(settings["mean"]) == channels
    if not own_images:
        refused(command("cluster", f"run={name}", "clusters=[3]"), "its images are not known", "data=folder")
        refused(command("cluster", f"run={name}", "clusters=[13]", *other), "clusters=13", "at most 12")
        mean = f"mean=[{','.join(['0.5'] * channels)}]"
        refused(command("cluster", f"run={name}", "clusters=[3]", *other, mean), "mean= and std= belong together")


def test_everything_in_the_same_mlflow_run(run: Path, store: str, command) -> None:
    from mlflow.tracking import MlflowClient

    mirror(run, store, "same")
    upload(run, training_ended=True)
    made = run_id(run)
    done = command("cluster", f"run={run}", "clusters=[6,12]")
    assert done.code == 0, done.err
    plain = re.sub(r"[\s│]", "", done.out)  # the table folds long lines
    assert "tracking sync" not in done.out and f"runs/{made}" in plain
    client = MlflowClient(store)
    (stored,) = client.search_runs([client.get_experiment_by_name("same").experiment_id])
    assert (stored.info.run_id, stored.info.status) == (made, "FINISHED")
    scores = json.loads((run / "clusters.json").read_text())["scores"]
    for k in ("6", "12"):
        assert {key: stored.data.metrics[f"clusters/k{k}/{key}"] for key in PER_K} == scores[k]
    artifacts = {artifact.path for artifact in client.list_artifacts(made)}
    assert artifacts >= {"clusters.json", "clusters_6.npz", "clusters_6.png", "clusters_12.npz", "clusters_12.png"}
    assert stored.data.metrics["knn/top1"] == json.loads((run / "result.json").read_text())["knn/top1"]


def test_a_server_that_is_away_costs_nothing(run: Path, store: str, command) -> None:
    from mlflow.tracking import MlflowClient

    done = command("cluster", f"run={run}", "clusters=[5]")
    assert done.code == 0 and "MLflow does not have this, because the run has tracking=files" in done.out
    mirror(run, "http://127.0.0.1:9", "away")
    done = command("cluster", f"run={run}", "clusters=[7]")
    assert done.code == 0, done.err
    assert (
        "MLflow does not have all of this run" in done.out and f"`python -m twoviews.tracking sync {run}`" in done.out
    )
    assert (run / "clusters_7.png").exists() and "clusters/k7/nmi" in list(read(run))[-1]
    assert tracking(["sync", str(run), "--uri", store, "--experiment", "later"]) == 0
    stored = MlflowClient(store).get_run(run_id(run))
    assert {"clusters/k5/nmi", "clusters/k7/nmi", "knn/top1"} <= stored.data.metrics.keys()


# the record


def test_a_line_added_afterwards(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.log(3, 0.5, {"train/loss": 1.0})
    kept = metrics.flush()
    metrics.log(4, 0.75, {"train/loss": 0.5})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "epo')  # kill -9 in the middle of a write
    log_metrics(tmp_path, {"clusters/k5/nmi": 50.0, "clusters/k5/silhouette": float("nan")})
    assert list(read(tmp_path))[-1] | {"time": 0} == {"step": 4, "epoch": 0.75, "time": 0, "clusters/k5/nmi": 50.0}
    log_metrics(tmp_path, {"clusters/k5/nmi": 50.0, "clusters/k9/nmi": 60.0})
    assert list(read(tmp_path))[-1].keys() == {"step", "epoch", "time", "clusters/k9/nmi"}
    for nmi in (70.0, 50.0, 50.0):  # measured otherwise, and again: the last one is the newest
        log_metrics(tmp_path, {"clusters/k5/nmi": nmi})
    assert [line["clusters/k5/nmi"] for line in read(tmp_path) if "clusters/k5/nmi" in line] == [50.0, 70.0, 50.0]
    Metrics(tmp_path, kept).close()  # the run goes on from its checkpoint
    assert [line["step"] for line in read(tmp_path)] == [3]


def test_a_line_added_to_nothing(tmp_path: Path) -> None:
    log_metrics(tmp_path, {"clusters/k5/nmi": 50.0})
    assert [line["step"] for line in read(tmp_path)] == [0]


# the picture


def _flower() -> np.ndarray:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[1]


def grouped(assignment: list[int], k: int, labels: list[int] | None = None, size: int = 32, channels: int = 1):
    """Images (all grey) and clusters of them; image i is i away from its centroid."""
    count = len(assignment)
    pixels = torch.full((count, channels, size, size), 128, dtype=torch.uint8)
    images = Images(pixels, torch.full((count, 2), size), None if labels is None else torch.tensor(labels))
    distance = torch.arange(count, dtype=torch.float32)
    return images, Clusters(torch.tensor(assignment), torch.zeros(k, 2), distance, 1)


def drawn(path: Path, images: Images, clusters: Clusters) -> np.ndarray:
    sheet.draw_clusters(path, images, clusters, ("cat", "кошка", "a very long name of a class indeed"), "title")
    return np.asarray(Image.open(path)).astype(int)


def height(rows: int, side: int) -> int:
    return sheet.HEADING_PX + rows * (side + sheet.GAP) + sheet.GAP


def test_rows_are_the_clusters_in_order(tmp_path: Path) -> None:
    # Cluster 0: half; 1: pure and tight; 2: empty; 3: pure, one image; 4: two thirds.
    images, clusters = grouped([1, 1, 0, 0, 3, 4, 4, 4], 5, [0, 0, 1, 0, 2, 1, 0, 1])
    rows = sheet.cluster_rows(clusters, images.labels)
    assert [(row.cluster, row.majority, round(row.purity, 2)) for row in rows] == [
        (1, 0, 1),
        (3, 2, 1),
        (4, 1, 0.67),
        (0, 0, 0.5),
    ]
    assert [row.cluster for row in sheet.cluster_rows(clusters, None)] == [1, 0, 3, 4]
    assert rows[2].members.tolist() == [5, 6, 7]
    assert rows[2].caption(("a", "b", "c")) == ["cluster 4", "3 images", "67 % are b"]
    assert rows[1].caption(("a", "b", "c")) == ["cluster 3", "1 image", "100 % are c"]
    assert sheet.cluster_rows(clusters, None)[0].caption(()) == ["cluster 1", "2 images", "distance 0.5"]
    picture = drawn(tmp_path / "sheet.png", images, clusters)
    assert picture.shape[0] == height(4, 96)
    step, framed = 96 + sheet.GAP, []
    for row in range(4):
        line = picture[sheet.HEADING_PX + row * step - 2]  # px above the images, where frames run
        framed.append([bool((line[sheet.CAPTION_PX + step * place + 48] == sheet.RED).all()) for place in range(4)])
    assert framed == [[False] * 4, [False] * 4, [False, True, False, False], [True, False, False, False]]


def test_a_spread_of_many_clusters(tmp_path: Path) -> None:
    images, clusters = grouped(list(range(50)) * 2, 50)
    chosen = [row.cluster for row in sheet.evenly_spaced(sheet.cluster_rows(clusters, None))]
    assert len(chosen) == sheet.MAX_ROWS and (chosen[0], chosen[-1]) == (0, 49) and chosen == sorted(set(chosen))
    assert drawn(tmp_path / "sheet.png", images, clusters).shape[0] == height(sheet.MAX_ROWS, 96)


def test_nearest_and_farthest_each_once() -> None:
    shown = [sheet.cluster_rows(grouped([0] * count, 1)[1], None)[0].shown for count in (3, 12, 30)]
    assert shown == [[0, 1, 2], list(range(12)), [*range(10), 26, 27, 28, 29]]


@pytest.mark.parametrize(("size", "side"), [(8, 96), (40, 120), (64, 128), (224, 128)])
def test_images_in_a_size_to_look_at(tmp_path: Path, size: int, side: int) -> None:
    images, clusters = grouped([0, 1, 1], 2, size=size, channels=5)
    picture = drawn(tmp_path / "sheet.png", images, clusters)
    assert picture.shape[0] == height(2, side)
    grey = (abs(picture - 128) <= 1).all(axis=2)
    assert grey[sheet.HEADING_PX : sheet.HEADING_PX + side, sheet.CAPTION_PX : sheet.CAPTION_PX + side].all()


def test_pictures_that_are_not_square_keep_their_shape(tmp_path: Path) -> None:
    # A circle in a picture of 60 x 120 px, whose canvas makes an ellipse of it: on the sheet it is round again.
    y, x = torch.meshgrid(torch.arange(60) - 29.5, torch.arange(120) - 59.5, indexing="ij")
    picture = ((y**2 + x**2) < 20**2).float() * 255
    canvas = nnf.interpolate(picture[None, None], (96, 96), mode="bilinear", antialias=True)
    images, clusters = grouped([0], 1, size=96)
    images = replace(images, pixels=canvas.round().byte(), sizes=torch.tensor([[60, 120]]))
    shown = drawn(tmp_path / "sheet.png", images, clusters)[sheet.HEADING_PX :, sheet.CAPTION_PX :][:96, :96, 0] > 128
    assert shown.any(axis=0).sum() == pytest.approx(64, abs=2) and shown.any(axis=1).sum() == pytest.approx(64, abs=2)
