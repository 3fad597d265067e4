"""Tables as text: comma-separated values, Markdown and LaTeX. A table is a list of rows, whose keys are the columns."""

import csv
import io
from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, object]]


def span(values: Sequence[float]) -> str:
    """Equal numbers as one with two digits, others as "41.94 to 46.11"."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def as_csv(rows: Rows) -> str:
    """The rows as comma-separated values, numbers in full; what a row does not have is an empty cell."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, [*columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Rows, numbers: Sequence[str] = ()) -> str:
    """A Markdown table of at least one row, all with the same keys; the columns named in `numbers` are aligned at the right."""
    lines = [[*rows[0]], *([str(cell) for cell in row.values()] for row in rows)]
    text = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    rule = "|" + "".join("---:|" if name in numbers else "---|" for name in rows[0])
    return "\n".join([text[0], rule, *text[1:]])


def as_latex(rows: Rows, numbers: Sequence[str] = ()) -> str:
    """A LaTeX table as `as_markdown` takes it, for the package booktabs, with all special characters escaped."""
    import pandas as pd

    form = "".join("r" if name in numbers else "l" for name in rows[0])
    text = pd.DataFrame(rows).astype(str).to_latex(index=False, escape=True, column_format=form)
    return "% needs \\usepackage{booktabs}\n" + text.replace("±", "$\\pm$")
