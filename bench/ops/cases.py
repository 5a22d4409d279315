"""All that there is to measure: each op on the shapes of its file in `plain/`."""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.ops.ways import Outputs, Shape, Source, Way, argument_names
from pycoherence.ops import Reduced
from pycoherence.ops.core.spec import OpSpec
from pycoherence.ops.family.reduce import mask
from pycoherence.ops.family.rules import RULES

PLAIN = Path(__file__).parent / "plain"

# A weighted sum alone is the second step of clipping, so it gets coefficients; with other outputs
# it is the ordinary gradient.
WANTS = (
    ("sq_norms",),
    ("weighted_sum",),
    ("sq_norms", "weighted_sum"),
    ("dots",),
    ("sq_norms", "weighted_sum", "second_moment"),
    ("sq_norms", "weighted_sum", "sum_dots"),
    ("weighted_sum", "gram"),
    Reduced._fields,
)

# For the ops of order statistics, as far as the size of a batch allows.
ORDERS = (
    ("winsorized_mean", 2.0),
    ("winsorized_mean", 16.0),
    ("trimmed_mean", 2.0),
    ("median", 0.0),
    ("lower_median", 0.0),
    ("median_of_means", 3.0),
    ("sign_agreement", 0.5),
    ("phocas", 2.0),
    ("meamed", 2.0),
)


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        spec: The op.
        shape: For people.
        wanted: Names of the outputs to compute.
        arguments: Arguments of the op, by the names in its schema.
        ways: The ways of plain torch to compute it.
        truth: Gives the outputs by the reference in float64; those of one shape share it.
    """

    spec: OpSpec
    shape: Shape
    wanted: tuple[str, ...]
    arguments: Mapping[str, Any]
    ways: Mapping[str, Way] = field(repr=False)
    truth: Callable[[], Outputs] = field(repr=False)

    def positional(self) -> list[Any]:
        """The arguments in the order of the schema."""
        return [self.arguments[name] for name in argument_names(self.spec)]

    def named(self, outputs: Tensor | tuple[Tensor, ...]) -> Outputs:
        """The outputs of an op, by name."""
        return named(self.wanted, outputs)

    def plain_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.arguments.items() if name != "want"}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.spec.name} {sizes}: {'+'.join(self.wanted)}"


def has_plain(op: str) -> bool:
    """Whether `plain/<op>.py` exists."""
    return (PLAIN / f"{op}.py").exists()


def named(wanted: tuple[str, ...], outputs: Tensor | tuple[Tensor, ...]) -> Outputs:
    """The outputs of an op, by name; of a `*_reduce` op, those that were wanted."""
    if isinstance(outputs, Tensor):
        return {wanted[0]: outputs}
    if len(outputs) < len(Reduced._fields):
        return {wanted[0]: outputs[0]}  # the others tell about it
    found = dict(zip(Reduced._fields, outputs, strict=True))
    return {name: found[name] for name in wanted}


def cases(spec: OpSpec, device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """All there is to measure of one op."""
    plain = importlib.import_module(f"bench.ops.plain.{spec.name}")
    for shape in plain.QUICK if quick else plain.SHAPES:
        random = Source(device, dtype)
        head = plain.inputs(shape, random)
        if "want" in argument_names(spec):
            found = _reductions(spec, head, random)
        elif "rule" in argument_names(spec):
            found = _orders(spec, head, shape["B"])
        else:
            output = "gram" if spec.name.endswith("_gram") else spec.name
            found = [((output,), head, _truth(spec, (output,), head))]
        for wanted, arguments, truth in found:
            yield Case(spec, shape, wanted, arguments, plain.WAYS, truth)


def _reductions(
    spec: OpSpec, head: Mapping[str, Any], random: Source
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], Callable[[], Outputs]]]:
    """Wanted outputs, arguments and truth of each case of a `*_reduce` op on one shape."""
    coef = random.statistic(len(head["g"]))
    direction = random.statistic(*_parameter_shape(spec, head))
    fields = Reduced._fields
    everything = {**head, "coef": None, "direction": direction, "want": mask(fields)}
    shared = _truth(spec, fields, everything)
    for wanted in WANTS:
        weighted = wanted == ("weighted_sum",)
        tail = {
            "coef": coef if weighted else None,
            "direction": direction if "dots" in wanted else None,
            "want": mask(wanted),
        }
        arguments = {**head, **tail}
        yield wanted, arguments, _truth(spec, wanted, arguments) if weighted else shared


def _orders(
    spec: OpSpec, head: Mapping[str, Any], batch: int
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], Callable[[], Outputs]]]:
    """The same of a `*_order` op; a rule and its number name the output."""
    for rule, k in ORDERS:
        if RULES[rule].fewest <= k <= RULES[rule].most(batch):
            arguments = {**head, "rule": rule, "k": k, "drop": False}
            wanted = (f"{rule} {k:g}" if k else rule,)
            yield wanted, arguments, _truth(spec, wanted, arguments)


def _truth(
    spec: OpSpec, wanted: tuple[str, ...], arguments: Mapping[str, Any]
) -> Callable[[], Outputs]:
    """The reference in float64, computed once, when it is first asked for."""

    @functools.cache
    def truth() -> Outputs:
        return in_float64(spec, wanted, [arguments[name] for name in argument_names(spec)])

    return truth


def in_float64(spec: OpSpec, wanted: tuple[str, ...], args: Sequence[Any]) -> Outputs:
    """The wanted outputs by the reference, from the arguments in float64."""
    return named(wanted, spec.reference(*tree_map_only(Tensor, _double, list(args))))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _parameter_shape(spec: OpSpec, head: Mapping[str, Any]) -> torch.Size:
    arguments = {**head, "coef": None, "direction": None, "want": mask(("weighted_sum",))}
    outputs = spec.fake(*(arguments[name] for name in argument_names(spec)))
    return outputs[Reduced._fields.index("weighted_sum")].shape
