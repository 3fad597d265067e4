"""The record of an evaluation: numbers of each protocol, also where an earlier evaluation with the same settings was whole."""

import json
from pathlib import Path

import pytest
from conftest import ROOT  # noqa: F401

from twoviews.console import Console
from twoviews.data.sources import digits
from twoviews.encoders.loaded import LoadedEncoder, Preprocessing
from twoviews.errors import BadInput
from twoviews.evaluation.record import EvaluationRecord
from twoviews.features import PixelEncoder
from twoviews.files import shortened


def test_folders_below_the_working_directory_have_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortened(tmp_path / "outputs" / "a") == shortened(Path("outputs/a")) == Path("outputs/a")
    assert shortened(tmp_path.parent / "b") == tmp_path.parent / "b"


def test_values_of_protocols_that_are_left_stay_as_they_were(tmp_path: Path, capfd) -> None:
    data = digits()
    encoder = PixelEncoder(data.channels, data.size)
    loaded = LoadedEncoder(encoder, Preprocessing.of_images(data), "pixels", tmp_path)
    folder = tmp_path / "evaluation" / "knn+finetune"
    folder.mkdir(parents=True)

    def stored(record: EvaluationRecord, name: str, value: float, left: list[str]) -> dict:
        record.add({f"{name}/top1": value}, {f"{name}/top1": (value - 1, value + 1)}, left)
        found = json.loads((folder / "evaluation.json").read_text())
        assert json.loads((tmp_path / "evaluation.json").read_text()) == found
        return found

    for knn, finetune in ((50.0, 60.0), (51.0, 61.0)):
        record = EvaluationRecord(loaded, folder, "", {"step": 3})
        found = stored(record, "knn", knn, ["finetune"])
        assert found["knn/top1"] == knn and found["step"] == 3
        if knn == 51.0:  # of the earlier one, which was whole
            assert found["finetune/top1"] == 60.0 and found["intervals"]["finetune/top1"] == [59.0, 61.0]
        else:
            assert "finetune/top1" not in found
        found = stored(record, "finetune", finetune, [])
        assert found["finetune/top1"] == finetune and found["intervals"]["knn/top1"] == [knn - 1, knn + 1]
    (folder / "export").mkdir()
    record.end({"protocol.knn.k": 20}, Console())
    written = f"written to {folder}: evaluation.json, export/; evaluation.json has all settings"
    assert capfd.readouterr().out == f"knn.k 20\n{written}\n"
    (folder / "evaluation.json").write_text('{"intervals": 3}')
    with pytest.raises(BadInput, match="evaluation.json cannot be read .* delete it, and evaluate.py"):
        EvaluationRecord(loaded, folder, "", {"step": 3})
    for knn, left in ((70.0, []), (71.0, ["finetune"])):  # of weights that are not known to be the same
        record = EvaluationRecord(loaded, folder, "", {"step": None})
        record.add({"finetune/top1": 61.0}, {}, []) if not left else None
        found = stored(record, "knn", knn, left)
    assert "finetune/top1" not in found
