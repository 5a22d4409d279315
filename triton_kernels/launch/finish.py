"""The last launch of reductions: what other launches left to add up, of several ops at once."""

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.chunks import mirrored, products
from pycoherence.ops.core.outputs import empty_outputs, names_of
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.launch.device import launch
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two
from pycoherence.triton_kernels.launch.tape import taped

PARTS = 16
"""The most parts of a row to add up where they are read; more take a launch of their own."""

# The most numbers of a row, and rows, of one program, in the order they are added up.
_LONGEST, _MOST = 2**14, 2**10

# Numbers of a tile of partial sums, the most of its columns, and those of numbers by example.
_TILE, _WIDE, _NARROW = 4096, 1024, 32

# Examples and channels of a tile that sums over examples.
_EXAMPLES, _CHANNELS = 32, 32

# Outputs of one launch; each is compiled into the kernel.
_TASKS = 8

# The next round may need what one adds up: sums of parts, then dots with the sum of gradients, then
# sums of their parts.
_FIRST, _SECOND, _THIRD, _LAST = range(4)


class SumRequest:
    """How the sum of gradients is wanted, and what else is known of it.

    Attributes:
        dtype: The dtype of the sum; `None` for the accumulation dtype.
        wants_norms: Whether `norms` are to be made.
        norms: Numbers whose squares add up to the squared norm of the sum.
    """

    __slots__ = ("dtype", "norms", "wants_norms")

    def __init__(self, dtype: torch.dtype | None = None, wants_norms: bool = False) -> None:
        self.dtype, self.wants_norms = dtype, wants_norms
        self.norms: Tensor | None = None

    def empty(self, like: Tensor, size: Sequence[int]) -> Tensor:
        """Memory for the sum of such gradients as have factors like this."""
        return like.new_empty(size, dtype=self.dtype or accumulate_dtype(like.dtype))

    def norms_of(self, like: Tensor, count: int) -> Tensor | None:
        """Memory for `count` norms, if they are wanted."""
        if self.wants_norms:
            self.norms = like.new_empty(count, dtype=accumulate_dtype(like.dtype))
        return self.norms


class _Sum(NamedTuple):
    """An output `[S]` that is the sum of `[N, S]`, and the norms of its blocks.

    The kernel is compiled for a size `S` only if that is the size of a parameter.
    """

    partial: Tensor
    out: Tensor
    norms: Tensor | None
    like_parameter: bool


class _Rows(NamedTuple):
    """The gradients of a batch as rows `[B, parts, C]`, and outputs, `None` if not wanted.

    Long rows and many are summed in parts: outputs by example are `[long, B]`, others `[many, C]`.
    """

    rows: Tensor
    coef: Tensor | None
    direction: Tensor | None
    sq_norms: Tensor | None = None
    dots: Tensor | None = None
    weighted_sum: Tensor | None = None
    norms: Tensor | None = None
    second_moment: Tensor | None = None
    sign_sum: Tensor | None = None


class Finish:
    """Collects what is left to add up. Results are there after `run`."""

    def __init__(self) -> None:
        self._rounds: list[list[_Sum | _Rows]] = [[] for _ in range(_LAST + 1)]

    def numbers(self, partial: Tensor) -> Tensor:
        """The sum of `[N, B]` over its first dimension."""
        return self._sum(partial, None, False)

    def like_parameter(self, partial: Tensor, request: SumRequest | None = None) -> Tensor:
        """The sum of `[N, *S]`, which is contiguous, over its first dimension.

        Args:
            partial: The sums of parts.
            request: How it is wanted, if it is the weighted sum.
        """
        return self._sum(partial, request, True)

    def _sum(self, partial: Tensor, request: SumRequest | None, like_parameter: bool) -> Tensor:
        request = request or SumRequest()
        plain = request.dtype in (None, partial.dtype) and not request.wants_norms
        if len(partial) == 1 and plain:
            return partial[0]
        out = request.empty(partial, partial.shape[1:])
        norms = request.norms_of(partial, cdiv(out.numel(), _WIDE))
        self._rounds[_FIRST].append(_Sum(partial, out, norms, like_parameter))
        return out

    def rows(
        self,
        rows: Tensor,
        g: Tensor,
        coef: Tensor | None,
        direction: Tensor | None,
        wanted: Set[str],
        request: SumRequest | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The outputs of a `*_reduce` op whose gradients are rows.

        Args:
            rows: `[B, parts, C]`, any strides; the gradient of an example is the sum of its parts.
            g: Output gradient; tells the dtypes.
            coef: `[B]` or `None`.
            direction: `[C]` or `None`.
            wanted: Names of the outputs.
            request: How the sum is wanted; in the accumulation dtype if `sum_dots` are.
        """
        acc, request = accumulate_dtype(g.dtype), request or SumRequest()
        if rows.shape[1] > PARTS or "gram" in wanted:
            rows = rows.sum(1, keepdim=True, dtype=acc)
        batch, _, channels = rows.shape
        sq_norms, dots, _, second_moment, sign_sum, sum_dots, gram = empty_outputs(
            g, (channels,), wanted - {"weighted_sum"}
        )
        summed = not wanted.isdisjoint(("weighted_sum", "sum_dots"))
        whole = request.empty(g, (channels,)) if summed else None
        long, many = cdiv(channels, _LONGEST), max(1, cdiv(batch, _MOST))
        one = many == 1 and whole is not None
        norms = request.norms_of(g, cdiv(channels, _CHANNELS)) if one else None
        task = _Rows(
            *(rows, coef, direction),
            *(self._in_parts(out, long, acc, False, _SECOND) for out in (sq_norms, dots)),
            *(self._in_parts(whole, many, acc, True, _SECOND, request), norms),
            *(self._in_parts(out, many, acc, True, _SECOND) for out in (second_moment, sign_sum)),
        )
        self._rounds[_FIRST].append(task)
        if sum_dots is not None:
            again = self._in_parts(sum_dots, long, acc, False, _LAST)
            self._rounds[_THIRD].append(_Rows(rows, None, whole, dots=again))
        if gram is not None:
            gram.copy_(mirrored(products(rows, rows)))
        weighted_sum = whole if "weighted_sum" in wanted else None
        return sq_norms, dots, weighted_sum, second_moment, sign_sum, sum_dots, gram

    def _in_parts(
        self,
        out: Tensor | None,
        parts: int,
        acc: torch.dtype,
        like_parameter: bool,
        when: int,
        request: SumRequest | None = None,
    ) -> Tensor | None:
        """Memory for `parts` sums of an output, which a later round adds up; itself if it is one.

        Args:
            out: The output; `None` if it is not wanted.
            parts: Number of sums.
            acc: Their dtype.
            like_parameter: Whether it has the shape of the parameter.
            when: The round.
            request: How it is wanted, if it is the weighted sum.
        """
        if out is None or parts == 1:
            return out
        partial = out.new_empty((parts, *out.shape), dtype=acc)
        norms = None if request is None else request.norms_of(partial, cdiv(len(out), _WIDE))
        self._rounds[when].append(_Sum(partial, out, norms, like_parameter))
        return partial

    def run(self) -> None:
        """Add up, in one launch unless outputs are many, or need one another."""
        for tasks in self._rounds:
            for first in range(0, len(tasks), _TASKS):
                _run(tasks[first : first + _TASKS])
            tasks.clear()


def finished(begin: Callable[..., Any], *args: Any) -> Any:
    """The outputs of a function that takes a `Finish` as its last argument."""
    finish = Finish()
    out = begin(*args, finish)
    finish.run()
    return out


class Completed:
    """A `*_reduce` op whose outputs are complete when it returns.

    It is made of a function that takes the names of the outputs in place of their mask, and then a
    `SumRequest`, and a `Finish` that is to complete them.
    """

    def __init__(self, function: Callable[..., tuple[Tensor | None, ...]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> tuple[Tensor | None, ...]:
        """The outputs of the op."""
        return taped(self._complete, args)

    def _complete(self, *args: Any) -> tuple[Tensor | None, ...]:
        return finished(self.begin, args, SumRequest())

    def begin(
        self, args: Sequence[Any], request: SumRequest, finish: Finish
    ) -> tuple[Tensor | None, ...]:
        """The outputs for the arguments of the op, which `finish` completes."""
        *rest, want = args
        return self._function(*rest, names_of(want), request, finish)


def _run(tasks: Sequence[_Sum | _Rows]) -> None:
    """One launch."""
    sums = [task for task in tasks if isinstance(task, _Sum)]
    rows = [task for task in tasks if isinstance(task, _Rows)]
    numbers, shapes, programs = list[tuple[int, ...]](), list[int](), 0
    for partial, out, _, like_parameter in sums:
        size = out.numel()
        wide = min(_WIDE, max(16, power_of_two(size))) if like_parameter else _NARROW
        blocks = cdiv(size, wide)
        numbers.append((programs, blocks, len(partial), size, 0))
        shapes += _TILE // wide, wide
        programs += blocks
    for task in rows:
        batch, parts, channels = task.rows.shape
        wide = 1024 if channels > 128 else 128 if channels > 16 else 16
        by_row = task.sq_norms is not None or task.dots is not None
        columns = task.weighted_sum, task.second_moment, task.sign_sum
        by_column = any(out is not None for out in columns)
        high = cdiv(channels, _LONGEST) * cdiv(batch, 1024 // wide) * by_row
        across = max(1, cdiv(batch, _MOST)) * cdiv(channels, _CHANNELS) * by_column
        numbers.append((programs, high, across, batch, parts))
        shapes += 1024 // wide, wide
        programs += high + across
    launch(
        _finish,
        (programs,),
        tuple(_sum_arguments(task) for task in sums),
        tuple(_row_arguments(task) for task in rows),
        tuple(_odd(n) for each in numbers for n in each),
        SUMS=len(sums),
        ROWS=len(rows),
        SHAPES=tuple(shapes),
        EXAMPLES=_EXAMPLES,
        CHANNELS=_CHANNELS,
        LONGEST=_LONGEST,
        MOST=_MOST,
    )


def _odd(n: int) -> int:
    """A number in a tuple of arguments, as one for which the kernel is not compiled anew.

    It is for 1 and for multiples of 16; Triton's `do_not_specialize` does not reach into tuples.
    """
    return 2 * n + 3


def _sum_arguments(task: _Sum) -> tuple[Any, ...]:
    size = task.out.numel() if task.like_parameter else None
    return task.partial, task.out, task.norms, size


def _row_arguments(task: _Rows) -> tuple[Any, ...]:
    strides = (None if v is None else v.stride(0) for v in (task.coef, task.direction))
    return (*task, task.rows.shape[2], task.rows.stride(), *strides)


@triton.jit
def norm_of(x):
    """The norm of all numbers. Their squares may leave the range where it does not."""
    largest = tl.max(tl.abs(x))
    scale = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)
    scaled = x / scale
    return tl.sqrt(tl.sum(scaled * scaled)) * scale


@triton.jit
def _even(n):
    """The number that `_odd` was given."""
    return (n - 3) >> 1


@triton.jit
def _finish(
    sums,
    rows,
    numbers,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    SHAPES: tl.constexpr,
    EXAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Each output has programs of its own, one after the other.

    sums (partial [N, S], out [S], norms or None, S or None); rows (the fields of `_Rows`, C,
    strides of all but the outputs). Each has five numbers: sums the first program, the number of
    programs, N, S and none; rows the first program, the numbers of programs that sum over channels
    and over examples, B and parts.
    """
    program = tl.program_id(0)
    for i in tl.static_range(SUMS):
        block, count = program - _even(numbers[5 * i]), _even(numbers[5 * i + 1])
        if block >= 0 and block < count:
            n, size = _even(numbers[5 * i + 2]), _even(numbers[5 * i + 3])
            _add_up(sums[i], n, size, block, SHAPES[2 * i], SHAPES[2 * i + 1])
    for i in tl.static_range(SUMS, SUMS + ROWS):
        block, high = program - _even(numbers[5 * i]), _even(numbers[5 * i + 1])
        across, batch = _even(numbers[5 * i + 2]), _even(numbers[5 * i + 3])
        parts = _even(numbers[5 * i + 4])
        if block >= 0 and block < high:
            _by_row(rows[i - SUMS], block, batch, parts, SHAPES[2 * i], SHAPES[2 * i + 1], LONGEST)
        elif block >= high and block < high + across:
            _by_column(rows[i - SUMS], block - high, batch, parts, EXAMPLES, CHANNELS, MOST)


@triton.jit
def _add_up(task, N, size, block, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """Sums of `WIDE` columns of partial [N, S], and the norm of these sums."""
    partial, out, norms = task[0], task[1], task[2]
    S = size if task[3] is None else task[3]
    ACC: tl.constexpr = partial.dtype.element_ty
    s = block.to(tl.int64) * WIDE + tl.arange(0, WIDE)
    inside = s < S
    acc = tl.full((HIGH, WIDE), 0, ACC)
    for first in range(0, N, HIGH):
        n = first + tl.arange(0, HIGH)
        at = partial + n.to(tl.int64)[:, None] * S + s[None, :]
        acc += tl.load(at, (n < N)[:, None] & inside[None, :], 0)
    total = tl.sum(acc, 0)
    if norms is not None:
        tl.store(norms + block, norm_of(total))
    tl.store(out + s, total, inside)


@triton.jit
def _load(rows, b, c, inside, parts, strides, ACC: tl.constexpr):
    """A tile of the rows, parts added up; zero outside."""
    at = rows + b.to(tl.int64)[:, None] * strides[0] + c.to(tl.int64)[None, :] * strides[2]
    value = tl.full(inside.shape, 0, ACC)
    for _ in range(parts):
        value += tl.load(at, inside, 0).to(ACC)
        at += strides[1]
    return value


@triton.jit
def _by_row(task, block, B, parts, HIGH: tl.constexpr, WIDE: tl.constexpr, LONGEST: tl.constexpr):
    """Norms and dot products of HIGH examples, of up to LONGEST of their channels."""
    rows, direction, sq_norms, dots = task[0], task[2], task[3], task[4]
    C, strides, direction_stride = task[9], task[10], task[12]
    ACC: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    blocks = (B + HIGH - 1) // HIGH
    b = block % blocks * HIGH + tl.arange(0, HIGH)
    first = block // blocks * LONGEST
    norm = tl.full((HIGH, WIDE), 0, ACC)
    dot = tl.full((HIGH, WIDE), 0, ACC)
    for start in range(first, tl.minimum(first + LONGEST, C), WIDE):
        c = start + tl.arange(0, WIDE)
        value = _load(rows, b, c, (b < B)[:, None] & (c < C)[None, :], parts, strides, ACC)
        if sq_norms is not None:
            norm += value * value
        if dots is not None:
            along = tl.load(direction + c.to(tl.int64) * direction_stride, c < C, 0).to(ACC)
            dot += value * along[None, :]
    to = (block // blocks).to(tl.int64) * B + b
    if sq_norms is not None:
        tl.store(sq_norms + to, tl.sum(norm, 1), b < B)
    if dots is not None:
        tl.store(dots + to, tl.sum(dot, 1), b < B)


@triton.jit
def _by_column(task, block, B, parts, HIGH: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr):
    """Sums of WIDE channels over up to MOST examples."""
    rows, coef, weighted_sum, norms = task[0], task[1], task[5], task[6]
    second_moment, sign_sum = task[7], task[8]
    C, strides, coef_stride = task[9], task[10], task[11]
    ACC: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    blocks = (C + WIDE - 1) // WIDE
    c = block % blocks * WIDE + tl.arange(0, WIDE)
    first = block // blocks * MOST
    weighted_sum_acc = tl.full((HIGH, WIDE), 0, ACC)
    second_moment_acc = tl.full((HIGH, WIDE), 0, ACC)
    sign_sum_acc = tl.full((HIGH, WIDE), 0, ACC)
    for start in range(first, tl.minimum(first + MOST, B), HIGH):
        b = start + tl.arange(0, HIGH)
        value = _load(rows, b, c, (b < B)[:, None] & (c < C)[None, :], parts, strides, ACC)
        if weighted_sum is not None:
            if coef is None:
                weighted_sum_acc += value
            else:
                weight = tl.load(coef + b.to(tl.int64) * coef_stride, b < B, 0).to(ACC)[:, None]
                weighted_sum_acc += tl.where(weight == 0, 0.0, weight * value)
        if second_moment is not None:
            second_moment_acc += value * value
        if sign_sum is not None:
            sign = (value > 0).to(ACC) - (value < 0).to(ACC)
            sign_sum_acc += tl.where(value == value, sign, value)
    to = (block // blocks).to(tl.int64) * C + c
    if weighted_sum is not None:
        whole = tl.sum(weighted_sum_acc, 0)
        tl.store(weighted_sum + to, whole, c < C)
        if norms is not None:
            tl.store(norms + block, norm_of(whole))
    if second_moment is not None:
        tl.store(second_moment + to, tl.sum(second_moment_acc, 0), c < C)
    if sign_sum is not None:
        tl.store(sign_sum + to, tl.sum(sign_sum_acc, 0), c < C)
