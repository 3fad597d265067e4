"""What is printed is what was said, whatever names there are in it."""

from twoviews.console import Console

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
