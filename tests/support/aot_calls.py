"""What `aot.py` compiles: calls that between them hit every row of the kernels' tables of tiles.

All calls of an op are compiled for bfloat16 on one GPU, the first of them for all GPUs and all
dtypes; one is enough for float16.
"""

from collections.abc import Iterator

import torch

from pycoherence.triton_kernels.affine_reduce import affine_reduce
from pycoherence.triton_kernels.conv_reduce import conv_reduce
from pycoherence.triton_kernels.linear_reduce import linear_reduce
from support import op_calls as op
from support.op_calls import ALL, BOTH, CONV2D, MOMENTS, NORMS, SUM, Call, Source

KINDS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Of numbers; float32 where torch allows TensorFloat-32, and where not."""

THOROUGH = ("bfloat16", 90)

TOGETHER = "together"
"""Stands for several ops at once, with gradients of the dtype and with norms of them."""


LARGE = ((7, 7), (1, 1), (3, 3), (1, 1))


def calls(name: str, kind: str, capability: int) -> Iterator[Call]:
    """The calls of an op to compile."""
    new = Source("meta", KINDS[kind])
    first, more = _CALLS[name]
    if kind == "float16":
        yield next(first(new))
        return
    yield from first(new)
    if (kind, capability) == THOROUGH:
        yield from more(new)


def _linear_reduce(new: Source) -> Iterator[Call]:
    yield op.linear_reduce(new, BOTH, 32, 512, 768, 768)
    yield op.linear_reduce(new, NORMS, 32, 512, 768, 768)
    yield op.linear_reduce(new, MOMENTS, 32, 512, 4096, 4096)
    yield op.linear_reduce(new, NORMS, 2048, 1, 4096, 4096)


def _more_linear_reduce(new: Source) -> Iterator[Call]:
    yield op.linear_reduce(new, ALL, 32, 512, 4096, 4096)
    yield op.linear_reduce(new, BOTH, 8, 1024, 768, 50257)
    yield op.linear_reduce(new, BOTH, 8, 4096, 768, 768)
    yield op.linear_reduce(new, NORMS, 8, 16, 768, 768)
    yield op.linear_reduce(new, SUM, 256, 1, 784, 1024, coef=True)
    yield op.linear_reduce(new, MOMENTS, 256, 1, 1024, 10)
    yield op.linear_reduce(new, ALL, 4, 3, 5, 7)


def _conv_reduce(new: Source) -> Iterator[Call]:
    yield op.conv_reduce(new, BOTH, (128, 64, 56, 56), 64)
    yield op.conv_reduce(new, BOTH, (128, 256, 14, 14), 256, last=True)
    yield op.conv_reduce(new, NORMS, (128, 512, 7, 7), 512)
    yield op.conv_reduce(new, BOTH, (32, 128, 28, 28), 128, CONV2D, 128)


def _more_conv_reduce(new: Source) -> Iterator[Call]:
    stem = ((7, 7), (2, 2), (3, 3), (1, 1))
    point = ((1, 1), (2, 2), (0, 0), (1, 1))
    yield op.conv_reduce(new, BOTH, (128, 3, 224, 224), 64, stem)
    yield op.conv_reduce(new, BOTH, (128, 64, 56, 56), 128, point)
    yield op.conv_reduce(new, ALL, (32, 128, 28, 28), 128, CONV2D, 4)
    yield op.conv_reduce(new, BOTH, (32, 128, 28, 28), 128, CONV2D, 128, last=True)
    yield op.conv_reduce(new, ALL, (1, 8, 1000, 1000), 16, CONV2D, 8)
    yield op.conv_reduce(new, BOTH, (32, 384, 14, 14), 384, LARGE, 384)
    yield op.conv_reduce(new, BOTH, (32, 384, 14, 14), 384, LARGE, 384, last=True)
    yield op.conv_reduce(
        new, SUM, (4, 16, 16, 32, 32), 16, ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3), 16
    )
    yield op.conv_reduce(new, BOTH, (16, 64, 1000), 96, ((5,), (1,), (2,), (1,)))
    yield op.conv_reduce(
        new, BOTH, (4, 16, 16, 32, 32), 32, ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3)
    )


def _affine_reduce(new: Source) -> Iterator[Call]:
    yield op.affine_reduce(new, BOTH, "layer", 8, 1024, 768)
    yield op.affine_reduce(new, BOTH, "bias", 8, 1024, 768)


def _more_affine_reduce(new: Source) -> Iterator[Call]:
    yield op.affine_reduce(new, BOTH, "group", 128, 3136, 64)
    yield op.affine_reduce(new, ALL, "rms", 8, 1024, 768)
    yield op.affine_reduce(new, BOTH, "bias", 8, 1024, 50257)
    yield op.affine_reduce(new, BOTH, "bias", 256, 1, 10)
    yield op.affine_reduce(new, ALL, "bias", 2048, 1, 4096)


def _linear_gram(new: Source) -> Iterator[Call]:
    yield op.linear_gram(new, 2048, 1, 4096, 4096)
    yield op.linear_gram(new, 32, 512, 768, 768)
    yield op.linear_gram(new, 8, 64, 4096, 4096)


def _more_linear_gram(new: Source) -> Iterator[Call]:
    yield op.linear_gram(new, 256, 1, 784, 1024)
    yield op.linear_gram(new, 256, 1, 1024, 10, 100)
    yield op.linear_gram(new, 128, 512, 4096, 4096, 64)
    yield op.linear_gram(new, 3, 5, 7, 9)


def _conv_gram(new: Source) -> Iterator[Call]:
    yield op.conv_gram(new, None, (128, 64, 56, 56), 64)
    yield op.conv_gram(new, None, (128, 512, 7, 7), 512)


def _more_conv_gram(new: Source) -> Iterator[Call]:
    yield op.conv_gram(new, 16, (32, 128, 28, 28), 128, CONV2D, 4)
    yield op.conv_gram(new, None, (16, 64, 1000), 96, ((5,), (1,), (2,), (1,)))


def _dense_gram(new: Source) -> Iterator[Call]:
    yield op.dense_gram(new, 128, 10**6)
    yield op.dense_gram(new, 32, 10**5, 64)


def _linear_order(new: Source) -> Iterator[Call]:
    yield op.linear_order(new, "median_of_means", 3.0, 32, 512, 768, 768)
    yield op.linear_order(new, "winsorized_mean", 2.0, 32, 512, 768, 768)


def _conv_order(new: Source) -> Iterator[Call]:
    yield op.conv_order(new, "median_of_means", 3.0, (32, 64, 56, 56), 64)
    yield op.conv_order(new, "winsorized_mean", 2.0, (32, 64, 56, 56), 64)


def _together(*many: Call) -> Call:
    """Ops at once, by the names of their calls."""
    names = [label for label, _ in many]
    ops = [_REDUCE[len(args)] for _, args in many]
    each = [(function, args) for function, (_, args) in zip(ops, many, strict=True)]
    return " + ".join(names), (each, [args[0].dtype for _, args in many], True)


# By the number of arguments.
_REDUCE = {5: linear_reduce, 7: affine_reduce, 10: conv_reduce}


def _layers(new: Source) -> Iterator[Call]:
    bias = op.affine_reduce(new, BOTH, "bias", 8, 1024, 768)
    yield _together(op.linear_reduce(new, BOTH, 8, 1024, 768, 768), bias)
    yield _together(op.affine_reduce(new, BOTH, "layer", 8, 1024, 768), bias)
    one = op.linear_reduce(new, BOTH, 128, 1, 768, 768)
    yield _together(one, op.affine_reduce(new, BOTH, "bias", 128, 1, 768))


def _more_layers(new: Source) -> Iterator[Call]:
    yield _together(
        op.conv_reduce(new, BOTH, (32, 64, 28, 28), 64),
        op.affine_reduce(new, BOTH, "bias", 32, 784, 64),
    )
    yield _together(
        op.linear_reduce(new, BOTH, 32, 512, 4096, 4096),
        op.affine_reduce(new, BOTH, "bias", 2048, 1, 50000),
        *(op.affine_reduce(new, MOMENTS, "rms", 8, 64, 768) for _ in range(9)),
    )


def _no_more(new: Source) -> Iterator[Call]:
    return iter(())


_CALLS = {
    "affine_reduce": (_affine_reduce, _more_affine_reduce),
    "conv_gram": (_conv_gram, _more_conv_gram),
    "conv_order": (_conv_order, _no_more),
    "conv_reduce": (_conv_reduce, _more_conv_reduce),
    "dense_gram": (_dense_gram, _no_more),
    "linear_gram": (_linear_gram, _more_linear_gram),
    "linear_order": (_linear_order, _no_more),
    "linear_reduce": (_linear_reduce, _more_linear_reduce),
    TOGETHER: (_layers, _more_layers),
}
"""By op, the first calls and the others."""
