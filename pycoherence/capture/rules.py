"""Rules of what torch's functions do to the dimensions of their arguments, by name.

A function is looked up by its bare name, so that `torch.add`, `Tensor.add_`, `Tensor.__iadd__` and
`torch.ops.aten.add` are one. What torch itself tags as pointwise needs no line here. A function
that nobody describes is `None` here: it loses the owner, and its error says so.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycoherence.capture.propagation import JOINED, Places, identity

VIEW, ELEMENTWISE, MOVEMENT, DIMENSIONS, ADDING, ATTRIBUTE, FACTORY, UNKNOWN = range(8)

Dimensions = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], list[tuple[Tensor, Places]]]


class Rule(NamedTuple):
    """The rule of a function.

    Attributes:
        name: Bare, such as `add`.
        kind: One of the constants of this file.
        dimensions: Of a function that is told by its dimensions: the places of each argument.
        writes: Whether it changes its first argument in place.
    """

    name: str
    kind: int
    dimensions: Dimensions | None = None
    writes: bool = False


_dimensions: dict[str, Dimensions] = {}


def dimensions(*names: str) -> Callable[[Dimensions], Dimensions]:
    """Describe functions by what becomes of the dimensions of their arguments."""

    def decorate(rule: Dimensions) -> Dimensions:
        for name in names:
            _dimensions[name] = rule
        return rule

    return decorate


VIEWS = frozenset(
    """
    view reshape flatten unflatten unsqueeze squeeze ravel view_as reshape_as contiguous clone
    detach detach_ alias to type type_as float double half bfloat16 int long bool short cpu cuda
    data _to_copy resolve_conj resolve_neg as_subclass refine_names
    rename alias_copy view_copy positive pin_memory retain_grad lift_fresh atleast_1d atleast_2d
    atleast_3d zero _unsafe_view conj conj_physical
    """.split()
)

ELEMENTWISE_TOO = frozenset(
    """
    relu relu_ dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d
    feature_alpha_dropout native_dropout where masked_fill fill lerp rrelu threshold softsign
    tanhshrink logsigmoid log_sigmoid softplus hardtanh hardswish hardsigmoid relu6 selu celu
    elu leaky_relu gelu silu mish nan_to_num clamp clip clamp_min clamp_max bernoulli addcmul
    addcdiv copy copy_ isclose float_power complex polar real imag true_divide truediv floordiv
    mod and or xor invert lshift rshift pow remainder fmod maximum minimum fmax fmin neg pos abs
    lt le gt ge eq ne sub rsub multiply subtract divide div add mul normal_ uniform_
    exponential_ bernoulli_ log_normal_ cauchy_ geometric_ random_ rand_like randn_like
    zeros_like ones_like empty_like full_like randint_like quantize_per_tensor
    fake_quantize_per_tensor_affine hardshrink softshrink sigmoid tanh logit erfinv xlogy
    special_xlogy special_entr gaussian isin sinc round ldexp frexp nextafter heaviside
    bucketize angle sgn sign square rsqrt reciprocal signbit isnan isinf isfinite isreal
    logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    bitwise_xor index_fill
    """.split()
)

MOVEMENTS = frozenset(
    """
    getitem index_select gather take take_along_dim masked_select roll flip fliplr flipud rot90
    repeat tile repeat_interleave expand expand_as broadcast_to narrow select split chunk
    tensor_split hsplit vsplit dsplit split_with_sizes unbind cat concat concatenate stack
    hstack vstack dstack column_stack row_stack index_copy select_scatter slice_scatter diagonal
    diag_embed diag tril triu pad unfold pixel_shuffle pixel_unshuffle channel_shuffle
    unsafe_chunk unsafe_split as_strided broadcast_tensors swap squeeze_multiple masked_scatter
    scatter setitem index_put iter diagonal_scatter index meshgrid cartesian_prod im2col
    narrow_copy unfold_copy slice
    """.split()
)

JOINING = frozenset(
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack".split()
)
"""Movements that put tensors beside each other."""

ADDINGS = frozenset(["index_add", "scatter_add", "scatter_reduce", "index_reduce"])
"""Movements that may put several elements in one place."""

ATTRIBUTES = frozenset(
    """
    shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_sparse dim size
    numel stride storage_offset is_contiguous is_floating_point is_complex data_ptr element_size
    __get__ grad names is_quantized is_meta itemsize nbytes output_nr _version _base len bool
    int float_ index_ item tolist numpy __len__ __bool__ repr format hash untyped_storage
    storage is_nested is_inference get_device ndimension nelement is_same_size register_hook
    register_post_accumulate_grad_hook is_conj is_neg is_signed equal allclose is_tensor
    is_nonzero is_pinned is_shared _is_view dim_order array contains has_names _make_subclass
    backward result_type can_cast broadcast_shapes set_grad_enabled __dlpack__ dlpack_device
    type_ share_memory_
    """.split()
)

FACTORIES = frozenset(
    """
    zeros ones empty full arange linspace logspace eye rand randn randint randperm tensor
    as_tensor scalar_tensor new_zeros new_ones new_empty new_full new_tensor normal tril_indices
    triu_indices hann_window hamming_window from_numpy asarray empty_strided range kaiser_window
    bartlett_window blackman_window zeros_ empty_permuted
    """.split()
)


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


@dimensions("kthvalue")
def kth_values(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    return [(x, without(x, dims_of(x, given(args, kwargs, 2, "dim", -1)), result))]


@dimensions("mode")
def modes(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, Places]]:
    x = main(args, kwargs)
    return [(x, without(x, dims_of(x, given(args, kwargs, 1, "dim", -1)), result))]


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
    _dimensions[_name] = _along(_at, _default)


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
    _dimensions[_name] = last_joined(_n)


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
    _dimensions[_name] = _permuted(_name)


def name_of(function: Callable[..., Any]) -> tuple[str, bool]:
    """The bare name of a function, and whether it writes into its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return name, False
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name), False
    if hasattr(function, "_schema"):  # an overload of torch.ops
        name = function._schema.name.rpartition("::")[2]  # pyright: ignore
    if name.startswith("__") and name.endswith("__"):
        bare = name.strip("_")
        if bare == "setitem":
            return bare, True
        if bare in (
            "iadd",
            "isub",
            "imul",
            "itruediv",
            "ipow",
            "iand",
            "ior",
            "ixor",
            "ifloordiv",
            "imod",
            "ilshift",
            "irshift",
            "imatmul",
        ):
            return bare[1:], True
        if bare in (
            "radd",
            "rsub",
            "rmul",
            "rtruediv",
            "rdiv",
            "rpow",
            "rfloordiv",
            "rmod",
            "rand",
            "ror",
            "rxor",
            "rlshift",
            "rrshift",
        ):
            return bare[1:], False
        return bare, False
    for family in ("fft_", "linalg_", "special_"):
        name = name.removeprefix(family)
    if name.endswith("_") and not name.endswith("__"):
        return name.removesuffix("_"), True
    return name, False


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch tags a function as one that takes numbers one by one."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def rule_of(function: Callable[..., Any]) -> Rule:
    """Find the rule of a function, by its name or as users registered it."""
    name, writes = name_of(function)
    if name == "__set__":
        return Rule(name, ATTRIBUTE)
    if name in ("requires_grad", "detach", "retain_grad", "share_memory", "pin_memory") and writes:
        writes = False
    module = getattr(function, "__module__", "") or ""
    home = getattr(getattr(function, "_schema", None), "name", "aten::").partition("::")[0]
    if home not in ("aten", "prims", "quantized"):
        return Rule(name, UNKNOWN, _registered.get(function), writes)
    if function in _registered:
        return Rule(name, DIMENSIONS, _registered[function], writes)
    if name == "unfold" and module == "torch.nn.functional":
        return Rule(name, DIMENSIONS, of_first, writes)
    if name in VIEWS:
        return Rule(name, VIEW, None, writes)
    if name in _dimensions:
        return Rule(name, DIMENSIONS, _dimensions[name], writes)
    if name in ADDINGS:
        return Rule(name, ADDING, None, writes)
    if name in MOVEMENTS:
        return Rule(name, MOVEMENT, None, writes)
    if name in ELEMENTWISE_TOO or _is_pointwise(name):
        return Rule(name, ELEMENTWISE, None, writes)
    if name in FACTORIES:
        return Rule(name, FACTORY, None, writes)
    if name in ATTRIBUTES:
        return Rule(name, ATTRIBUTE, None, writes)
    return Rule(name, UNKNOWN, None, writes)


_registered: dict[Callable[..., Any], Dimensions] = {}

known_rules: dict[Callable[..., Any], Rule] = {}
"""The rules of all functions that were ever seen."""


def register_rule(function: Callable[..., Any]) -> Callable[[Dimensions], Dimensions]:
    """Say what a function does to the dimensions of its arguments.

    The rule is called with the arguments of a call, `args` and `kwargs`, and one of its results. It
    returns for each tensor among the arguments a pair: the tensor, and for each of its dimensions
    the dimension of the result that it becomes, or `-1` if the function joins its elements.

    Args:
        function: As `__torch_function__` sees it, such as `torch.ops.library.op.default`.

    Returns:
        A decorator for the rule.

    Raises:
        TypeError: `function` is not callable.

    Cost: None but what the rule costs.

    Example:
        >>> import torch, pycoherence as pc
        >>> def reversed_words(x):
        ...     return x.flip(1)
        >>> @pc.register_rule(reversed_words)  # if torch called it
        ... def places(args, kwargs, result):
        ...     return [(args[0], range(args[0].dim()))]
    """
    if not callable(function):
        raise TypeError(f"expected a torch function, got {type(function).__name__}")

    def decorate(rule: Dimensions) -> Dimensions:
        _registered[function] = rule
        known_rules.pop(function, None)
        return rule

    return decorate
