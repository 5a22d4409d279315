"""Rules of what torch's functions do to the dimensions of their arguments, by name.

A function is looked up by its bare name, so that `torch.add`, `Tensor.add_`, `Tensor.__iadd__` and
`torch.ops.aten.add` are one. Functions that torch tags as pointwise need no line here. A function
that nobody describes is `None` here: it loses the owner, and its error says so.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from pycoherence.capture.dimensions import Dimensions, known_dimensions, of_first

VIEW, ELEMENTWISE, MOVEMENT, DIMENSIONS, ADDING, ATTRIBUTE, FACTORY, UNKNOWN = range(8)


class Rule(NamedTuple):
    """The rule of a function.

    Attributes:
        name: Bare, such as `add`.
        kind: One of the constants of this file.
        dimensions: For kind `DIMENSIONS`, the rule that gives the places of each argument.
        writes: Whether it changes its first argument in place.
        lasts: Whether owners of its results that are regular depend on those of its arguments,
            on shapes and on plain arguments alone, so that its answers can be kept.
    """

    name: str
    kind: int
    dimensions: Dimensions | None = None
    writes: bool = False
    lasts: bool = False


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
        return Rule(name, DIMENSIONS, of_first, writes, lasts=True)
    if name in VIEWS:
        return Rule(name, VIEW, None, writes)
    if name in known_dimensions:
        return Rule(name, DIMENSIONS, known_dimensions[name], writes, lasts=True)
    if name in ADDINGS:
        return Rule(name, ADDING, None, writes)
    if name in MOVEMENTS:
        return Rule(name, MOVEMENT, None, writes, lasts=name != "as_strided")
    if name in ELEMENTWISE_TOO or _is_pointwise(name):
        return Rule(name, ELEMENTWISE, None, writes, lasts=True)
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
        function: The function that `__torch_function__` sees, such as
            `torch.ops.library.op.default`.

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
