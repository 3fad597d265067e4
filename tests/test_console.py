"""What is printed is what was said, whatever names there are in it."""

import re
import time

from twoviews import console as console_module
from twoviews.console import Console, progress_of

NAMES = ["cat [juv]", "[red]", "[/b]", ":smile:", "photos/[/b]/x.png", "\\[b]"]


def test_names_with_brackets_are_no_markup(capfd) -> None:
    console = Console()
    console.rows("title [/b]", [{"[name]": name, "value": 1.0} for name in NAMES])
    console.table("title [/b]", {name: name for name in NAMES})
    for name in NAMES:
        console.say(name)
    out = capfd.readouterr().out
    assert all(out.count(name) >= 4 for name in NAMES) and out.count("title [/b]") == 2 and "[name]" in out


def test_names_that_are_no_utf8_are_spelt_out(capfd) -> None:
    console, name = Console(), b"\xfcber".decode(errors="surrogateescape")
    console.say(name)
    console.rows(name, [{"name": name}])
    console.table(name, {name: name})
    assert capfd.readouterr().out.count("\\udcfcber") == 6


def test_plain_lines_say_what_is_left(capfd, monkeypatch) -> None:
    monkeypatch.setattr(console_module, "FORECAST_SECONDS", 0)
    monkeypatch.setattr(console_module, "PLAIN_SECONDS", 0)
    with progress_of("features", 4, "images") as advance:
        advance(1)
        advance(3)
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("features: 1 of 4 images  ") and first.endswith(" left")
    assert last == "features: 4 of 4 images"
    console = Console()
    console.start(200, 0)
    console.progress(20, 1.0, {"loss": "0.5"}, left=200)
    console.progress(40, 2.0, {"loss": "0.5"}, left=100)
    console.stop()
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["3 min 20 s left", "1 min 40 s left"]


def test_short_work_prints_no_line_unless_it_is_to(capfd) -> None:
    for at_end in (False, True):
        with progress_of("features", 4, "images", at_end=at_end) as advance:
            advance(4)
        assert capfd.readouterr().err == "features: 4 of 4 images\n" * at_end


def test_bars_of_a_terminal_share_it(capfd, monkeypatch) -> None:
    """A bar inside another one is shown below it, and what is said meanwhile is not lost."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(console_module, "HIDDEN_SECONDS", 0)
    console = Console()
    console.start(10, 0)
    console.progress(5, 1.0, {"loss": "0.5"}, left=30)
    with progress_of("features [x]", 4, "images") as advance:
        advance(1)
        time.sleep(0.3)  # a bar is drawn ten times a second
        console.say("a note")
    with progress_of("protocol map"):
        time.sleep(0.3)
    console.stop()
    out = "".join(capfd.readouterr())
    together = re.search(r"epoch 1\.00  step 5  loss 0\.5.*50%.*30 s left.*\n.*features \[x\]: 1 of 4 images.*25%", out)
    assert together and "a note" in out and "protocol map" in out
    with progress_of("again", 1):  # the display has ended, and begins anew
        time.sleep(0.3)
    assert "again" in "".join(capfd.readouterr())
