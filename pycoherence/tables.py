"""Results as short tables for people, and as plain data for files."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

ROWS = 16
"""How many rows of a section are printed."""

WIDTH = 48
"""How many characters of a name are printed: its last ones, which tell parameters apart."""


class Printed:
    """A result whose `str` is a table, which notebooks show too."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def table(
    title: str,
    columns: Sequence[str],
    sections: Mapping[str, Mapping[str, T]],
    cells: Callable[[T], Sequence[Any]],
) -> str:
    """Aligned columns of text.

    Args:
        title: The first line.
        columns: The name of each column.
        sections: The rows by heading and by name; a section without a heading is not indented.
        cells: The numbers of a row; made only of those that are printed.
    """
    lines: list[tuple[str, Sequence[str]]] = [("", columns)]
    for heading, rows in sections.items():
        indent = "  " if heading else ""
        if heading and rows:
            lines.append((heading, ()))
        printed = ROWS if len(rows) <= ROWS else ROWS - 1  # one line for one row saves nothing
        for name in list(rows)[:printed]:
            short = name if len(name) <= WIDTH else "..." + name[3 - WIDTH :]
            lines.append((indent + short, [_cell(value) for value in cells(rows[name])]))
        if len(rows) > printed:
            lines.append((f"{indent}... {len(rows) - printed} more", ()))
    first = max(len(name) for name, _ in lines)
    widths = [max(len(values[i]) for _, values in lines if values) for i in range(len(columns))]
    text = [
        "  ".join([name.ljust(first), *(v.rjust(w) for v, w in zip(values, widths, strict=False))])
        for name, values in lines
    ]
    return "\n".join([title, *(line.rstrip() for line in text)])


def plain(value: Any) -> Any:
    """A value as numbers, lists and dicts, of which `json` knows."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
