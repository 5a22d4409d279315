"""Finds words for what was wrong with the arguments of a call that failed."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from pycoherence.ops.core.spec import OpSpec

_KINDS = {
    "Tensor": ("a tensor", Tensor),
    "int": ("an integer", (int, torch.SymInt)),
    "float": ("a number", (int, float)),
    "bool": ("True or False", bool),
    "str": ("a string", str),
}


def raise_explained(spec: OpSpec, args: tuple[Any, ...], error: Exception) -> NoReturn:
    """Raise what a failed call of an op should: the error itself if nothing better can be said.

    Args:
        spec: The op.
        args: The arguments of the call.
        error: The error that it raised.

    Raises:
        TypeError: An argument is not of the kind that the schema says.
        RuntimeError: The words of torch, where a native kernel has lost them.
    """
    better = _explained(spec, args, error)
    if better is error:
        raise error
    raise better from None


def _explained(spec: OpSpec, args: tuple[Any, ...], error: Exception) -> Exception:
    for argument, value in zip(torch._C.parse_schema(spec.schema).arguments, args, strict=False):
        wrong = _wrong(str(argument.type), value)
        if wrong is not None:
            return TypeError(f"{spec.name}: expected {argument.name} to be {wrong}")
    if "API call failed" not in str(error):
        return error
    # A native kernel loses the words of torch, which has refused to allocate a result, say.
    try:
        spec.fake(*args)
    except (RuntimeError, MemoryError) as said:
        return said
    return error


def _wrong(kind: str, value: Any) -> str | None:
    """The words for how a value differs from its kind in the schema."""
    if kind.startswith("Optional["):
        inner = kind.removeprefix("Optional[").removesuffix("]")
        wrong = None if value is None else _wrong(inner, value)
        return wrong and wrong.replace(", got", " or None, got", 1)
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        words, _ = _KINDS[inner]
        if not isinstance(value, (list, tuple)):
            return f"a list, each {words}, got {type(value).__name__}"
        wrong = next((found for x in value if (found := _wrong(inner, x)) is not None), None)
        return wrong and f"a list, each {wrong}"
    words, types = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        return f"{words}, got {type(value).__name__}"
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"a dense tensor, got a {layout.lstrip('_')} one; convert it with to_dense()"
    return None
