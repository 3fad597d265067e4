"""Credentials in tracking.uri are refused and appear nowhere: not in messages, not in files."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_MOCO, refused

from twoviews.errors import BadInput, without_secrets
from twoviews.tracking import uris
from twoviews.tracking.__main__ import main as tracking_command

SECRET = "s3cretZ"
URIS = [
    f"http://me:{SECRET}@127.0.0.1:9",
    f"http://{SECRET}@127.0.0.1:9",
    f"https://me:{SECRET}@127.0.0.1:999999",
    f"http://127.0.0.1:9/?password={SECRET}",
    f"http://127.0.0.1:9#{SECRET}",
    f"http://me:{SECRET}",
    f"http://me:/{SECRET}@h/",
    f"http://me:a/{SECRET}@h",
    f"http://me:a@b@{SECRET}@h",
    f"http://me:a {SECRET}@h",
    f"http://[::1:{SECRET}@h",
    f"http:/me:{SECRET}@h:9",
    f"me:{SECRET}@h:9",
    f"ftp://me:{SECRET}@h",
    f"mysql+evil://me:{SECRET}@h/db",
    f"file://me:{SECRET}@h/mlruns",
    f"postgresql://me:{SECRET}@127.0.0.1:1/db",
    f"postgresql://127.0.0.1:1/db?user=me&password={SECRET}",
    f"postgresql+psycopg://127.0.0.1:1/db?user=me&sslpassword={SECRET}",
    f"postgresql://127.0.0.1:1/db?options=-c%20password={SECRET}",
    f"mssql://h/db?odbc_connect=PWD={SECRET}",
    f"sqlite://me:{SECRET}@h/mlflow.db",
    f"sqlite:///mlflow.db?key={SECRET}",
]


def nowhere(folder: Path, *texts: str) -> None:
    """The secret is in none of the texts and in no file, and in no file's name."""
    assert not [text for text in texts if SECRET in text]
    for path in folder.rglob("*"):
        assert SECRET not in path.name and not (path.is_file() and SECRET.encode() in path.read_bytes()), path


@pytest.mark.parametrize("uri", URIS, ids=map(str, range(len(URIS))))  # names of folders are made of these
def test_train(command, tmp_path: Path, uri: str) -> None:
    for arguments in (
        [f'tracking.uri="{uri}"'],
        [f'tracking.uri="{uri}"', "tracking=files"],
        ["-m", f'tracking.uri="{uri}"', "seed=0,1"],
    ):
        finished = command("train", *SMALL_MOCO, *arguments)
        refused(finished)
        nowhere(tmp_path, finished.out, finished.err)


def test_the_message_names_the_variables(command) -> None:
    finished = command("train", *SMALL_MOCO, 'tracking.uri="postgresql://h/db?user=me&password=x"')
    refused(finished, "postgresql://h/db may hold", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")


@pytest.mark.parametrize(
    "arguments",
    [
        [f"tracking.uri=http://me:{SECRET},x@h"],  # several values
        [f"tracking.uri=http://me:{SECRET}{{@h"],  # no value
        [f"tracking.uri=[http://me:{SECRET}@h]"],
        [f"+tracking.url=http://me:{SECRET}@h"],
        [f"tracking=http://me:{SECRET}@h"],
        ["tracking.experiment=x", f"tracking.ur1=http://me:{SECRET}@h"],
    ],
)
def test_commands_that_are_wrong_elsewhere(command, tmp_path: Path, arguments: list[str]) -> None:
    finished = command("train", *SMALL_MOCO, *arguments)
    refused(finished)
    nowhere(tmp_path, finished.out, finished.err)


@pytest.mark.parametrize("uri", URIS, ids=map(str, range(len(URIS))))  # names of folders are made of these
def test_sync(tmp_path: Path, capsys, uri: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "time": 1, "a": 1}\n')
    assert tracking_command(["sync", str(tmp_path), "--uri", uri]) == 2
    nowhere(tmp_path, *capsys.readouterr())
    (tmp_path / "tracking.json").write_text(json.dumps({"uri": uri}))
    assert tracking_command(["sync", str(tmp_path)]) == 2
    nowhere(tmp_path / "nothing", *capsys.readouterr())


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://h/mlflow",
        "http://[::1]:5000",
        "postgresql+psycopg://me@h:5432/db?sslmode=require",
        "mysql://h/db?charset=utf8mb4",
        "sqlite:////tmp/me@h/a:b.db",
    ],
)
def test_addresses_without_credentials_stay(uri: str) -> None:
    assert uris.resolve(uri) == uri


def test_messages() -> None:
    assert (
        without_secrets("no MLflow answers at http://127.0.0.1:9/health (x)")
        == "no MLflow answers at http://127.0.0.1:9/health (x)"
    )
    assert (
        str(BadInput(f"http://me:{SECRET}@h, and https://h/?a={SECRET} there")) == "http://…@h, and https://h/?… there"
    )
