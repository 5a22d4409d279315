"""Rules of dimensions: the dimension of the result that each one of an argument becomes.

A rule here is told the arguments and one result, and gives the places of each argument.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.propagation import JOINED, Places, identity

Dimensions = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], list[tuple[Tensor, Places]]]

known_dimensions: dict[str, Dimensions] = {}


def dimensions(*names: str) -> Callable[[Dimensions], Dimensions]:
    """Describe functions by what becomes of the dimensions of their arguments."""

    def decorate(rule: Dimensions) -> Dimensions:
        for name in names:
            known_dimensions[name] = rule
        return rule

    return decorate


def given(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, name: str, default: Any = None
) -> Any:
    """An argument by its place or its name."""
    return args[at] if len(args) > at else kwargs.get(name, default)


def main(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument, by whatever name."""
    if args:
        return args[0]
    for name in ("input", "self", "query", "x", "x1", "a"):
        if name in kwargs:
            return kwargs[name]
    return next(x for x in kwargs.values() if isinstance(x, Tensor))


def dims_of(x: Tensor, dim: Any) -> list[int]:
    """Dimensions, counted from the first one; all if none is given."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    if isinstance(dim, (tuple, list, torch.Size)):
        return [d % max(1, x.dim()) for d in dim]
    return [dim % max(1, x.dim())]


def without(x: Tensor, dims: Sequence[int], result: Tensor) -> Places:
    """The places when some dimensions are joined, and are gone or have size 1."""
    if result.dim() == x.dim():
        return [JOINED if d in dims else d for d in range(x.dim())]
    places: list[int] = []
    for d in range(x.dim()):
        places.append(JOINED if d in dims else d - sum(e < d for e in dims))
    if result.dim() != x.dim() - len(set(dims)):
        return [JOINED] * x.dim()
    return places


@dimensions(
    *"""
    sum mean amax amin prod logsumexp any all std var median nanmedian nansum nanmean
    count_nonzero argmax argmin max min var_mean std_mean aminmax trace cov corrcoef
    frobenius_norm nuclear_norm
    """.split()
)
def reductions(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x, other = main(args, kwargs), given(args, kwargs, 1, "other")
    if isinstance(other, Tensor):  # torch.max(a, b), number by number
        return [(x, identity(x, result)), (other, identity(other, result))]
    return [(x, without(x, dims_of(x, _reduced(args, kwargs)), result))]


def _reduced(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for name in ("dim", "axis"):
        if name in kwargs:
            return kwargs[name]
    for value in args[1:]:
        if isinstance(value, (bool, float, str)):
            continue
        if isinstance(value, int) or (
            isinstance(value, (tuple, list)) and all(isinstance(i, int) for i in value)
        ):
            return value
    return None


@dimensions("norm", "vector_norm", "quantile", "nanquantile")
def norms_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    dim = given(args, kwargs, 2, "dim", kwargs.get("axis"))
    q = given(args, kwargs, 1, "q")
    if isinstance(q, Tensor) and q.dim():
        return [(x, [JOINED] * x.dim())]  # each quantile has a dimension of its own
    return [(x, without(x, dims_of(x, dim), result))]


def _picked(at: int) -> Dimensions:
    """A rule of functions that pick one value along a dimension, which is their argument `at`."""

    def rule(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[tuple[Tensor, Places]]:
        x = main(args, kwargs)
        return [(x, without(x, dims_of(x, given(args, kwargs, at, "dim", -1)), result))]

    return rule


dimensions("kthvalue")(_picked(2))
dimensions("mode")(_picked(1))


@dimensions("renorm")
def renormed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x, dim = main(args, kwargs), given(args, kwargs, 2, "dim", 0)
    return [(x, [d if d == dim % x.dim() else JOINED for d in range(x.dim())])]


@dimensions("unique_consecutive")
def along_one(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    name = kwargs.get("dim", kwargs.get("axis"))
    return [(x, without(x, dims_of(x, name), result))]


def _along(at: int, default: Any) -> Dimensions:
    def rule(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[tuple[Tensor, Places]]:
        x = main(args, kwargs)
        dim = given(args, kwargs, at, "dim", kwargs.get("axis", default))
        if dim is None:
            dim = list(range(x.dim()))
        if result.dim() != x.dim():
            return [(x, [JOINED] * x.dim())]
        gone = dims_of(x, dim)
        return [(x, [JOINED if d in gone else d for d in range(x.dim())])]

    return rule


for _name, _at, _default in (
    ("softmax", 1, None),
    ("log_softmax", 1, None),
    ("softmin", 1, None),
    ("_softmax", 1, None),
    ("_log_softmax", 1, None),
    ("cumsum", 1, None),
    ("cumprod", 1, None),
    ("logcumsumexp", 1, None),
    ("cummax", 1, None),
    ("cummin", 1, None),
    ("sort", 1, -1),
    ("argsort", 1, -1),
    ("topk", 2, -1),
    ("gumbel_softmax", 4, -1),
    ("glu", 1, -1),
    ("diff", 2, -1),
    ("normalize", 2, 1),
    ("msort", 9, 0),
    ("fft", 2, -1),
    ("ifft", 2, -1),
    ("rfft", 2, -1),
    ("irfft", 2, -1),
    ("hfft", 2, -1),
    ("ihfft", 2, -1),
    ("fft2", 2, (-2, -1)),
    ("ifft2", 2, (-2, -1)),
    ("rfft2", 2, (-2, -1)),
    ("irfft2", 2, (-2, -1)),
    ("fftn", 2, None),
    ("ifftn", 2, None),
    ("rfftn", 2, None),
    ("irfftn", 2, None),
    ("fftshift", 1, None),
    ("ifftshift", 1, None),
    ("channel_shuffle", 9, 1),
):
    known_dimensions[_name] = _along(_at, _default)


def last_joined(n: int) -> Dimensions:
    """All but the last n dimensions stay."""

    def rule(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[tuple[Tensor, Places]]:
        x = main(args, kwargs)
        return [(x, [d if d < x.dim() - n else JOINED for d in range(x.dim())])]

    return rule


for _name, _n in (
    *((f"{kind}_pool{n}d", n) for kind in ("max", "avg", "lp") for n in (1, 2, 3)),
    *((f"adaptive_{kind}_pool{n}d", n) for kind in ("max", "avg") for n in (1, 2, 3)),
    *((f"{kind}_pool{n}d_with_indices", n) for kind in ("max", "adaptive_max") for n in (1, 2, 3)),
    *((f"fractional_max_pool{n}d", n) for n in (2, 3)),
    *(
        (f"{name}", 2)
        for name in ("inverse", "cholesky", "qr", "svd", "eigh", "matrix_exp", "pinv")
    ),
    ("svdvals", 2),
    ("det", 2),
    ("slogdet", 2),
    ("logdet", 2),
    ("inv", 2),
    ("eig", 2),
    ("eigvalsh", 2),
    ("matrix_power", 2),
    ("cholesky_inverse", 2),
    ("householder_product", 2),
    ("local_response_norm", 3),
):
    known_dimensions[_name] = last_joined(_n)


@dimensions("one_hot", "view_as_complex", "view_as_real")
def more_behind(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    return [(x, [d if d < result.dim() else JOINED for d in range(x.dim())])]


@dimensions("interpolate", "upsample", "upsample_bilinear", "upsample_nearest", "instance_norm")
def of_images(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    return [(x, [d if d < 2 else JOINED for d in range(x.dim())])]


@dimensions("group_norm", "fold", "max_unpool1d", "max_unpool2d")
def of_first(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    return [(x, [0, *[JOINED] * (x.dim() - 1)])]


@dimensions("grid_sample", "affine_grid")
def of_grids(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append((x, [0, *[JOINED] * (x.dim() - 1)]))
    return found


@dimensions("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def of_last(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    shape = given(args, kwargs, 1, "normalized_shape")
    n = len(shape) if isinstance(shape, (tuple, list, torch.Size)) else 1
    found: list[tuple[Tensor, Places]] = [
        (x, [d if d < x.dim() - n else JOINED for d in range(x.dim())])
    ]
    for at, name in ((2, "weight"), (3, "bias")):
        p = given(args, kwargs, at, name)
        if isinstance(p, Tensor):
            found.append((p, identity(p, result)))
    return found


@dimensions("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
def of_batches(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    training = kwargs.get("training", next((a for a in args[5:6] if isinstance(a, bool)), False))
    if training:
        return [(x, [d if d == 1 else JOINED for d in range(x.dim())])]
    return [(x, range(x.dim()))]


@dimensions("linear")
def linear(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x, weight = main(args, kwargs), given(args, kwargs, 1, "weight")
    bias = given(args, kwargs, 2, "bias")
    rows = x.dim() - 1
    found: list[tuple[Tensor, Places]] = [(x, [*range(rows), JOINED])]
    found.append((weight, [rows, JOINED] if weight.dim() == 2 else [JOINED]))
    if bias is not None:
        found.append((bias, identity(bias, result)))
    return found


@dimensions("matmul", "mm", "bmm", "mv", "dot", "rmatmul", "vdot")
def matmul(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    a, b = (
        main(args, kwargs),
        given(args, kwargs, 1, "other", kwargs.get("mat2", kwargs.get("vec"))),
    )
    return product_places(a, b, result)


def product_places(a: Tensor, b: Tensor, result: Tensor) -> list[tuple[Tensor, Places]]:
    """The places of a matrix product, which is broadcast over all but the last two dimensions."""
    n = result.dim()
    ends = (a.dim() > 1) + (b.dim() > 1)  # dimensions of the result that are not broadcast
    ahead = n - ends
    of_a = [ahead - (a.dim() - 2) + d for d in range(a.dim() - 2)]
    of_a += [ahead, JOINED] if a.dim() > 1 else [JOINED]
    of_b = [ahead - (b.dim() - 2) + d for d in range(b.dim() - 2)]
    of_b += [JOINED, n - 1] if b.dim() > 1 else [JOINED]
    return [(a, of_a), (b, of_b)]


@dimensions("addmm", "baddbmm", "addmv", "sspaddmm")
def added_product(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    c = main(args, kwargs)
    a = given(args, kwargs, 1, "mat1", kwargs.get("batch1", kwargs.get("mat")))
    b = given(args, kwargs, 2, "mat2", kwargs.get("batch2", kwargs.get("vec")))
    return [(c, identity(c, result)), *product_places(a, b, result)]


@dimensions("outer", "ger")
def outer(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    a, b = main(args, kwargs), given(args, kwargs, 1, "vec2", kwargs.get("other"))
    return [(a, [0]), (b, [1])]


@dimensions("tensordot")
def tensordot(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    a, b = main(args, kwargs), given(args, kwargs, 1, "b")
    dims = given(args, kwargs, 2, "dims", 2)
    if isinstance(dims, int):
        of_a, of_b = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        of_a, of_b = ([d % x.dim() for d in ds] for x, ds in zip((a, b), dims, strict=True))
    found, at = [], 0
    for x, gone in ((a, of_a), (b, of_b)):
        places = []
        for d in range(x.dim()):
            places.append(JOINED if d in gone else at)
            at += d not in gone
        found.append((x, places))
    return found


def letters_of(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result; `...` become capital letters from the end."""
    spaced = equation.replace(" ", "")
    left, arrow, right = spaced.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    free = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in spaced]
    found = []
    for term, x in zip(terms, operands, strict=True):
        if "..." in term:
            n = x.dim() - len(term.replace("...", ""))
            if n < 0 or n > len(free):
                return None
            term = term.replace("...", "".join(reversed(free[:n])))
        if len(term) != x.dim():
            return None
        found.append(term)
    most = max(
        (
            x.dim() - len(t.replace("...", ""))
            for t, x in zip(terms, operands, strict=True)
            if "..." in t
        ),
        default=0,
    )
    dots = "".join(reversed(free[:most]))
    if arrow:
        result = right.replace("...", dots)
    else:
        every = "".join(t.replace("...", "") for t in terms)
        result = dots + "".join(c for c in sorted(set(every)) if every.count(c) == 1)
    return found, result


@dimensions("einsum")
def einsum(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not isinstance(args[0], str) or (found := letters_of(args[0], operands)) is None:
        return [(x, [JOINED] * x.dim()) for x in operands if isinstance(x, Tensor)]
    terms, out = found
    return [
        (x, [out.index(c) if c in out else JOINED for c in term])
        for x, term in zip(operands, terms, strict=True)
    ]


@dimensions("scaled_dot_product_attention")
def attention(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    q, k, v = main(args, kwargs), given(args, kwargs, 1, "key"), given(args, kwargs, 2, "value")
    mask = given(args, kwargs, 3, "attn_mask")
    n = result.dim()

    def places(x: Tensor, *ends: int) -> Places:
        more = n - x.dim()
        return [*(more + d for d in range(x.dim() - 2)), *ends][-x.dim() :]

    found = [
        (q, places(q, n - 2, JOINED)),
        (k, places(k, JOINED, JOINED)),
        (v, places(v, JOINED, n - 1)),
    ]
    if mask is not None:
        found.append((mask, places(mask, n - 2, JOINED)))
    return found


@dimensions("embedding")
def embedding(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    ids, table = main(args, kwargs), given(args, kwargs, 1, "weight")
    if ids.is_floating_point():
        ids, table = table, ids
    return [(ids, range(ids.dim())), (table, [JOINED] * table.dim())]


@dimensions("cosine_similarity")
def similarity(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    a, b = given(args, kwargs, 0, "x1"), given(args, kwargs, 1, "x2")
    dim = given(args, kwargs, 2, "dim", 1)
    n = max(a.dim(), b.dim())
    gone = dim % n

    def places(x: Tensor) -> Places:
        full = [n - x.dim() + d for d in range(x.dim())]
        return [JOINED if d == gone else d - (d > gone) for d in full]

    return [(a, places(a)), (b, places(b))]


@dimensions("pairwise_distance", "vecdot", "linalg_vecdot")
def distance(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    pair = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    n = max(x.dim() for x in pair)
    gone = kwargs.get("dim", -1) % n
    found = []
    for x in pair:
        full = [n - x.dim() + d for d in range(x.dim())]
        found.append((x, [JOINED if d == gone else d - (d > gone) for d in full]))
    return found if result.dim() == n - 1 else [(x, [JOINED] * x.dim()) for x in pair]


@dimensions("cdist")
def cdist(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    a, b = given(args, kwargs, 0, "x1"), given(args, kwargs, 1, "x2")
    return [
        *product_places(a, b.mT, result)[:1],
        (b, [*[result.dim() - b.dim() + d for d in range(b.dim() - 2)], result.dim() - 1, JOINED]),
    ]


@dimensions(
    *"""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    """.split()
)
def conv(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x, weight = main(args, kwargs), given(args, kwargs, 1, "weight")
    bias = given(args, kwargs, 2, "bias")
    if x.dim() != weight.dim():
        return [(x, [JOINED] * x.dim()), (weight, [JOINED] * weight.dim())]
    found: list[tuple[Tensor, Places]] = [(x, [0, *[JOINED] * (x.dim() - 1)])]
    found.append((weight, [JOINED] * weight.dim()))
    if bias is not None:
        found.append((bias, [JOINED]))
    return found


@dimensions("cross", "linalg_cross")
def cross(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    pair = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    dim = given(args, kwargs, 2, "dim")
    # Without one, one function takes the last dimension and another the first of three.
    gone = (
        {d for d, n in enumerate(result.shape) if n == 3} if dim is None else {dim % result.dim()}
    )
    return [(x, [JOINED if d in gone else d for d in identity(x, result)]) for x in pair]


@dimensions("solve", "lstsq", "solve_triangular", "cholesky_solve", "triangular_solve", "ormqr")
def solve(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    pair = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    of_vectors = result.dim() == max(x.dim() for x in pair) - 1
    ends = 1 if of_vectors else 2
    found = []
    for x in pair:
        own = ends if of_vectors and x.dim() == result.dim() else 2
        more = (result.dim() - ends) - (x.dim() - own)
        found.append((x, [more + d if d < x.dim() - own else JOINED for d in range(x.dim())]))
    return found


_LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div soft_margin_loss
    binary_cross_entropy_with_logits poisson_nll_loss gaussian_nll_loss hinge_embedding_loss
    """.split()


@dimensions(*_LOSSES)
def numbers_losses(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    each = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    full = max((x.dim() for x in each), default=0)
    if result.dim() < full or result.dim() == 0:
        return [(x, [JOINED] * x.dim()) for x in each]
    return [(x, identity(x, result)) for x in each]


@dimensions("cross_entropy", "nll_loss", "cross_entropy_loss", "nll_loss_nd", "nll_loss2d")
def class_losses(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x, target = main(args, kwargs), given(args, kwargs, 1, "target")
    if result.dim() == 0:
        return [(y, [JOINED] * y.dim()) for y in (x, target)]
    of_x = [0, JOINED, *range(1, x.dim() - 1)] if x.dim() > 1 else [JOINED]
    of_target = of_x if target.dim() == x.dim() else list(range(target.dim()))
    return [(x, of_x), (target, of_target)]


@dimensions(
    *"""
    triplet_margin_loss margin_ranking_loss cosine_embedding_loss multi_margin_loss ctc_loss
    multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_with_distance_loss
    """.split()
)
def pair_losses(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    each = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    rows = result.dim() == 1
    return [(x, [0 if rows and d == 0 else JOINED for d in range(x.dim())]) for x in each]


def permutation(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int] | None:
    """Which dimension of the argument each one of the result is."""
    x = main(args, kwargs)
    n, order = x.dim(), list(range(x.dim()))
    if name in ("permute", "permute_copy"):
        dims = args[1:] if len(args) > 1 else (kwargs["dims"],)
        flat = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return [d % n for d in flat]
    if name in ("transpose", "swapaxes", "swapdims", "transpose_copy"):
        pairs = (("dim0", "axis0"), ("dim1", "axis1"))
        a, b = (
            args[i + 1] if len(args) > i + 1 else next(kwargs[k] for k in names if k in kwargs)
            for i, names in enumerate(pairs)
        )
        order[a], order[b] = order[b], order[a]
        return order
    if name in ("t", "T", "t_copy", "H"):
        return order[::-1]
    if name in ("mT", "mH", "adjoint"):
        return [*order[:-2], n - 1, n - 2]
    source, target = (
        args[i + 1] if len(args) > i + 1 else kwargs[k]
        for i, k in enumerate(("source", "destination"))
    )
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    placed = {t % n: s % n for s, t in zip(source, target, strict=True)}
    rest = iter([d for d in range(n) if d not in placed.values()])
    return [placed[d] if d in placed else next(rest) for d in range(n)]


PERMUTATIONS = frozenset(
    """
    permute transpose swapaxes swapdims t T H mT mH adjoint movedim moveaxis
    """.split()
)


def _permuted(name: str) -> Dimensions:
    def rule(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[tuple[Tensor, Places]]:
        x = main(args, kwargs)
        order = permutation(name, args, kwargs)
        assert order is not None
        places = [0] * x.dim()
        for to, d in enumerate(order):
            places[d] = to
        return [(x, places)]

    return rule


for _name in PERMUTATIONS:
    known_dimensions[_name] = _permuted(_name)
