"""Layers of torch.nn and functions that models call with parameters of their own."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, uses

T = 3
features, sequence, images = normal(B, 6), normal(B, T, 6), normal(B, 2, 5, 7)
square = normal(B, B, 6)
LINEAR = Topic("Linear layers")
CONVOLUTIONS = Topic("Convolutions")
LOOKUPS = Topic("Embeddings")
EINSUM = Topic("`torch.einsum`")
OTHERS = Topic("Other layers")


class Conv1D(nn.Module):
    """The convolution of GPT-2 in transformers, which is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        size = (*x.shape[:-1], 5)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def bag(**options):
    return lambda: nn.EmbeddingBag(5, 6, **options)


def transposed(n: int, *args, **options):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return lambda: kind(*args, **options)


def product(equation: str, *shape: int):
    return uses(lambda m, x: torch.einsum(equation, x, m.p), p=normal(*shape))


LINEAR.add("`nn.Linear`, one position", linear(6, 5), features)
LINEAR.add("`nn.Linear`, 4-D input", linear(6, 5), normal(B, 2, T, 6))
LINEAR.add("`nn.Linear` without bias", linear(6, 5, False), sequence)
LINEAR.add("`T = B`", linear(6, 5), square)
LINEAR.add("Conv1D of transformers, which flattens", Conv1D, sequence)
LINEAR.add(
    "positions folded after a transpose",
    uses(
        lambda m, x: m.a(m.b(x).transpose(0, 1).reshape(-1, 6)),
        a=linear(6, 5),
        b=linear(6, 6),
    ),
    sequence,
)
LINEAR.add(
    "`nn.Bilinear`",
    uses(lambda m, x: m.a(x, x.tanh()), a=lambda: nn.Bilinear(6, 6, 2)),
    sequence,
    note="Pairs of inputs are made.",
)
CONVOLUTIONS.add("`nn.Conv2d`, `channels_last`", lambda: nn.Conv2d(2, 3, 3), images)
CONVOLUTIONS.add(
    "depthwise, stride, dilation",
    lambda: nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2),
    images,
)
for mode in ("zeros", "reflect", "replicate", "circular"):
    CONVOLUTIONS.add(
        f'`padding_mode="{mode}"`',
        lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
        images,
    )
CONVOLUTIONS.add('`padding="same"`', lambda: nn.Conv2d(2, 3, 3, padding="same"), images)
CONVOLUTIONS.add("`nn.ConvTranspose1d`", transposed(1, 3, 5, 3), sequence)
CONVOLUTIONS.add(
    "`nn.ConvTranspose1d` with all options",
    transposed(1, 3, 6, 3, stride=2, padding=1, output_padding=1, groups=3, dilation=2),
    sequence,
)
CONVOLUTIONS.add(
    "`nn.ConvTranspose1d`, more output padding than stride",
    transposed(1, 3, 6, 2, stride=2, output_padding=2, dilation=3),
    sequence,
)
CONVOLUTIONS.add("`nn.ConvTranspose2d`", transposed(2, 2, 3, (2, 3), stride=2), images)
CONVOLUTIONS.add(
    "`nn.ConvTranspose3d`, depthwise", transposed(3, 2, 2, 2, groups=2), normal(B, 2, 3, 2, 3)
)
LOOKUPS.add("`nn.Embedding`", embedding(5, 6), ids(5, T))
LOOKUPS.add("`padding_idx`", lambda: nn.Embedding(5, 6, padding_idx=1), ids(5, 9))
LOOKUPS.add("`nn.EmbeddingBag`, mean", bag(), ids(5, T))
LOOKUPS.add("`nn.EmbeddingBag`, sum", bag(mode="sum", padding_idx=2), ids(5, 9))
LOOKUPS.add("`nn.EmbeddingBag`, mean with padding", bag(padding_idx=-1), ids(5, 9))
LOOKUPS.add("`nn.EmbeddingBag`, max", bag(mode="max"), ids(5, T))
EINSUM.add('`"btd,od->bto"`', product("btd,od->bto", 5, 6), sequence)
EINSUM.add('`"btd,dhk->bhtk"`', product("btd,dhk->bhtk", 6, 2, 5), sequence)
EINSUM.add('`"bthk,hko->bto"`', product("bthk,hko->bto", 2, 5, 3), normal(B, T, 2, 5))
EINSUM.add(
    "the parameter first",
    uses(lambda m, x: torch.einsum("do,bd->ob", m.p, x).T, p=normal(6, 5)),
    features,
)
EINSUM.add("a weight for each head", product("bthk,hko->btho", 2, 5, 3), normal(B, T, 2, 5))
OTHERS.add("`nn.PReLU`", lambda: nn.PReLU(3), sequence)
OTHERS.add("`nn.PReLU`, one slope", lambda: nn.PReLU(), features)
OTHERS.add(
    "any function of a parameter that was expanded over the batch, such as `torch.cdist`",
    uses(lambda m, x: torch.cdist(x, m.p.expand(len(x), -1, -1)), p=normal(5, 6)),
    sequence,
)
OTHERS.add(
    "`F.cosine_similarity` with a parameter",
    uses(lambda m, x: F.cosine_similarity(x, m.p, dim=-1), p=normal(6)),
    sequence,
)
OTHERS.add(
    "any other function, such as `torch.trapezoid`",
    uses(lambda m, x: torch.trapezoid(x, m.p), p=normal(6)),
    sequence,
    "fallback",
)


@LINEAR(
    "positions folded into the batch, `x.reshape(B * T, D)`",
    sequence,
    note="As long as rows stay where they are from there to the layer.",
    a=linear(6, 5),
    b=linear(5, 2),
    scale=normal(5),
    shift=normal(),
)
def flattened(m, x):
    return m.b(F.gelu(m.a(x.reshape(-1, 6))) * m.scale + m.shift).view(len(x), T, -1)


@CONVOLUTIONS("frames folded into the batch", normal(B, T, 2, 5, 7), a=lambda: nn.Conv2d(2, 3, 2))
def flattened_images(m, x):
    return m.a(x.flatten(0, 1)).unflatten(0, (-1, T))


@LOOKUPS(
    "`nn.EmbeddingBag` with weights", lambda: (ids(5, T)(), torch.rand(B, T)), a=bag(mode="sum")
)
def weighted(m, x, w):
    return m.a(x, per_sample_weights=w)
