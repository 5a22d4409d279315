"""The picture of docs/kernels.md, four families of kernels; `python docs/kernels.py` draws it."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pycoherence.plot import GREY, INK

# Apart for every kind of colour vision, and in brightness too.
OF_X, OF_G, MADE = "#0072b2", "#e69f00", "#222222"
FAINT = 0.22
SIZE = 11


def main() -> None:
    """Draw it beside this file."""
    figure = Figure(figsize=(9, 10.8))
    grid = figure.add_gridspec(
        2, 2, left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.04, hspace=0.06
    )
    for i, draw in enumerate((tile_engine, products_of_grams, rows, order_statistics)):
        axes = figure.add_subplot(grid[divmod(i, 2)])
        axes.set(xlim=(0, 10), ylim=(0, 12), aspect="equal")
        axes.set_axis_off()
        draw(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


def tile_engine(axes: Axes) -> None:
    """Strips of both factors, the tile that they make, and what becomes of it."""
    head(axes, "E  Tile engine", "a tile of $G_b = g_b^\\top x_b$ at a time, in registers")
    block(axes, (3.6, 8.1), 5.4, 1.3, OF_X)
    block(axes, (1.6, 2.9), 1.3, 4.5, OF_G)
    axes.add_patch(Rectangle((3.6, 2.9), 5.4, 4.5, fill=False, edgecolor=GREY, linestyle="--"))
    block(axes, (5.4, 8.1), 1.5, 1.3, OF_X, alpha=1)
    block(axes, (1.6, 4.7), 1.3, 1.3, OF_G, alpha=1)
    block(axes, (5.4, 4.7), 1.5, 1.3, MADE, alpha=1)
    note(axes, (4.5, 8.75), "$x_b$")
    note(axes, (2.25, 6.7), "$g_b^\\top$")
    note(axes, (9.15, 8.75), "$T$", ha="left")
    note(axes, (2.25, 7.75), "$T$")
    note(axes, (1.3, 5.2), "$O$", ha="right")
    note(axes, (8.2, 7.75), "$I$")
    note(axes, (6.15, 5.35), "tile", color="white")
    note(axes, (8.8, 3.3), "never whole", ha="right", color=GREY)
    arrow(axes, (6.15, 4.55), (6.15, 2.35))
    note(axes, (5, 1.9), "at the end of each example: square it, multiply by $V$,")
    note(axes, (5, 1.25), "add to a weighted sum, a second moment, signs")
    foot(axes, "$B\\,T\\,I\\,O$ multiply-adds, as the weight gradient")


def products_of_grams(axes: Axes) -> None:
    """Two Grams of positions, whose product adds up to a norm."""
    head(axes, "H  Products of Grams", "norms and dot products without any $G_b$")
    for y, of, name, length, width in ((7.2, OF_X, "x", "I", 3.6), (3.5, OF_G, "g", "O", 2.7)):
        block(axes, (0.7, y), width, 2.1, of)
        note(axes, (0.7 + width / 2, y + 1.05), f"${name}_b$")
        note(axes, (0.45, y + 1.05), "$T$", ha="right")
        note(axes, (0.7 + width / 2, y - 0.4), f"${length}$")
        arrow(axes, (0.85 + width, y + 1.05), (5.15, y + 1.05))
        block(axes, (5.3, y), 2.1, 2.1, of)
        axes.add_patch(Rectangle((5.9, y + 0.9), 0.5, 0.5, color=of))
        note(axes, (6.35, y - 0.4), f"$\\langle {name}_{{bt}}, {name}_{{bs}} \\rangle$")
    note(axes, (6.35, 6.2), "$\\times$", fontsize=18)
    axes.plot([7.6, 7.9, 7.9, 7.6], [8.25, 8.25, 4.55, 4.55], color=INK, linewidth=1.2)
    arrow(axes, (7.9, 6.4), (8.5, 6.4), tail=0)
    note(axes, (9.2, 6.75), "$\\Sigma_{ts} =$")
    note(axes, (9.2, 6.0), "$\\|G_b\\|^2$")
    note(axes, (5, 1.9), "with one position, rows of all examples")
    note(axes, (5, 1.25), "in place of $T$: their Gram matrix")
    foot(axes, "$B\\,T^2(I+O)/2$: less, if positions are few")


def rows(axes: Axes) -> None:
    """A row of numbers for each example, reduced along either side."""
    head(axes, "R  Rows", "few numbers for each example: they are stored")
    for i in range(5):
        block(axes, (1.6, 4.3 + i), 4.8, 0.8, OF_G)
    axes.add_patch(Rectangle((1.6, 6.3), 4.8, 0.8, color=OF_G))
    axes.add_patch(Rectangle((3.3, 4.1), 0.9, 5.2, fill=False, edgecolor=INK, linewidth=1.8))
    note(axes, (1.3, 6.7), "$B$", ha="right")
    note(axes, (5.3, 9.55), "$C$")
    arrow(axes, (6.5, 6.7), (7.1, 6.7))
    note(axes, (7.25, 7.0), "norm and", ha="left")
    note(axes, (7.25, 6.4), "dot product", ha="left")
    arrow(axes, (3.75, 4.0), (3.75, 3.3))
    note(axes, (3.75, 2.9), "sums over examples")
    note(axes, (5, 1.9), "biases, scales and shifts of normalisation;")
    note(axes, (5, 1.25), "norms of one position, $\\|x_b\\|^2\\,\\|g_b\\|^2$")
    foot(axes, "one read of $g$ and $x$")


def order_statistics(axes: Axes) -> None:
    """The values of one coordinate, multiplied out and put in order."""
    head(axes, "O  Order statistics", "the $B$ values of a coordinate meet in one thread")
    for y, of, name, length, width, at in (
        (7.2, OF_X, "x", "I", 3.0, 2.3),
        (3.5, OF_G, "g", "O", 2.3, 1.5),
    ):
        block(axes, (0.7, y), width, 2.1, of)
        axes.add_patch(Rectangle((at, y), 0.35, 2.1, color=of))
        note(axes, (0.45, y + 1.05), "$B$", ha="right")
        note(axes, (0.7 + width / 2, y - 0.4), f"${length}$")
        note(axes, (0.7 + width / 2, y + 2.4), f"${name}$")
        arrow(axes, (at + 0.35, y + 1.05), (5.05, 6.4 + (y - 5.35) / 3))
    values = (5, 2, 7, 0, 3, 6, 1, 4)
    for x, ranks in ((5.2, values), (7.2, sorted(values))):
        for i, rank in enumerate(ranks):
            at, shade = (x, 8.4 - 0.6 * i), str(0.1 + 0.12 * rank)
            axes.add_patch(Rectangle(at, 0.6, 0.6, facecolor=shade, edgecolor=GREY))
    note(axes, (5.5, 9.4), "$g_{bo}\\,x_{bi}$")
    arrow(axes, (5.9, 6.6), (7.1, 6.6))
    for y, height, what in (
        (7.85, 1.1, "clipped"),
        (5.45, 2.3, "added up"),
        (4.25, 1.1, "clipped"),
    ):
        axes.plot([7.9, 8.1, 8.1, 7.9], [y, y, y + height, y + height], color=INK, linewidth=1.2)
        note(axes, (8.2, y + height / 2), what, ha="left", fontsize=9)
    note(axes, (5, 1.9), "few are clipped: the ends stay in registers, in one pass;")
    note(axes, (5, 1.25), "medians and others: a sorting network, or a search")
    foot(axes, "$4\\,(k+1)$ minima and maxima for each value")


def head(axes: Axes, title: str, text: str) -> None:
    """Name of a family, and what it does."""
    note(axes, (0.1, 11.5), title, ha="left", fontsize=15, fontweight="bold")
    note(axes, (0.1, 10.7), text, ha="left", color=GREY)


def foot(axes: Axes, text: str) -> None:
    """The cost of a family."""
    note(axes, (5, 0.35), text, fontweight="bold")


def block(
    axes: Axes, at: tuple[float, float], width: float, height: float, of: str, alpha: float = FAINT
) -> None:
    """A matrix or a part of one."""
    axes.add_patch(Rectangle(at, width, height, facecolor=of, alpha=alpha, edgecolor="none"))
    axes.add_patch(Rectangle(at, width, height, fill=False, edgecolor=of))


def note(axes: Axes, at: tuple[float, float], text: str, **style: Any) -> None:
    """Words, in the middle of a place if nothing else is said."""
    style = {"ha": "center", "va": "center", "fontsize": SIZE, "color": INK} | style
    axes.text(*at, text, **style)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], tail: float = 2
) -> None:
    """From what is read to what is made."""
    style = {"arrowstyle": "-|>", "color": INK, "shrinkA": tail, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main()
