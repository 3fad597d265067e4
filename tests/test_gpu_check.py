"""benchmarks/gpu_check.py on a CPU: limits of time, the JSON after each part, and parts that fail, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import GRACE_S, Here, Part, Skipped  # noqa: E402


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def part(name: str, *programs: str, needs: float = 0, limit: float | None = 30, **more: Any) -> Part:
    return Part(name, needs, limit, lambda here, seconds: [python(program) for program in programs], **more)


@pytest.fixture
def checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[bool, dict[str, Any], list[str]]]:
    """Whether the parts ran, what the JSON says of them, and the lines that were printed."""

    def call(*parts: Part, seconds: float = 60) -> tuple[bool, dict[str, Any], list[str]]:
        fine = gpu_check.check(parts, Here("cpu", None, tmp_path), seconds + GRACE_S, tmp_path / "out")
        rows = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
        return fine, rows, capsys.readouterr().out.splitlines()

    return call


def test_parts_that_fail_do_not_keep_the_next_from_their_turn(checked, tmp_path: Path) -> None:
    numbers = f"import pathlib; pathlib.Path({str(tmp_path / 'numbers.json')!r}).write_text('{{\"x\": 7}}')"
    fine, rows, lines = checked(
        part("good", "print('said')", numbers, figure=lambda here, ended: f"x is {ended.numbers['x']}"),
        part("bad", "print('why'); raise SystemExit(3)", "print('never')"),
        part("empty", "print('last words')", figure=lambda here, ended: ended.numbers["x"]),
        part("after", "print('one'); print('two')"),
    )
    assert not fine
    found = {name: (row["state"], row["figure"], len(row["commands"])) for name, row in rows.items()}
    assert found == {
        "good": ("ok", "x is 7", 2),
        "bad": ("failed", "why", 1),
        "empty": ("failed", "KeyError: 'x'", 1),  # the numbers of an earlier part are not its
        "after": ("ok", "two", 1),
    }
    assert rows["good"]["numbers"] == {"x": 7}
    assert [line.split()[:2] for line in lines] == [[name, state] for name, (state, *_) in found.items()]
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert "said" in log and "never\n" not in log.replace("print('never')", "")


def test_a_part_is_stopped_at_its_limit_with_what_it_started(checked, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    grandchild = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    program = f"""
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {grandchild!r}])
signal.signal(signal.SIGTERM, lambda *_: (print("what it has", flush=True), sys.exit()))
time.sleep(60)
"""
    start = time.monotonic()
    fine, rows, _ = checked(part("long", program, limit=2), part("next", "print('there')"))
    assert not fine and time.monotonic() - start < 10
    assert (rows["long"]["state"], rows["long"]["figure"]) == ("timed out", "what it has")
    assert rows["next"]["state"] == "ok"
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


def test_parts_without_enough_time_are_skipped(checked) -> None:
    def nothing(here: Here, seconds: float) -> list[list[str]]:
        raise Skipped("there is no such file")

    fine, rows, lines = checked(
        part("large", "print(1)", needs=100),
        part("small", "print(1)", needs=5),
        Part("none", 0, 9, nothing),
        seconds=20,
    )
    assert fine and [row["state"] for row in rows.values()] == ["skipped", "ok", "skipped"]
    assert "20 s are left, and it needs 100" in lines[0] and "there is no such file" in lines[2]


def test_a_gpu_has_to_take_the_fast_paths(tmp_path: Path) -> None:
    """As the lines at the start of a training say; a captured step may turn out to be impossible after them."""
    lines = "views     2 of each image: 24x24 px\nviews     compiled\nnorms     fused\nstep      CUDA graph\n"
    found = gpu_check._paths(Here("cuda", tmp_path, tmp_path), gpu_check.Ended(lines, {}, []))
    assert found == "views compiled, norms fused, step CUDA graph"
    for wrong in ("step      eager (no CUDA graph: out of memory)", "norms     plain"):
        with pytest.raises(RuntimeError, match=wrong.split()[1]):
            gpu_check._paths(Here("cuda", tmp_path, tmp_path), gpu_check.Ended(lines + wrong, {}, []))


def test_a_part_without_a_limit_leaves_what_later_ones_need() -> None:
    first, later = part("first", needs=10, limit=None), [part("a", needs=20), part("ladder", needs=50)]
    assert gpu_check.allowed(first, later, 100) == 80  # the last part gets what is left
    assert gpu_check.allowed(first, later, 25) == 10
    assert gpu_check.allowed(part("a", needs=20, limit=60), [], 100) == 60
    with pytest.raises(Skipped):
        gpu_check.allowed(first, later, 9)


def test_what_was_measured_is_kept_when_it_is_interrupted(tmp_path: Path) -> None:
    program = """
import signal, sys
from pathlib import Path
from gpu_check import Here, Part, check
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
def of(program): return lambda here, seconds: [[sys.executable, "-c", program]]
parts = [Part("first", 0, 9, of("print('kept')")), Part("second", 0, 60, of("import time; time.sleep(60)"))]
check(parts, Here("cpu", None, Path(".")), 100, Path("out"))
"""
    here = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    child = subprocess.Popen(python(program), cwd=tmp_path, env=here, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline().startswith("first")
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]["first"]["figure"] == "kept"


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    """With the quickest of its real parts, without git."""
    chosen = ["--device", "cpu", "--out", str(tmp_path), "--parts", "steps", "kmeans", "ladder"]
    here = {**os.environ, "COMMIT": "0123abc", "GIT_DIR": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *chosen]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["steps", "ok"],
        ["kmeans", "skipped"],
        ["ladder", "skipped"],
    ]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["commit"] == "0123abc" and report["torch"] and report["date"] and "card" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.log"]


def test_a_gpu_needs_the_images(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    for more in ([], ["--data", str(tmp_path)]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 2 and "--data" in done.stderr and "Traceback" not in done.stderr
