"""Every command on folders that mean harm: python tests/campaigns/foreign_folders.py [words of payloads].

A sweep with one finished run is made once. For each payload a copy of it is changed, and every command that takes a run or
a sweep is run on it. Counted is what a payload executed, wrote or read outside of the folder, or sent to a server of its own
(EXECUTED, OVERWRITTEN, LEAKED), what ended in a traceback, and what did not end. Exit code: 0 if all of these are 0, else 1.
"""

import contextlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, SMALL_MOCO
from test_foreign import BUILD, JSON, MADE, TEXTS, YAML, filled

SECRET = "s3cret-7f1e"  # in a file outside of the folder, and in the environment
TRAIN = (*SMALL_MOCO, "epochs=1", "protocol=knn")
PATIENCE_S = 300
HUGE = 2**40  # bytes; the file has a hole
CONFIG_KEYS = ("runtime.device", "data.train_images", "protocol.knn.k", "method", "tracking.uri")
ENCODER_KEYS = ("backbone", "backbone.width")
HEARD: list[str] = []  # by the server that payloads name

Payload = Callable[[Path, Path], object]  # of the sweep, and the folder beside it, which has "secret"


class Evil:
    """A pickle that makes a file."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.made}",)


def put(path: Path, key: str, value: object) -> None:
    """Change a value of a YAML or JSON file."""
    tree = yaml.safe_load(path.read_text())
    *nodes, last = key.split(".")
    inner = tree
    for node in nodes:
        inner = inner[node]
    inner[last] = value
    path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))


def linked(name: str, target: str) -> Payload:
    """A file of the run, or of the sweep, as a link to something outside."""

    def make(sweep: Path, outside: Path) -> None:
        path = sweep / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(outside / target)

    return make


def hole(name: str) -> Payload:
    """A file that is said to have a terabyte."""

    def make(sweep: Path, outside: Path) -> None:
        with (sweep / name).open("ab") as file:
            file.truncate(HUGE)

    return make


def stored(uri: str) -> Payload:
    """A store of theirs, wherever a folder can name one."""

    def make(sweep: Path, outside: Path) -> None:
        address = uri.replace("OUTSIDE", str(outside))
        put(sweep / "aa" / "config.yaml", "tracking.uri", address)
        put(sweep / "aa" / "config.yaml", "tracking.mirror", True)
        put(sweep / "aa" / "tracking.json", "uri", address)
        for key, value in (
            ("tracking", {"uri": address, "experiment": "x"}),
            ("parent", "0" * 32),
            ("parent_key", "x"),
        ):
            put(sweep / "sweep.json", key, value)

    return make


def pickled(name: str, archive: bool) -> Payload:
    """A pickle that would run a command, bare or in an archive such as torch writes."""

    def make(sweep: Path, outside: Path) -> None:
        content, path = pickle.dumps(Evil(Path(MADE).absolute())), sweep / name
        path.write_bytes(content)
        if archive:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/data.pkl", content)
                file.writestr("archive/version", "3\n")

    return make


def bomb(sweep: Path, outside: Path) -> None:
    """A checkpoint of some megabytes that becomes four gigabytes."""
    with (
        zipfile.ZipFile(sweep / "aa" / "last.pt", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data.pkl", "w", force_zip64=True) as inner,
    ):
        for _ in range(2**8):
            inner.write(bytes(2**24))


def payloads(port: int) -> Iterator[tuple[str, Payload]]:
    """Names and what they do to a sweep."""
    for number, payload in enumerate([*BUILD, *TEXTS]):
        name = str(payload.get("_target_", "_partial_")) if isinstance(payload, dict) else str(payload)[:30]
        for file, keys in (("config.yaml", CONFIG_KEYS), ("encoder.json", ENCODER_KEYS)):
            key = keys[number % len(keys)]
            yield (
                f"{file} {key} {name}",
                lambda sweep, _, file=file, key=key, payload=payload: put(sweep / "aa" / file, key, filled(payload)),
            )
    for kind, text in YAML.items():
        content = text.replace(MADE, str(Path(MADE).absolute()))
        yield f"yaml {kind}", lambda sweep, _, text=content: (sweep / "aa" / "config.yaml").write_text(text)
    for kind, text in JSON.items():
        for name in ("aa/result.json", "aa/encoder.json", "aa/tracking.json", "aa/point.json", "sweep.json"):
            yield f"json {kind} {name}", lambda sweep, _, name=name, text=text: (sweep / name).write_text(text)
    for name in ("config.yaml", "result.json", "evaluation", ".writer.lock", "metrics.jsonl", "a.png", "last.pt"):
        yield f"link {name}", linked(f"aa/{name}", "secret")
    yield "link of a point", linked("aa", "")
    yield "link report.md", linked("report.md", "secret")
    for name in (
        "aa/config.yaml",
        "aa/result.json",
        "aa/metrics.jsonl",
        "aa/encoder.safetensors",
        "aa/last.pt",
        "sweep.json",
    ):
        yield f"huge {name}", hole(name)
    yield "huge bomb", bomb
    for name in ("aa/last.pt", "aa/encoder.safetensors", "aa/weights.pt", "aa/clusters_5.npz", "aa/config.yaml"):
        yield f"pickle {name}", pickled(name, archive=False)
        yield f"pickle in an archive {name}", pickled(name, archive=True)
    yield "store http", stored(f"http://127.0.0.1:{port}")
    yield "store sqlite", stored("sqlite:///OUTSIDE/made.db")
    yield "point ../x", lambda sweep, _: put(sweep / "sweep.json", "points", {"../../x": {"axes": {}}})
    yield "job --user", lambda sweep, _: put(sweep / "sweep.json", "points.aa.job", "--user=everybody")


def commands(sweep: Path) -> list[list[str]]:
    """All that take a run or a sweep."""
    run = sweep / "aa"
    return [
        ["evaluate", f"run={run}", "protocol=knn"],
        ["evaluate", f"run={run}", "protocol=health", "feature=projection"],
        ["evaluate", f"run={run / 'encoder.safetensors'}", "data=folder", f"data.root={sweep}", "protocol=embed"],
        ["evaluate", f"run={run / 'weights.pt'}", "protocol=knn"],
        ["evaluate", f"run={'0' * 32}", "protocol=knn"],
        ["cluster", f"run={run}", "clusters=[5]"],
        ["train", *TRAIN, f"hydra.run.dir={run}"],
        ["train", *TRAIN, f"hydra.run.dir={run}", "seed=7"],
        ["train", f"--config-path={run}", "--config-name=config", f"hydra.run.dir={run}", "hydra.output_subdir=null"],
        ["tracking", "sync", str(run)],
        *(["sweep", one, str(sweep)] for one in ("status", "logs", "retry", "report", "collect", "cancel")),
    ]


def made(place: Path) -> Path:
    """A sweep whose only point is a finished run."""
    from twoviews.run import load_checkpoint
    from twoviews.sweeps.folder import Sweep
    from twoviews.sweeps.job import JobSpec, JobState

    sweep = Sweep(place / "clean")
    (sweep.folder / "code").mkdir()
    more = {"cwd": str(place), "code": str(sweep.folder / "code"), "choices": {}}
    sweep.add([JobSpec("aa", {"seed": 0}, ["seed=0"], "seed: 0", more)])
    run = sweep.folder / "aa"
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, f"hydra.run.dir={run}"]
    subprocess.run(command, check=True, cwd=place, stdout=subprocess.DEVNULL)
    import torch

    torch.save(load_checkpoint(run / "last.pt")["method"], run / "weights.pt")
    sweep.jobs[0].write(JobState("FINISHED", starts=1))
    with sweep.update() as record:
        record["launcher"] = {"_target_": "twoviews.sweeps.machine.Local"}
    return sweep.folder


def run_command(name: str, *arguments: str) -> tuple[int | None, str]:
    """Exit code and all output of a command in this process; None where it raised, with its traceback."""
    import importlib

    from hydra.core.global_hydra import GlobalHydra

    out = io.StringIO()
    GlobalHydra.instance().clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            if name in ("sweep", "tracking"):
                module = importlib.import_module(f"twoviews.{'sweep' if name == 'sweep' else 'tracking.__main__'}")
                return module.main(list(arguments)), out.getvalue()
            sys.argv = [f"{name}.py", *arguments]
            importlib.import_module(name).main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue()
        except TimeoutError:
            raise
        except BaseException:
            return None, out.getvalue() + traceback.format_exc()
    return 0, out.getvalue()


class Listener(http.server.BaseHTTPRequestHandler):
    """Takes whatever it is told."""

    def _hear(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        HEARD.append(f"{self.path} {self.headers} {body}")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PATCH = do_PUT = _hear  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


def judge(name: str, payload: Payload, clean: Path, place: Path) -> Iterator[tuple[str, str, str]]:
    """What each command did with a payload: a word of the table, the command and what it printed."""
    for command in commands(sweep := place / "work" / "s"):
        shutil.rmtree(place / "work", ignore_errors=True)
        shutil.rmtree(outside := place / "outside", ignore_errors=True)
        outside.mkdir()
        (outside / "secret").write_text(SECRET)
        sweep.parent.mkdir()
        os.chdir(sweep.parent)
        Path(MADE).unlink(missing_ok=True)
        shutil.copytree(clean, sweep)
        payload(sweep, outside)
        HEARD.clear()
        if (sweep / "aa").is_symlink() and command[0] != "sweep":  # a folder that is named may be a link
            continue
        signal.alarm(PATIENCE_S)
        try:
            code, said = run_command(*command)
        except TimeoutError:
            code, said = None, "did not end"
        signal.alarm(0)
        shown = " ".join(command).replace(str(sweep), "S")
        if Path(MADE).exists():
            yield "EXECUTED", shown, said
        if (outside / "secret").read_text() != SECRET or [one.name for one in outside.iterdir()] != ["secret"]:
            yield "OVERWRITTEN", shown, said
        copies = [
            one for one in sweep.rglob("*") if one.is_file() and not one.is_symlink() and one.stat().st_size < 2**20
        ]
        if HEARD or SECRET in said or any(SECRET.encode() in one.read_bytes() for one in copies):
            yield "LEAKED", shown, said + "".join(HEARD)
        if said == "did not end":
            yield "HUNG", shown, said
        elif code is None or "Traceback" in said:
            yield "TRACEBACK", shown, said
        else:
            yield {0: "did it", 2: "refused"}.get(code, "failed"), shown, said


def expired(*_: Any) -> None:
    """Of the alarm."""
    raise TimeoutError


def main(words: list[str]) -> int:
    """The exit code."""
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGALRM, expired)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="foreign-") as name:
        place = Path(name)
        os.environ |= {"XDG_CACHE_HOME": str(place / "caches"), "MLFLOW_TRACKING_TOKEN": SECRET, "MY_SECRET": SECRET}
        (place / "work").mkdir()
        os.chdir(place / "work")
        clean, counts, begin, number = made(place), Counter(), time.monotonic(), 0
        for payload, change in payloads(server.server_port):
            if words and not any(word in payload for word in words):
                continue
            number, started = number + 1, time.monotonic()
            for verdict, command, said in judge(payload, change, clean, place):
                counts[verdict] += 1
                if verdict.isupper():
                    print(f"{verdict}: {payload}: {command}\n{said[-2000:]}", flush=True)
            print(f"{payload}: {time.monotonic() - started:.0f} s", flush=True)
        os.chdir("/")
    print(f"{number} payloads, {counts.total()} commands, {time.monotonic() - begin:.0f} s")
    for verdict in ("did it", "refused", "failed", "EXECUTED", "OVERWRITTEN", "LEAKED", "TRACEBACK", "HUNG"):
        print(f"{verdict:12} {counts[verdict]}")
    return int(any(verdict.isupper() for verdict in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
