"""Pictures of coherence and of gradient norms, drawn by matplotlib, which only this needs.

Each function returns a `matplotlib.figure.Figure`, shows nothing and leaves pyplot alone: call
`figure.savefig("coherence.png")`, or let a notebook show it. Given `axes`, it draws into these.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

from pycoherence.extras import PLOTS

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"pycoherence.plot needs {error.name}, which is not installed: {PLOTS}",
        name=error.name,
    ) from None

from pycoherence.record import Record
from pycoherence.scalars import quantile_ranks
from pycoherence.statistics import Coherence

__all__ = ["coherence", "norms"]

Number = Literal["m", "alpha", "unbiased_alpha", "noise_scale"]
T = TypeVar("T")

# Blue and vermilion differ for every kind of colour vision, and in brightness too.
BLUE, VERMILION = "#0072b2", "#d55e00"
INK, GREY, PALE = "#222222", "#666666", "#e2e2e2"

LINES = 10
"""Up to so many parts are lines over the steps; more are rows of a map."""

_ORTHOGONAL = "m = 1: orthogonal"

_WORDS = {
    "m": "m-coherence",
    "alpha": "coherence alpha",
    "unbiased_alpha": "unbiased alpha",
    "noise_scale": "noise scale",
}


def coherence(
    history: Any,
    *,
    parts: Sequence[str] | None = None,
    number: Number = "m",
    axes: Axes | None = None,
) -> Figure:
    """Draw the coherence of a network's parts: bars at one point, curves over steps.

    One `Coherence` gives a bar for each part, in the order of the model. A history gives a curve
    for the network and for each part, or for many parts a map with a row for each.

    Args:
        history: A `Coherence`; or several, as a sequence, a sequence of pairs of a step and a
            `Coherence`, or a dict from step to `Coherence`; or the `history` of a
            `GradientMonitor`, which has the network alone.
        parts: The modules and parameters to draw, by name; the modules that have parameters of
            their own if `None`.
        number: The number to draw, `"m"`, `"alpha"`, `"unbiased_alpha"` or `"noise_scale"`.
        axes: Axes to draw into; a figure is made if `None`.

    Returns:
        The figure.

    Raises:
        ValueError: The history is empty, `number` is unknown, or there is no such part.
        TypeError: `history` is nothing of the kind.

    Cost: A fraction of a second.

    Example:
        >>> import pycoherence as pc
        >>> c = pc.Coherence.of({"fc1.weight": (8.0, 4.0), "fc2.weight": (1.0, 1.0)}, n=4)
        >>> figure = pc.plot.coherence(c)
        >>> figure.axes[0].get_xlabel()
        'm-coherence'
    """
    if number not in get_args(Number):
        raise ValueError(f"expected number to be one of {get_args(Number)}, got {number!r}")
    if isinstance(history, Coherence):
        return _bars({"network": history, **_parts(history, parts)}, number, axes)
    steps, found, word = _over_steps(history, _coherence_of)
    each = [_numbers_of(at, parts, number) for at in found]
    names = dict.fromkeys(name for at in each for name in at)
    # A part that is not trained at some steps has no number there.
    values = {name: [at.get(name, math.nan) for at in each] for name in names}
    draw = _curves if len(values) <= LINES + 1 else _map
    return draw(steps, values, number, word, axes)


def norms(records: Any, *, axes: Axes | None = None) -> Figure:
    """Draw the norms of per-example gradients: a histogram, or quantiles over steps.

    Args:
        records: A `Record` with `SqNorms`; or several, as a sequence, a sequence of pairs of a step
            and a `Record`, or a dict from step to `Record`; or the `history` of a
            `GradientMonitor`.
        axes: Axes to draw into; a figure is made if `None`.

    Returns:
        The figure.

    Raises:
        ValueError: The history is empty, or holds no norm that is finite.
        TypeError: `records` is nothing of the kind.
        AttributeError: `SqNorms` was not asked for.

    Cost: A fraction of a second; it waits for the device.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1)
        >>> with pc.collect(model, pc.SqNorms()) as record:
        ...     model(torch.randn(100, 1)).square().mean().backward()
        >>> pc.plot.norms(record).axes[0].get_ylabel()
        'examples'
    """
    if isinstance(records, Record):
        return _histogram(records.sq_norms.double().sqrt().cpu().tolist(), axes)
    steps, found, word = _over_steps(records, _scalars_of)
    names = ("norm/max", "norm/q90", "norm/median")
    missing = [name for name in names if any(name not in at for at in found)]
    if missing:
        raise ValueError(f"expected a history with {', '.join(missing)}; measure pc.SqNorms()")
    axes = _axes(axes, (7, 3.6))
    most, high, middle = ([at[name] for at in found] for name in names)
    mark = "o" if len(steps) == 1 else ""
    axes.plot(steps, most, color=GREY, linewidth=1, marker=mark, label="largest")
    axes.plot(steps, high, color=BLUE, linewidth=1, marker=mark, label="9 of 10 are below")
    axes.plot(steps, middle, color=BLUE, linewidth=2.4, marker=mark, label="median")
    axes.fill_between(steps, middle, high, color=BLUE, alpha=0.15, linewidth=0)
    if _is_wide([*most, *high, *middle]):
        axes.set_yscale("log")
        _written_out(axes.yaxis)
    _steps(axes, steps, word)
    axes.set_ylabel("norm of an example's gradient", color=GREY)
    _legend(axes)
    return _figure(axes)


def bare(axes: Axes) -> None:
    """No ink without use."""
    axes.margins(x=0.01)
    axes.grid(color=PALE, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY)


def _parts(c: Coherence, names: Sequence[str] | None) -> dict[str, Coherence]:
    """The parts of a network that are drawn."""
    known = {**c.by_parameter, **c.by_module}
    if names is None:
        own = {name.rpartition(".")[0] for name in c.by_parameter}
        return {name: part for name, part in c.by_module.items() if name in own}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"expected parts to be names of modules or parameters such as "
            f"{', '.join(list(known)[:3])}, got {', '.join(missing)}"
        )
    return {name: known[name] for name in names}


def _over_steps(history: Any, check: Callable[[Any], T]) -> tuple[list[float], list[T], str]:
    """The steps of a history, what was found at each, and what the steps count."""
    if isinstance(history, Mapping):
        pairs = list(history.items())
    elif isinstance(history, Sequence) and not isinstance(history, str):
        pairs = [_with_step(i, at) for i, at in enumerate(history)]
    else:
        raise TypeError(
            "expected one result, a sequence of them or of (step, result), a dict from step to "
            f"result, or the history of a GradientMonitor, got {type(history).__name__}"
        )
    if not pairs:
        raise ValueError("expected a history of one or more steps, got an empty one")
    counted = isinstance(history, Mapping) or isinstance(history[0], (Mapping, tuple))
    steps, found = zip(*pairs, strict=True)
    return list(steps), [check(at) for at in found], "step" if counted else "measurement"


def _with_step(i: int, at: Any) -> tuple[float, Any]:
    if isinstance(at, tuple) and len(at) == 2:
        return at
    return (at["step"], at) if isinstance(at, Mapping) and "step" in at else (i, at)


def _coherence_of(at: Any) -> Coherence | Mapping[str, float]:
    if isinstance(at, Coherence) or (isinstance(at, Mapping) and "coherence/m" in at):
        return at
    got = f"a dict with {', '.join(at)}" if isinstance(at, Mapping) else type(at).__name__
    raise TypeError(
        f"expected a pc.Coherence, such as meter.compute() and record.coherence() give, got {got}"
    )


def _scalars_of(at: Any) -> Mapping[str, float]:
    if isinstance(at, Record):
        return at.scalars()
    if isinstance(at, Mapping):
        return at
    raise TypeError(f"expected a pc.Record, or scalars of one, got {type(at).__name__}")


def _numbers_of(
    at: Coherence | Mapping[str, float], parts: Sequence[str] | None, number: Number
) -> dict[str, float]:
    """The number of the network and of its parts, at one step."""
    if isinstance(at, Coherence):
        every = {"network": at, **_parts(at, parts)}
        return {name: _number(part, number) for name, part in every.items()}
    if parts:
        raise ValueError("expected no parts, since a monitor's history has the network alone")
    name = number if number == "noise_scale" else f"coherence/{number}"
    if name not in at:
        raise ValueError(f"expected number to be one that a monitor logs, got {number!r}")
    return {"network": at[name]}


def _number(part: Coherence, number: Number) -> float:
    """A number of a part, NaN if it is not finite: a gap."""
    value = getattr(part, number)
    return value if math.isfinite(value) else math.nan


def _bars(parts: Mapping[str, Coherence], number: Number, axes: Axes | None) -> Figure:
    values = [_number(part, number) for part in parts.values()]
    axes = _axes(axes, (7, min(12, 1.1 + 0.26 * len(values))))
    colours = [INK, *[BLUE] * (len(values) - 1)]
    axes.barh(range(len(values)), values, color=colours, height=0.72)
    every = -(-len(values) // 40)  # labels of more lie on each other
    shown = range(0, len(values), every)
    axes.set_yticks(list(shown), [_short(list(parts)[i]) for i in shown])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    axes.margins(x=0.05)
    title = f"{_WORDS[number]} of {next(iter(parts.values())).n} examples"
    if number == "m":
        axes.axvline(1, color=VERMILION, linewidth=1.4, linestyle=(0, (4, 3)))
        title += ", 1 if orthogonal (dashed)"
    axes.set_xlabel(_WORDS[number], color=GREY)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    return _figure(axes)


def _curves(
    steps: Sequence[float],
    values: Mapping[str, Sequence[float]],
    number: Number,
    word: str,
    axes: Axes | None,
) -> Figure:
    axes = _axes(axes, (7, 3.6))
    names = list(values)[1:]
    mark = "o" if len(steps) == 1 else ""
    look: Any = {"color": INK, "linewidth": 2.6, "zorder": 3}  # above the parts
    axes.plot(steps, values["network"], marker=mark, label="network", **look)
    for i, name in enumerate(names):
        colour = colormaps["viridis"](0.9 * i / max(1, len(names) - 1))  # its end is too bright
        axes.plot(steps, values[name], color=colour, linewidth=1.5, marker=mark, label=_short(name))
    if number == "m":
        axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=_ORTHOGONAL)
        axes.set_ylim(bottom=0)
    positive = any(x > 0 for row in values.values() for x in row)
    if number == "noise_scale" and positive:  # a ratio, which is huge where the gradient vanishes
        axes.set_yscale("log", nonpositive="mask")
        _written_out(axes.yaxis)
    _steps(axes, steps, word)
    axes.set_ylabel(_WORDS[number], color=GREY)
    _legend(axes)
    return _figure(axes)


def _map(
    steps: Sequence[float],
    values: Mapping[str, Sequence[float]],
    number: Number,
    word: str,
    axes: Axes | None,
) -> Figure:
    names = list(values)
    axes = _axes(axes, (7, min(12, 1.4 + 0.22 * len(names))))
    every = [x for row in values.values() for x in row]
    norm = LogNorm() if _is_wide(every) else None
    edges = _edges(steps)
    drawn = axes.pcolormesh(
        edges,
        [i - 0.5 for i in range(len(names) + 1)],
        [list(values[name]) for name in names],
        cmap="cividis",
        norm=norm,
    )
    axes.grid(visible=False)
    apart = -(-len(names) // 40)
    shown = range(0, len(names), apart)
    axes.set_yticks(list(shown), [_short(names[i]) for i in shown])
    axes.set_ylim(len(names) - 0.5, -0.5)
    _steps(axes, steps, word)
    axes.set_xlim(edges[0], edges[-1])
    bar = _figure(axes).colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(_WORDS[number], color=GREY)
    bar.ax.tick_params(colors=GREY)
    if norm is not None:
        _written_out(bar.ax.yaxis)
    return _figure(axes)


def _histogram(values: Sequence[float], axes: Axes | None) -> Figure:
    finite = sorted(x for x in values if x < float("inf"))
    if not finite:
        raise ValueError(f"expected norms of one or more examples, got {len(values)}, none finite")
    axes = _axes(axes, (7, 3))
    low, high = finite[0], finite[-1]
    number = max(8, min(40, len(finite) // 4))
    bins: Any = number
    if low > 0 and high / low > 10:
        bins = [low * (high / low) ** (i / number) for i in range(number + 1)]
        bins[-1] = max(high, bins[-1])  # rounding would leave the largest out
        axes.set_xscale("log")
        _written_out(axes.xaxis)
    axes.hist(finite, bins=bins, color=BLUE, alpha=0.85)
    middle, high, _ = (finite[i] for i in quantile_ranks(len(finite)))
    axes.axvline(middle, color=VERMILION, linewidth=1.6)
    axes.axvline(high, color=VERMILION, linewidth=1.6, linestyle=(0, (4, 2)))
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("norm of an example's gradient", color=GREY)
    axes.set_ylabel("examples", color=GREY)
    title = f"{len(values)} examples, median {middle:.3g}, 9 of 10 below {high:.3g} (dashed)"
    if len(finite) < len(values):
        title += f", {len(values) - len(finite)} not finite"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    return _figure(axes)


def _axes(axes: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw into, without ink that has no use."""
    if axes is None:
        axes = Figure(size, layout=ConstrainedLayoutEngine()).add_subplot()
    bare(axes)
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _steps(axes: Axes, steps: Sequence[float], word: str) -> None:
    axes.set_xlabel(word, color=GREY)
    if all(step == int(step) for step in steps):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor=GREY)


def _edges(steps: Sequence[float]) -> list[float]:
    """The borders between steps, half way from one to the next."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    return [2 * steps[0] - between[0], *between, 2 * steps[-1] - between[-1]]


def _is_wide(values: Sequence[float]) -> bool:
    """Whether numbers above zero span more than a power of ten."""
    finite = [x for x in values if abs(x) < float("inf")]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)


def _written_out(axis: Axis) -> None:
    """0.02 and not 2 x 10^-2."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(_Between(minor_thresholds=(2.2, 0.5)))
    axis.set_tick_params(which="minor", colors=GREY)


class _Between(LogFormatter):
    """The labels between powers of ten, if there are few powers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a value, or none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def _short(name: str) -> str:
    """The end of a long name, which tells parts apart."""
    return name if len(name) <= 32 else "..." + name[-29:]
