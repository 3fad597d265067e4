"""A run folder or a sweep folder that means harm: whatever command it is given to, nothing of it is run."""

import itertools
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL_MOCO, Finished, refused
from safetensors.torch import load_file, save_file
from test_configs import composed

import twoviews
from twoviews import launched
from twoviews.assembly import describe_encoder, load_data, make_parts, make_views
from twoviews.checkpoints import save_checkpoint
from twoviews.classifier_file import as_head, load_classifier, save_classifier, save_head
from twoviews.code import copy_digest
from twoviews.config.building import build
from twoviews.config.groups import targets
from twoviews.encoder_file import describe, save_encoder
from twoviews.errors import BadInput
from twoviews.foreign import load
from twoviews.recording import record_start
from twoviews.run import Run
from twoviews.sweep import main as sweep_command
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobSpec, JobState
from twoviews.tracking.__main__ import main as tracking_command
from twoviews.tracking.metrics import read

MADE = "MADE"  # the file that a payload would make, in the working directory; its absolute path is filled in
EVIL = "EVIL"  # a Python module that makes it, likewise
BUILD = [  # _target_ and the rest of a node that Hydra's instantiate would run
    {"_target_": "os.system", "_args_": [f"touch {MADE}"]},
    {"_target_": "subprocess.run", "args": ["touch", MADE]},
    {"_target_": "twoviews.sweeps.job_states.run_slurm", "_args_": ["touch", MADE]},
    {"_target_": "twoviews.tracking.server._run", "_args_": [None, "touch", MADE]},
    {"_target_": "twoviews.tracking.state.replace", "path": {"_target_": "pathlib.Path", "_args_": [MADE]}, "text": ""},
    {"_target_": "twoviews.encoders.opening.Path.touch", "self": MADE},
    {"_target_": "builtins.eval", "_args_": [f"open('{MADE}', 'w')"]},
    {"_target_": "builtins.exec", "_args_": [f"open('{MADE}', 'w')"]},
    {"_target_": "builtins.open", "file": MADE, "mode": "w"},
    {"_target_": "os.symlink", "src": "/", "dst": MADE},
    {"_target_": "shutil.copy", "src": "/etc/hostname", "dst": MADE},
    {"_target_": "runpy.run_path", "path_name": f"{EVIL}.py"},
    {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "evil", "source": "local"},
    {"_target_": "torch.load", "f": f"{EVIL}.pt", "weights_only": False},
    {"_target_": "numpy.load", "file": f"{EVIL}.npy", "allow_pickle": True},
    {"_target_": f"twoviews.{EVIL}.anything"},  # a source file elsewhere, whose assignments would be evaluated
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", "command": f"touch {MADE}"}},
    {"_target_": "twoviews.data.sources.array", "root": f"{EVIL}.npy"},  # ours, and no backbone
    {"_target_": ["os.system"]},
    {"_partial_": True, "_target_": "os.mkdir", "path": MADE},
]
TEXTS = [
    f"${{oc.create:{{_target_:os.system,command:'touch {MADE}'}}}}",
    "${oc.create:{_target_:torch.utils.collect_env.run,command:'touch " + MADE + "'}}",
    "${oc.env:HOME}",
    "${hydra:runtime.cwd}",
    "a${oc.decode:'1'}",
    "\\${oc.env:HOME}",
]
YAML = {  # what a config.yaml would be instead
    "tag": f"data: !!python/object/apply:os.system ['touch {MADE}']\n",
    "new": f"data: !!python/object/new:os.mkdir ['{MADE}']\n",
    "aliases": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "nested": "data: " + "[" * 50_000 + "\n",
    "deep": "data: " + "[" * 60 + "]" * 60 + "\n",
    "large": "data: [" + "1," * 2**20 + "]\n",
    "number": f"seed: {'9' * 300}\n",
    "date": "seed: 2026-01-01\n",
    "defaults": "defaults: [data: digits]\nseed: 0\n",
    "hydra": f"hydra: {{callbacks: {{evil: {{_target_: os.system, command: touch {MADE}}}}}}}\n",
    "binary": "data: !!binary aGVsbG8=\n",
}
JSON = {
    "nested": '{"a":' * 50_000,
    "deep": '{"backbone":' + "[" * 60 + "]" * 60 + "}",
    "broken": '{"a": 1',
    "list": "[]",
}


def test_there_are_enough_of_them() -> None:
    assert len(BUILD) + len(TEXTS) + len(YAML) + len(JSON) > 40


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of a run at its beginning: what train.py writes, without the training."""
    cfg = composed(*SMALL_MOCO)
    data, device = load_data(cfg), torch.device("cpu")
    parts = make_parts(cfg, data, make_views(cfg, data), build(cfg.runtime), device)
    run = Run(tmp_path_factory.mktemp("clean") / "run")
    record_start(run, cfg, parts)
    save_checkpoint(run.folder, {"method": parts.method.state_dict(), "position": {"step": 0}})
    method = {f"method.encoder.{name}": one for name, one in parts.method.encoder.state_dict().items()}
    torch.save(method, run.folder / "weights.pt")
    save_encoder(run.folder, parts.method.encoder, describe_encoder(cfg, data))
    for name in ("finetune-0", "linear-0"):
        (run.folder / "evaluation" / name).mkdir(parents=True)
    encoder = parts.method.encoder
    head = as_head(torch.zeros(10, encoder.out_dim), torch.zeros(10), data.classes)
    save_classifier(run.folder / "evaluation" / "finetune-0", encoder, head, describe(encoder, data))
    save_head(run.folder / "evaluation" / "linear-0", head, encoder, data.size, (data.mean, data.std))
    run.write("result.json", {"state": "interrupted", "step": 0, "epoch": 0.0, "seconds": 1.0})
    (run.folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 0.1, "time": 1.0, "knn/top1": 5.0}) + "\n"
    )
    return run.folder


@pytest.fixture
def place(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep with that run as its only point; the working directory is beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    evil = f"open({str(tmp_path / MADE)!r}, 'w')"
    (tmp_path / "evil.py").write_text(f"import builtins\nanything = __import__('builtins').{evil}\n{evil}\n")
    (tmp_path / "hubconf.py").write_text(f"def evil(): {evil}\n")
    sweep = Sweep(tmp_path / "multirun" / "s")
    code = sweep.folder / "code" / "aa"
    (code / "src").mkdir(parents=True)
    (code / "train.py").write_text(evil)
    sweep.add([JobSpec("aa", {"seed": 0}, ["seed=0"], "", {"cwd": str(tmp_path), "code": str(code), "choices": {}})])
    shutil.copytree(clean, sweep.folder / "aa", dirs_exist_ok=True)
    sweep.jobs[0].write(JobState("INTERRUPTED", starts=1))
    with sweep.update() as record:
        record["launcher"] = {"_target_": "twoviews.sweeps.machine.Local"}
        record["tracking"] = {"uri": None, "experiment": "twoviews"}
    return sweep.folder


Call = Callable[..., Finished]


@pytest.fixture
def entry(command, capfd) -> Call:
    """entry("evaluate", …) as `command`, also for "sweep" and "tracking"."""

    def call(name: str, *arguments: str) -> Finished:
        mains = {"sweep": sweep_command, "tracking": tracking_command}
        if name not in mains:
            return command(name, *arguments)
        capfd.readouterr()
        code = mains[name](list(arguments))
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return call


def harmless(entry: Call, *commands: list[str]) -> None:
    """Each of the commands is refused in one sentence, and nothing was made."""
    for one in commands:
        refused(entry(*one))
        assert not Path(MADE).exists(), one


def filled(payload: object) -> object:
    text = json.dumps(payload).replace(MADE, str(Path(MADE).absolute())).replace(EVIL, str(Path("evil").absolute()))
    return json.loads(text)


def nodes(key: str) -> Iterator[Callable[[dict, object], None]]:
    """Ways to put a payload into a file: for the node at the dotted key, for a value of it, and inside a list."""
    *path, last = key.split(".")

    def put(content: dict, payload: object) -> None:
        for one in path:
            content = content[one]
        content[last] = payload

    yield put
    yield lambda content, payload: put(content, [payload])


def with_encoder(run: Path) -> list[list[str]]:
    """Commands that read encoder.json."""
    return [
        ["evaluate", f"run={run}"],
        ["evaluate", f"run={run / 'encoder.safetensors'}"],
        ["evaluate", f"run={run}", "protocol=predict", "images=."],
        ["evaluate", f"run={run}", "protocol=export"],
        ["evaluate", f"run={run}", "protocol=embed", "images=."],
        ["cluster", f"run={run}", "clusters=[5]"],
    ]


def with_classifier(run: Path) -> list[list[str]]:
    """Commands that read classifier.json."""
    return [
        ["evaluate", f"run={run}:finetune"],
        ["evaluate", f"run={run / 'evaluation' / 'finetune-0' / 'classifier.safetensors'}", "protocol=export"],
        ["evaluate", f"run={run}:finetune", "protocol=predict", "images=."],
        ["cluster", f"run={run}:finetune", "clusters=[5]"],
    ]


def with_config(run: Path) -> list[list[str]]:
    """Commands that read config.yaml."""
    return [
        ["evaluate", f"run={run}"],
        ["evaluate", f"run={run / 'weights.pt'}"],
        ["evaluate", f"run={run}", "feature=projection"],
        ["evaluate", f"run={run}", "protocol=finetune"],
        ["cluster", f"run={run}", "clusters=[5]"],
        ["train", *SMALL_MOCO, "seed=7", f"hydra.run.dir={run}"],
        ["train", f"--config-path={run}", "--config-name=config", f"hydra.run.dir={run}", "hydra.output_subdir=null"],
        ["train", f"-cp={run}", "-cn=config.yaml", f"hydra.run.dir={run}"],
        ["train", f"--config-pat={run}", "--config-na=config", f"hydra.run.dir={run}"],
        ["train", f"--config-name={os.path.relpath(run / 'config', 'conf')}", f"hydra.run.dir={run}"],
        ["tracking", "sync", str(run), "--uri", "sqlite:///mlflow.db"],
    ]


PAYLOADS = [*BUILD, *TEXTS]
# Every payload at several nodes and with several commands, every command with many payloads; each with each is tried by
# tests/campaigns/foreign_folders.py.
each_payload = pytest.mark.parametrize(
    "number",
    range(len(PAYLOADS)),
    ids=[str(one.get("_target_", one) if isinstance(one, dict) else one)[:40] for one in PAYLOADS],
)


@each_payload
def test_encoder_json(entry: Call, place: Path, number: int) -> None:
    path = place / "aa" / "encoder.json"
    clean = path.read_text()
    commands = itertools.cycle(with_encoder(place / "aa"))
    for put in [put for key in ("backbone", "backbone.width", "backbone.depths") for put in nodes(key)]:
        put(content := json.loads(clean), filled(PAYLOADS[number]))
        path.write_text(json.dumps(content))
        harmless(entry, next(commands))


@each_payload
def test_classifier_json(entry: Call, place: Path, number: int) -> None:
    path = place / "aa" / "evaluation" / "finetune-0" / "classifier.json"
    clean = path.read_text()
    commands = itertools.cycle(with_classifier(place / "aa"))
    for put in [put for key in ("backbone", "backbone.width") for put in nodes(key)]:
        put(content := json.loads(clean), filled(PAYLOADS[number]))
        path.write_text(json.dumps(content))
        harmless(entry, next(commands))


@pytest.mark.parametrize("kind", ["json", "classes", "tensors", "bank", "distances", "large", "pickle", "pipe", "link"])
def test_heads_that_are_none(entry: Call, place: Path, kind: str) -> None:
    """Those of a linear evaluation, which twoviews.load reads; and the weights of a classifier."""
    run = place / "aa"
    assert twoviews.load(run, device="cpu").classes == tuple("0123456789")
    for json_file in (
        run / "evaluation" / "linear-0" / "linear_head.json",
        run / "evaluation/finetune-0/classifier.json",
    ):
        weights = json_file.with_suffix(".safetensors")
        if kind == "json":
            json_file.write_text('{"a":' * 50_000)
        elif kind == "classes":
            json_file.write_text(json.dumps({**json.loads(json_file.read_text()), "classes": ["0"]}))
        elif kind == "tensors":
            save_file({"other.weight": torch.zeros(1)}, weights)
        elif kind in ("bank", "distances", "large"):  # another width, none, infinite in float32
            part, tensors = "head." if weights.stem == "classifier" else "", load_file(weights)
            features = tensors[f"{part}weight"].shape[1]
            bank, distances = {
                "bank": (torch.zeros(3, features - 1), torch.zeros(3)),
                "distances": (torch.zeros(3, features), torch.zeros(0)),
                "large": (torch.zeros(3, features), torch.full((3,), 1e300, dtype=torch.float64)),
            }[kind]
            save_file({**tensors, f"{part}bank": bank, f"{part}test_distances": distances}, weights)
        elif kind == "pickle":
            torch.save({"weight": torch.zeros(1), "bias": Path.touch}, weights)
        else:
            weights.unlink()
            os.mkfifo(weights) if kind == "pipe" else weights.symlink_to("/dev/zero")
    with pytest.raises(BadInput, match="linear_head|classifier"):
        _ = twoviews.load(run, device="cpu").classes
    if kind == "tensors":
        with pytest.raises(BadInput, match=r"its tensor other\.weight belongs neither to an encoder nor to a head"):
            load_classifier(run / "evaluation/finetune-0/classifier.safetensors")
    harmless(entry, ["evaluate", f"run={run}:finetune"])


KEYS = (
    "augmentation.views",
    "runtime.device",
    "data.train_images",
    "protocol.linear.iterations",
    "method.embed_dim",
    "tracking.uri",
    "schedule",
)


@each_payload
def test_config_yaml(entry: Call, place: Path, number: int) -> None:
    path = place / "aa" / "config.yaml"
    clean = path.read_text()
    commands = with_config(place / "aa")
    for nth, key in enumerate(KEYS[number % 2 :: 2]):
        put = next(nodes(key))
        put(content := yaml.safe_load(clean), filled(PAYLOADS[number]))
        path.write_text(yaml.safe_dump(content))
        harmless(entry, commands[(3 * number + nth) % len(commands)])


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_more_than_values(entry: Call, place: Path, kind: str) -> None:
    path = place / "aa" / "config.yaml"
    path.write_text(YAML[kind].replace(MADE, str(Path(MADE).absolute())))
    commands = with_config(place / "aa")
    harmless(entry, *(one for one in commands if "feature=projection" not in one))


def test_the_comment_that_hydra_follows(entry: Call, place: Path) -> None:
    path = place / "aa" / "config.yaml"
    path.write_text("# @package hydra\n" + path.read_text())
    harmless(entry, ["train", f"--config-path={place / 'aa'}", "--config-name=config"])


POINTS = ("sweep.json", "aa/point.json", "aa/state.json", "aa/result.json", "aa/environment.json")
SWEEPS = ("status", "logs", "retry", "report", "collect", "cancel")


@pytest.mark.parametrize("payload", [BUILD[0], BUILD[2]], ids=("system", "run"))
@pytest.mark.parametrize("file", POINTS)
def test_files_of_a_sweep(entry: Call, place: Path, file: str, payload: object) -> None:
    path = place / file
    content = json.loads(path.read_text())
    for key in ("launcher", "host", "state", "axes"):
        if key in content or file.endswith("environment.json"):
            path.write_text(json.dumps({**content, key: filled(payload)}))
            reading = SWEEPS if file not in ("aa/result.json", "aa/environment.json") else ("report",)
            harmless(entry, *(["sweep", one, str(place)] for one in reading))


def test_keys_of_a_job_that_no_sweep_writes(entry: Call, place: Path) -> None:
    """They are left out: `folder` is where a job lies, not what its entry says."""
    path = place / "sweep.json"
    content = json.loads(path.read_text())
    content["points"]["aa"] |= {"folder": str(place.parent / MADE), "anything": [1]}
    path.write_text(json.dumps(content))
    shown = entry("sweep", "status", str(place))
    assert shown.code == 1 and "aa" in shown.out and "INTERRUPTED" in shown.out, shown.err


@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_more_than_values(entry: Call, place: Path, kind: str) -> None:
    run = place / "aa"
    for file, commands in {
        "encoder.json": with_encoder(run),
        "result.json": [["evaluate", f"run={run}"], ["tracking", "sync", str(run), "--uri", "sqlite:///mlflow.db"]],
        "tracking.json": [["tracking", "sync", str(run)]],
        "point.json": [["sweep", one, str(place)] for one in SWEEPS],
        "../sweep.json": [["sweep", one, str(place)] for one in SWEEPS],
    }.items():
        before = (run / file).read_text() if (run / file).exists() else "{}"
        (run / file).write_text(JSON[kind])
        harmless(entry, *commands)
        (run / file).write_text(before)


def test_code_and_launchers_from_elsewhere_are_not_run_again(entry: Call, place: Path) -> None:
    """A sweep brings its code and its launcher, whose `setup` are shell commands; only one's own are run."""
    refused(entry("sweep", "retry", str(place)), str(place), "launch")
    assert not Path(MADE).exists()
    launched.remember(json.dumps({"_target_": "twoviews.sweeps.machine.Local"}, sort_keys=True))
    refused(entry("sweep", "retry", str(place)), str(place), "launch")
    assert not Path(MADE).exists()
    code = place / "code" / "aa"
    launched.remember(copy_digest(code))
    for change in (
        lambda: (code / "src" / "torch.py").write_text(""),
        lambda: (code / "src" / "torch").symlink_to("/"),
        lambda: (code / "train.py").write_text("1"),
    ):
        change()
        refused(entry("sweep", "retry", str(place)), str(place), "launch")
        shutil.rmtree(code)
        (code / "src").mkdir(parents=True)
        (code / "train.py").write_text(f"open({str(Path(MADE).absolute())!r}, 'w')")
    assert not Path(MADE).exists()
    cache = code / "src" / "__pycache__"
    cache.mkdir()
    (cache / f"torch.{sys.implementation.cache_tag}.pyc").write_text("")
    assert launched.remembered(copy_digest(code)) and not cache.exists()
    entry("sweep", "retry", str(place))
    assert Path(MADE).exists(), "what was launched here is run again"


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "", "-x"])
def test_names_of_points_stay_in_the_sweep(entry: Call, place: Path, name: str) -> None:
    record = json.loads((place / "sweep.json").read_text())
    (place / "sweep.json").write_text(json.dumps({**record, "points": {name: {"axes": {}}}}))
    harmless(entry, *(["sweep", one, str(place)] for one in SWEEPS))


def test_jobs_are_no_options_of_scancel(entry: Call, place: Path) -> None:
    record = json.loads((place / "sweep.json").read_text())
    record["points"]["aa"]["job"] = "--user=everybody"
    (place / "sweep.json").write_text(json.dumps(record))
    harmless(entry, *(["sweep", one, str(place)] for one in SWEEPS))


def test_a_store_does_not_choose_where_files_are_written(entry: Call, place: Path) -> None:
    """The database that tracking.json names may lie in the foreign folder, and says where the run's files belong."""
    run, uri = place / "aa", f"sqlite:///{place / 'aa' / 'mlflow.db'}"
    assert entry("tracking", "sync", str(run), "--uri", uri).code == 0
    (Path.cwd() / "home").mkdir()
    with sqlite3.connect(run / "mlflow.db") as database:
        database.execute("UPDATE runs SET artifact_uri = ?", (str(Path.cwd() / "home"),))
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "evil.py").write_text("")
    refused(entry("tracking", "sync", str(run)), "which is not a folder of that run")
    assert not list((Path.cwd() / "home").iterdir())


@pytest.mark.parametrize(
    "line", ['{"a":' * 50_000, "[1]", '{"step": 1, "epoch": [], "time": 1}', '{"step": 1, "epoch": "x", "time": 1}']
)
def test_metrics_that_are_no_numbers_end_the_file(tmp_path: Path, line: str) -> None:
    whole = '{"step": 1, "epoch": 1, "time": 1, "a": "NaN"}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + line + "\n" + whole)
    assert len(list(read(tmp_path))) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    (tmp_path / "encoder.json").mkdir()
    for name in ("config.yaml", "encoder.json"):
        with pytest.raises(BadInput, match="no regular file"):
            load(tmp_path / name)
    assert load(tmp_path / "result.json") == {}


RUN_FILES = (
    *("config.yaml", "encoder.json", "encoder.safetensors", "metrics.jsonl", "result.json", "last.pt", "data.json"),
    *("metrics.durable", "tracking.json", "environment.json", "diff.patch", "log.txt", "weights.pt"),
)


@pytest.mark.parametrize("name", RUN_FILES)
def test_pipes_and_devices_in_a_run_folder_are_not_waited_for(entry: Call, place: Path, name: str) -> None:
    """Without an answer the test would hang: nothing writes into the pipe, and the device never ends."""
    run = place / "aa"
    (run / name).unlink(missing_ok=True)
    if RUN_FILES.index(name) % 2:
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    harmless(
        entry,
        ["evaluate", f"run={run}"],
        ["cluster", f"run={run}", "clusters=[5]"],
        ["evaluate", f"run={run / 'encoder.safetensors'}"]
        if name == "encoder.safetensors"
        else ["evaluate", f"run={run}"],
        ["evaluate", f"run={run / 'weights.pt'}"],
        ["train", *SMALL_MOCO, f"hydra.run.dir={run}"],
    )
    code = entry("tracking", "sync", str(run), "--uri", "sqlite:///mlflow.db").code
    assert code in (1, 2)
    assert entry("sweep", "status", str(place)).code in (1, 2)


def test_a_pipe_in_a_sweep_folder_is_not_waited_for(entry: Call, place: Path) -> None:
    (place / "sweep.json").unlink()
    os.mkfifo(place / "sweep.json")
    for command in ("status", "logs", "report", "retry", "cancel"):
        refused(entry("sweep", command, str(place)))


def test_what_can_be_built_is_what_conf_names() -> None:
    assert targets("backbone") == {"twoviews.backbones.ResNet", "twoviews.backbones.Timm"}
    assert targets("launcher") >= {"twoviews.sweeps.machine.Local", "twoviews.sweeps.slurm.Slurm"}
    assert not any(targets(group) for group in ("", "hydra", "../conf/method", "special", "seed"))


def test_an_older_run_is_judged_without_what_is_gone(entry: Call, place: Path) -> None:
    path = place / "aa" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["runtime"] = {**content["runtime"], "telepathy": True}
    del content["runtime"]["channels_last"]
    path.write_text(yaml.safe_dump(content))
    (place / "aa" / "result.json").write_text(json.dumps({"state": "finished", "step": 8}))
    for one in (
        ["evaluate", f"run={place / 'aa'}", "protocol=knn"],
        ["cluster", f"run={place / 'aa'}", "clusters=[5]"],
    ):
        done = entry(*one)
        assert done.code == 0 and "runtime.telepathy of the run is not known to this version" in done.out, done.err
