"""Figures of matplotlib and sheets of images as files, at the width and resolution of a printed page."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twoviews.errors import counted, printable
from twoviews.files import open_atomic
from twoviews.protocols.units import PIXELS_KNN_TOP1, UNTRAINED_KNN_TOP1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

WIDTH = 7.0  # inches, of the text on a page; narrower figures keep the sizes of their letters
# Fonts are embedded as TrueType, as conferences and journals ask for; a $ in a name is no formula.
STYLE: Any = {
    **{"font.size": 8, "axes.titlesize": 8, "figure.titlesize": 9, "legend.fontsize": 7, "legend.frameon": False},
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "lines.markersize": 4, "lines.linewidth": 1.2},
    **{"pdf.fonttype": 42, "savefig.dpi": 200, "text.parse_math": False},
}
BASELINES = {  # name in metrics.jsonl: name, style of the line
    UNTRAINED_KNN_TOP1: ("untrained encoder", ":"),
    PIXELS_KNN_TOP1: ("raw pixels", "--"),
}
TRIAL_HEIGHT = 40.0  # inches; it has room for all that stands around the panels
MAX_SPAN = 5.0  # percent points between baselines; with more, a line at the mean would be of no run
_formats = ["png"]


def set_formats(format: Literal["png", "pdf"] | Sequence[Literal["png", "pdf"]] = "png") -> None:
    """Choose the files of every picture that this process draws from now on: the node `pictures` of the configuration.

    Args:
        format: png, pdf or both.
    """
    _formats[:] = [format] if isinstance(format, str) else dict.fromkeys(format)


def files_of(path: Path) -> list[Path]:
    """The files of a picture with the chosen formats, whatever the suffix of `path`."""
    return [path.with_suffix(f".{kind}") for kind in _formats]


def training_title(config: Mapping[str, Any], data: str, epoch: float | None) -> str:
    """What was trained, for pictures and tables, such as "MoCo on digits, 8 epochs".

    Args:
        config: of the run.
        data: name of its images.
        epoch: that the training came to; None: it is not known.
    """
    method, epochs = str(config["method"].get("_target_", "?")).rpartition(".")[2], config.get("epochs", 0)
    done = f"{epoch:.3g} of " if epoch is not None and epoch < epochs else ""
    return printable(f"{method} on {data}, {done}{counted(epochs, 'epoch', '')}")


@contextmanager
def drawing(
    path: Path,
    height: float,
    *,
    width: float = WIDTH,
    panels: tuple[int, int] = (1, 1),
    title: str = "",
    note: str = "",
    **options: Any,
) -> "Iterator[tuple[Figure, list[Axes]]]":
    """A figure and its panels to draw into; it is written when the block ends without an error.

    It does not depend on the settings and windows of pyplot, which have no part in it.

    Args:
        path: of the picture; its suffix is that of the chosen formats.
        height: of a panel, in inches. Titles, legend and names beside the axes make the figure as high as they need.
        width: of the figure, in inches.
        panels: rows and columns.
        title: above all panels.
        note: below the title; its parts have "; " between them.
        options: of `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, TRIAL_HEIGHT), layout="constrained")
        length = int(width * 13)
        # The lines of the note end between its parts.
        parts = note.replace(" ", "\N{NO-BREAK SPACE}").replace(";\N{NO-BREAK SPACE}", "; ")
        figure.suptitle("\n".join([*textwrap.wrap(printable(title), length), *textwrap.wrap(parts, length)]))
        axes = list(figure.subplots(*panels, squeeze=False, **options).flat)
        yield figure, axes
        figure.draw_without_rendering()
        more = height - axes[0].get_position(original=True).height * TRIAL_HEIGHT
        figure.set_figheight(TRIAL_HEIGHT + more * panels[0])
        save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the chosen formats; the same figure makes the same bytes."""
    for file in files_of(path):
        with open_atomic(file) as stream:
            metadata = {"CreationDate": None} if file.suffix == ".pdf" else None
            figure.savefig(stream, format=file.suffix[1:], metadata=metadata)


def save_sheet(sheet: "Image", path: Path) -> None:
    """Write a sheet of images in the chosen formats, as wide as a page."""
    for file in files_of(path):
        with open_atomic(file) as stream:
            sheet.save(stream, format=file.suffix[1:].upper(), resolution=sheet.width / WIDTH, quality=95)


def draw_baselines(axis: "Axes", values: Mapping[str, Sequence[float]]) -> None:
    """Draw the kNN accuracy of each of `BASELINES` as a line; one outside of the limits is in the legend only.

    Args:
        axis: a panel whose limits are set.
        values: of one run or more, in percent, by the names in metrics.jsonl. The line is at their mean; there is none if
            they differ by more than MAX_SPAN.
    """
    low, high = axis.get_ylim()
    for name, (label, style) in BASELINES.items():
        accuracies = values.get(name, ())
        if accuracies and max(accuracies) - min(accuracies) <= MAX_SPAN:
            value = sum(accuracies) / len(accuracies)
            side = " (lower)" if value < low else " (higher)" if value > high else ""
            look: Any = {"color": "grey", "linestyle": style, "label": f"{label}: {value:.1f}{side}"}
            axis.plot([], [], **look) if side else axis.axhline(value, **look)


def merged_legend(figure: "Figure", panels: "Sequence[Axes]") -> None:
    """Write one legend for all panels below them, in as many columns as the longest entry allows."""
    entries = {
        label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if entries:
        columns = int(figure.get_figwidth() * 16 / (max(map(len, entries)) + 7))
        columns = max(1, min(len(entries), columns))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
