"""The picture of docs/capture.md, facts of tensors; `python docs/capture.py` draws it."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.capture.blocks import current
from pycoherence.capture.facts import EXAMPLES, MIXED, PARAMETERS, Ids, Regular
from pycoherence.capture.propagation import ids_like
from pycoherence.plot import GREY, INK

# Apart for every kind of colour vision, and in brightness too.
OWNERS = ("#0072b2", "#e69f00", "#8fd0b8")
CONSTANT, PALE = "#bfbfbf", "#f4f4f4"
SIZE = 11.5

Step = tuple[str, Tensor, str]


def steps() -> list[tuple[str, tuple[int, ...], list[int | None], str, str]]:
    """Run a small model in a block, and look up the facts of each of its tensors."""
    linear, token = nn.Linear(2, 2), nn.Parameter(torch.randn(2))
    model = nn.ParameterList([token, *linear.parameters()])
    x, found = torch.randn(3, 2, 2), []

    def note(code: str, t: Tensor, what: str, shape: tuple[int, ...] | None = None) -> None:
        facts: Any = current().facts(t)
        ids: list[int | None] = [None] * t.numel()
        if facts.kind == EXAMPLES:
            ids = ids_like(t, facts.owner).flatten().tolist()
        says = "constant"
        if facts.kind == PARAMETERS:
            says, ids = "of parameters alone", [-2] * t.numel()
        elif isinstance(facts.owner, Regular):
            says = f"Regular(stride={facts.owner.stride}, count={facts.owner.count})"
        elif isinstance(facts.owner, Ids):
            says = f"Ids({facts.owner.ids.flatten().tolist()})"
        elif facts.kind == EXAMPLES:
            says = f"Lost, mixed by {facts.owner.function}"
        found.append((code, shape or tuple(t.shape), ids, says, what))

    with pc.collect(model, pc.SqNorms()):
        h = torch.nn.functional.linear(x, *linear.parameters())
        note("x", x, "from outside: the first dimension is the batch")
        note("h = F.linear(x, weight, bias)", h, "captured; says that the batch has 3 rows")
        copies = token.expand(3, 1, 2)
        note("copies = token.expand(3, 1, 2)", copies, "no example in it yet")
        z = torch.cat([copies, h], 1)
        note("z = torch.cat([copies, h], 1)", z, "each example gets its own copy of the token")
        s = z.transpose(0, 1)
        note("s = z.transpose(0, 1)", s, "time first: the same examples, elsewhere")
        r = s.flatten(0, 1)[[4, 0, 7, 2]]
        note("r = s.flatten(0, 1)[[4, 0, 7, 2]]", r, "routed: the same indices pick ids")
        mask = torch.tensor([[1.0, 0.0]])
        note("mask = torch.tensor([[1.0, 0.0]])", mask, "made in the block, for all examples")
        loss = (r * mask).square().mean()
        note("loss = (r * mask).square().mean()", loss, "no layer may follow")
    return found


def main() -> None:
    """Draw it beside this file."""
    rows = steps()
    figure = Figure(figsize=(10.4, 6.4))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, 104), ylim=(0, 64))
    axes.set_axis_off()
    legend(axes, 61.2)
    top = 57.0
    pitch = top / len(rows)
    for i, (code, shape, ids, says, what) in enumerate(rows):
        y = top - (i + 1) * pitch
        if i % 2 == 0:
            axes.add_patch(Rectangle((0, y), 104, pitch, color=PALE, linewidth=0))
        middle = y + pitch / 2
        text(axes, (1.5, middle + 1.1), code, family="monospace", fontsize=SIZE - 1.5)
        dims = f"[{', '.join(map(str, shape))}]" if shape else "[ ]  a number"
        text(axes, (1.5, middle - 1.5), dims, color=GREY, fontsize=SIZE - 1.5)
        strip(axes, (34, middle - 1.3), ids, shape)
        text(axes, (69, middle + 1.1), says, fontweight="bold", fontsize=SIZE - 1)
        text(axes, (69, middle - 1.5), what, color=GREY, fontsize=SIZE - 1.5)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


def strip(
    axes: Axes, at: tuple[float, float], ids: list[int | None], shape: tuple[int, ...]
) -> None:
    """The elements in flattened order, with gaps between indices of the first dimension."""
    x, y = at
    inner = len(ids) // shape[0] if len(shape) > 1 else len(ids)
    for i, one in enumerate(ids):
        square(axes, (x + 1.65 * i + 0.7 * (i // inner), y), one)


def square(axes: Axes, at: tuple[float, float], one: int | None) -> None:
    """An element, in the colour of its owner."""
    look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8}
    if one is None:
        look["facecolor"] = CONSTANT
    elif one == -2:
        look["facecolor"] = INK
    elif one == MIXED:
        look |= {"facecolor": "white", "edgecolor": INK, "hatch": "/////"}
    else:
        look["facecolor"] = OWNERS[one]
    axes.add_patch(Rectangle(at, 1.65, 2.6, **look))
    if one is not None and 0 <= one < MIXED:
        colour = "white" if one == 0 else INK
        place = (at[0] + 0.82, at[1] + 1.25)
        text(axes, place, str(one), ha="center", color=colour, fontsize=SIZE - 3)


def legend(axes: Axes, y: float) -> None:
    """The colours, in a line at the top."""
    names = (
        (0, "of example 0"),
        (1, "of example 1"),
        (2, "of example 2"),
        (-2, "of parameters"),
        (None, "constant"),
        (MIXED, "of several examples"),
    )
    for i, (one, name) in enumerate(names):
        x = 1.5 + 16.5 * i
        square(axes, (x, y - 1.3), one)
        text(axes, (x + 2.4, y), name)


def text(axes: Axes, at: tuple[float, float], words: str, **look: Any) -> None:
    """Write something."""
    axes.text(*at, words, **{"va": "center", "fontsize": SIZE - 1, "color": INK, **look})


if __name__ == "__main__":
    main()
