"""`python train.py -m`: what is missing of a sweep runs, with the results that single runs have."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
from conftest import ROOT, SMALL_MOCO, assert_same_weights, refused, start
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_runner import wait_for

from twoviews import code, launched
from twoviews.config.digest import digest
from twoviews.errors import BadInput
from twoviews.sweep import main as sweep_command
from twoviews.sweeps.composing import Composer, job_specs
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import JobSpec
from twoviews.sweeps.launching import SweepCommand, default_name, retry
from twoviews.sweeps.slurm import NamedFunction

SLURM = ["seed=0,1", "tracking=files", "hydra/launcher=slurm"]


def master(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose("train", list(overrides), return_hydra_config=True)


def jobs(*combinations: str, swept: tuple[str, ...]):
    return job_specs(Composer(lambda one: master(*one)), [combination.split() for combination in combinations], swept)


def test_the_same_sweep_has_the_same_name_and_another_one_another() -> None:
    one = default_name(master("epochs=3"), ["seed"])
    assert one.startswith("moco-digits-") and one == default_name(master("epochs=3", "method=moco"), ["seed"])
    same = ("tracking=files", "sweep.wait=true", "runtime.log_every=3", "seed=7")
    assert one == default_name(master("epochs=3", *same), ["seed"]), (
        "where it runs and what is swept make no other sweep"
    )
    others = {default_name(master("epochs=4"), ["seed"]), default_name(master("epochs=3"), ["seed", "epochs"]), one}
    assert len(others) == 3
    before = default_name(master("epochs=3", "optimizer=sgd_short"), ["seed"])
    assert before == "moco-digits-7c1f9da5", "sweeps that were launched before go on"
    assert default_name(master(), ["method", "seed"]).startswith("method-digits-")


def test_jobs_know_the_values_of_their_parameters_and_equal_ones_are_one() -> None:
    combinations = ("seed=0 optimizer.lr=1", "seed=1 optimizer.lr=1", "seed=0 optimizer.lr=1.0")
    found = jobs(*combinations, swept=("seed", "optimizer.lr"))
    assert [one.parameters for one in found] == [{"seed": 0, "optimizer.lr": 1}, {"seed": 1, "optimizer.lr": 1}]
    (chosen,) = jobs("method=simclr backbone.depths=[1,1]", swept=("method", "backbone.depths"))
    assert chosen.parameters == {"method": "simclr", "backbone.depths": [1, 1]}
    json.dumps(chosen.parameters)
    groups = chosen.details["choices"]
    assert (groups["method"], groups["data"], groups["experiment"]) == ("simclr", "digits", "none")
    assert not [group for group in groups if group.startswith("hydra") or "@" in group]


@pytest.mark.parametrize(
    "overrides", [["seed=3"], ["method=byol", "data=cifar10"], ["data=folder", "data.root='a b=c,d'", "data.size=32"]]
)
def test_a_frozen_configuration_is_the_run_that_was_composed(overrides: list[str]) -> None:
    (one,) = job_specs(Composer(lambda typed: master(*typed)), [overrides], swept=())
    frozen = OmegaConf.create(one.config_yaml)
    assert one.digest == digest(frozen) == digest(master(*overrides))
    assert "hydra" not in frozen and "sweep" not in frozen and Path(frozen.tracking.uri[10:]).is_absolute()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["method.temperature=0.1,-1"], ["job method.temperature=-1", "is out of range"]),
        (["seed=0,1", "fresh=true"], ["fresh=true is for one run"]),
        (["seed=0,1", "preview=true"], ["preview=true is for one run"]),
        (["seed=0,1", "find_batch=true"], ["find_batch=true is for one run"]),
        (["seed=0,1", "+hydra.job.env_set.A=1"], ["hydra.job.env_set.A=1", "would not reach the jobs"]),
        (["seed=0,1", "hydra.run.dir=here"], ["hydra.run.dir=here", "would not reach the jobs"]),
        (["seed=0,1", "hydra.sweep.subdir=${seed}"], ["hydra.sweep.subdir", "would not reach the jobs"]),
        (["optimizer.lr=0.1,0.2", "++optimizer={lr:0.3}"], ["optimizer.lr=0.1,0.2", "set the same values"]),
        (["seed=0,1", "sweep.nam=x"], ["sweep has no key 'nam'", "sweep.name"]),
        (["seed=0,1", "sweep.name=2026"], ["sweep.name=2026", "quote it"]),
        (["seed=0,1", "sweep.name=a/b"], ["sweep.name=a/b is not the name of a folder"]),
        (["seed=0,1", "hydra/launcher=slrm"], ["there is no such hydra/launcher", "slurm"]),
        (["seed=0,1", "hydra/launcher=basic"], ["there is no such hydra/launcher", "local, pool, slurm"]),
        (["seed=0,1", "hydra/sweeper=basic"], ["there is no such hydra/sweeper", "grid, optuna, random, zip"]),
        (["seed=0,1", "hydra/launcher=pool", "hydra.launcher.at_once=0"], ["hydra.launcher.at_once=0", "at least 1"]),
        (["seed=0,1", "hydra/launcher=pool", "+hydra.launcher.gpus=1"], ["hydra.launcher has no key 'gpus'"]),
        (["seed=0,1", "hydra.launcher.options.qos=x"], ["hydra.launcher has no key 'options'"]),
        (SLURM + ["hydra.launcher.options.time=9"], ["hydra.launcher.options.time=", "hydra.launcher.timeout_min="]),
        (SLURM + ["hydra.launcher.options={array:9}"], ["hydra.launcher.options.array=", "leave it out"]),
        (
            ["method=simsiam,moco", "method.hidden_dim=64"],
            ["job method=moco", "method has no key 'hidden_dim'", "launch"],
        ),
        (
            ["method=moco,simsiam", "method.hidden_dim=64"],
            ["job method=moco", "method has no key 'hidden_dim'", "launch"],
        ),
        (["method=byol,simsiam", "method.hiden_dim=64"], ["method has no key 'hiden_dim'", "'method.hidden_dim'"]),
        (["method=glob(x*)"], ["method=glob(x*) fits none", "simclr"]),
    ],
)
def test_what_is_wrong_refuses_the_whole_sweep(command, arguments: list[str], parts: list[str]) -> None:
    refused(command("train", "-m", *arguments), *parts)
    assert not [path for path in Path("multirun").glob("*/*") if path.is_dir()]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["method=simsiam,byol", "method.hidden_dim=64"], [("simsiam", 64), ("byol", 64)]),
        (["experiment=simsiam_cifar10,laptop", "method=simsiam", "method.hidden_dim=64"], [("simsiam", 64)] * 2),
        (["method=glob(simsiam*)", "method.hidden_dim=64,128"], [("simsiam", 64), ("simsiam", 128)]),
        (["method=moco,simclr", "method.temperature=0.5"], [("moco", None), ("simclr", 512)]),
    ],
)
def test_a_key_may_be_one_that_only_the_swept_choices_have(command, monkeypatch, arguments: list, found: list) -> None:
    monkeypatch.setattr("twoviews.sweeps.launching.plan", lambda folder, new, *_: planned.extend(new))
    planned: list = []
    done = command("train", "-m", *arguments, "tracking=files", "sweep.plan=true")
    assert done.code == 0, done.err
    contents = [OmegaConf.create(one.config_yaml).method for one in planned]
    assert [(one["_target_"].split(".")[2], one.get("hidden_dim")) for one in contents] == found


def test_options_of_sbatch_are_typed_as_their_file_says(command, monkeypatch, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    slurm(tmp_path, monkeypatch, sbatch=f'cat "$1" >> {scripts}; echo "Submitted batch job 7"')
    options = ("hydra.launcher.options.constraint=a100", "hydra.launcher.options={qos:low,requeue:false}")
    done = command("train", "-m", *SLURM, *options)
    assert done.code == 0, done.err
    text = scripts.read_text()
    assert "#SBATCH --constraint=a100" in text and "#SBATCH --qos=low" in text and "requeue" not in text
    assert "export SLURM_EXPORT_ENV=ALL" in text and f"{tmp_path}/bin" in text


@pytest.mark.parametrize("scontrol", ["echo 'MaxArraySize            = 4'", None])
def test_arrays_are_as_long_as_the_cluster_takes(command, monkeypatch, tmp_path: Path, scontrol: str | None) -> None:
    jobs = tmp_path / "jobs"
    count = f"$(( $(cat {jobs} | wc -l) + 7 ))"
    sbatch = f'grep -o "array=.*" "$1" >> {jobs} || echo one >> {jobs}; echo "Submitted batch job {count}"'
    slurm(tmp_path, monkeypatch, sbatch=sbatch, scontrol=scontrol)
    assert command("train", "-m", *SLURM[1:], "seed=range(0,9)").code == 0
    arrays = jobs.read_text().split()
    assert arrays == (["array=0-3%4", "array=0-3%4", "one"] if scontrol else ["array=0-8%9"])
    (folder,) = (path.parent for path in Path("multirun").glob("*/sweep.json"))
    assert len({job.slurm_id for job in Sweep(folder).jobs}) == 9


def test_what_a_full_queue_does_not_take_follows_when_there_is_room(command, monkeypatch, tmp_path: Path) -> None:
    tries, jobs = tmp_path / "tries", tmp_path / "jobs"
    refuses = "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1"
    # Two at once are too many at any time, and the third and fourth try find the queue full.
    sbatch = f"""
echo x >> {tries}; n=$(cat {tries} | wc -l)
if grep -q array= "$1" || [ $n = 3 ] || [ $n = 4 ]; then {refuses}; fi
echo x >> {jobs}; echo "Submitted batch job $n"
"""
    slurm(tmp_path, monkeypatch, sbatch=sbatch)
    monkeypatch.setattr("twoviews.sweeps.slurm.RETRY_SECONDS", 0.0)
    done = command("train", "-m", *SLURM)
    assert done.code == 0, done.err
    assert done.out.count("waiting with 1 job until the queue has room") == 1 and done.out.count("submitted 1 job") == 2
    (folder,) = (path.parent for path in Path("multirun").glob("*/sweep.json"))
    made = Sweep(folder).jobs
    assert all(job.slurm_id and not job.refused for job in made)
    assert len([*folder.glob("slurm/*/*_submitted.pkl")]) == 2, "what was taken keeps its files"


def test_a_slurm_job_runs_the_function_of_its_frozen_code(tmp_path: Path) -> None:
    """Which may have another name there than in the code that submits it, as in sweeps of version 0.1.0."""
    (tmp_path / "frozen.py").write_text("def run_point(folder, submitted):\n    return f'{folder} at {submitted}'\n")
    pickled = cloudpickle.dumps(NamedFunction("frozen:run_point"))
    code = f"""
import sys, cloudpickle
assert cloudpickle.loads({pickled!r})("here", 5.0) == "here at 5.0" and "twoviews" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, scontrol: str | None = "") -> None:
    """Commands of a cluster, of which only these two do anything."""
    place = folder / "bin"
    place.mkdir()
    scripts = {"srun": "", "squeue": "exit 1", "scancel": "", "sbatch": sbatch, "scontrol": scontrol}
    for name_, script in scripts.items():
        if script is not None:
            (place / name_).write_text(f"#!/bin/sh\n{script}\n")
            (place / name_).chmod(0o755)
    for name_ in ("cat", "env", "git", "grep", "wc"):
        (place / name_).symlink_to(shutil.which(name_) or "")
    monkeypatch.setenv("PATH", str(place))


def test_without_slurm_there_is_a_sentence(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(command("train", "-m", "seed=0,1", "tracking=files", "hydra/launcher=slurm"), "this machine has no SLURM")


def test_what_sbatch_refuses_is_said_once_and_kept(command, monkeypatch, tmp_path: Path, capfd) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    said = (
        "echo 'sbatch: error: invalid partition: x' >&2; echo 'sbatch: error: Batch job submission failed' >&2; exit 1"
    )
    for name_ in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        (place / name_).write_text(f"#!/bin/sh\n{said if name_ == 'sbatch' else ''}\n")
        (place / name_).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    done = command("train", "-m", "seed=0,1", "tracking=files", "hydra/launcher=slurm", "hydra.launcher.partition=x")
    refused(
        done, "sbatch refused: invalid partition: x; Batch job submission failed; with other values of hydra.launcher"
    )
    assert (done.out + done.err).count("invalid partition") == 1
    assert sweep_command(["status"]) == 1 and "2 FAILED" in capfd.readouterr().out
    assert sweep_command(["logs"]) == 1
    out = capfd.readouterr().out
    assert out.count("FAILED sbatch refused: invalid partition: x;") == out.count("it never began") == 2
    (folder,) = (path.parent for path in Path("multirun").glob("*/sweep.json"))
    sweep = Sweep(folder)
    sweep.mark({job.digest: submission("7_0", 9.0) for job in sweep.jobs})
    assert not any(job.refused for job in sweep.jobs), "until they are submitted"


def test_jobs_that_need_files_that_git_does_not_track_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    root, untracked = tmp_path / "checkout", ("conf/method/mine.yaml", "src/twoviews/methods/mine.py")
    for file in ("train.py", *untracked):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in ("init -q", "add train.py", "commit -qm first"):
        subprocess.run([*git, *words.split()], check=True)
    monkeypatch.setattr(code, "ROOT", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg = master("tracking=files", f"hydra.sweep.dir={tmp_path}", "sweep.name=s")
    target = "_target_: twoviews.methods.{}.Method\n"
    for content, choices, needed in (
        (target.format("mine"), {"method": "mine"}, untracked),
        (target.format("mine"), {"method": "moco"}, untracked[1:]),
        (target.format("moco"), {"method": "mine"}, untracked[:1]),
    ):
        with pytest.raises(BadInput, match=f"{' and '.join(needed)} .* `git add {' '.join(needed)}`"):
            SweepCommand(cfg, pytest.fail).add([JobSpec("a", {}, [], content, {"choices": choices})])
    assert not (tmp_path / "s" / "code").exists() and not Sweep(tmp_path / "s").jobs
    other = JobSpec("a", {}, [], target.format("moco"), {"choices": {"method": "moco"}})
    assert SweepCommand(cfg, pytest.fail).add([other])[1], "what no job needs is named and left out"
    assert f"without 2 files that git does not track: {', '.join(untracked)}" in capsys.readouterr().out
    subprocess.run([*git, "add", "."], check=True)
    needing = JobSpec("b", {}, [], target.format("mine"), {"choices": {"method": "mine"}})
    copy = Path(SweepCommand(cfg, pytest.fail).add([needing])[1][0].description["code"])
    assert all((copy / file).exists() for file in untracked)


def test_a_pool_that_an_earlier_version_recorded_is_used_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep, counts = Sweep(tmp_path / "s"), {"at_once": 1, "points_per_gpu": 1, "cores_per_point": 10**6}
    with sweep.update() as record:
        record["launcher"] = {"_target_": "twoviews.sweeps.machine.Pool", **counts}
    (job,) = sweep.add([JobSpec("a", {}, [], "seed: 0\n", {"code": str(tmp_path / "code")})])
    for what in (code.copy_digest(tmp_path / "code"), json.dumps(sweep.record["launcher"], sort_keys=True)):
        launched.remember(what)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match="cores_per_job=1000000"):
        retry(sweep, [job])


def test_a_plan_starts_nothing(command) -> None:
    done = command("train", "-m", *SMALL_MOCO, "seed=0,1", "sweep.plan=true")
    assert done.code == 0 and "2 jobs" in done.out and not list(Path("multirun").glob("*/*"))


def test_an_interrupted_sweep_is_completed_by_the_same_command_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = [str(ROOT / "train.py"), "-m", *SMALL_MOCO, "epochs=20", "protocol=[]"]
    launcher = start([*sweep, "seed=0,1"], tmp_path)
    wait_for(lambda: any("step" in one.read_text() for one in tmp_path.glob("multirun/*/*/metrics.jsonl")), 120)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) == 128 + signal.SIGTERM, (tmp_path / "stderr.txt").read_text()
    assert sweep_command(["status"]) == 1
    # With a later state of the code and one more value.
    again = start([*sweep, "seed=0,1,2", "hydra/launcher=pool"], tmp_path)
    assert again.wait(300) == 0, (tmp_path / "stdout.txt").read_text() + (tmp_path / "stderr.txt").read_text()
    assert sweep_command(["status"]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("multirun/*/sweep.json"))
    made = Sweep(folder).jobs
    assert [job.parameters for job in made] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert made[0].state.starts == 2 and made[1].state.starts == 1
    alone = start([str(ROOT / "train.py"), *SMALL_MOCO, "epochs=20", "protocol=[]", "hydra.run.dir=alone"], tmp_path)
    assert alone.wait(200) == 0
    assert_same_weights(made[0].folder, tmp_path / "alone")
    third = start([*sweep, "seed=0,1,2"], tmp_path)
    assert third.wait(120) == 0 and [job.state.starts for job in made] == [2, 1, 1]
    assert ": 3 jobs, 3 FINISHED\n" in (tmp_path / "stdout.txt").read_text()


def test_what_fails_while_it_runs_fails_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A queue that the batch does not divide is found by the parts, when the training begins.
    done = start([str(ROOT / "train.py"), "-m", *SMALL_MOCO, "epochs=1", "batch_size=64,512"], tmp_path)
    assert done.wait(120) == 1
    out = (tmp_path / "stdout.txt").read_text()
    assert ": 2 jobs, 1 FAILED, 1 FINISHED\n" in out and "FAILED batch_size=512" in out
    assert sweep_command(["logs"]) == 1


def test_submitting_imports_no_torch() -> None:
    code = """
import sys
import twoviews.sweep, twoviews.sweeps.launching, twoviews.sweeps.machine, twoviews.sweeps.slurm
assert not {"torch", "mlflow", "submitit"} & {*sys.modules}
"""
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
