"""Layers of torch.nn and functions that models call with parameters of their own."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Row, normal, uses

T = 3
features, sequence, images = normal(B, 6), normal(B, T, 6), normal(B, 2, 5, 7)
square = normal(B, B, 6)

LINEAR = "Linear layers"
CONVOLUTIONS = "Convolutions"
LOOKUPS = "Embeddings"
EINSUM = "`torch.einsum`"
OTHERS = "Other layers"


def ids(vocabulary: int = 5, length: int = T):
    return lambda: torch.randint(vocabulary, (B, length))


class Conv1D(nn.Module):
    """As in the GPT-2 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        size = (*x.shape[:-1], 5)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def flattened(m, x):
    return m.b(F.gelu(m.a(x.reshape(-1, 6))) * m.scale + m.shift).view(len(x), T, -1)


def flattened_images(m, x):
    return m.a(x.flatten(0, 1)).unflatten(0, (-1, T))


def bag(**options):
    return lambda: nn.EmbeddingBag(5, 6, **options)


def ragged(m, x):
    return m.a(x, torch.tensor([0, 2, 2, 5]))


def weighted(m, x, w):
    return m.a(x, per_sample_weights=w)


def transposed(n: int, *args, **options):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return lambda: kind(*args, **options)


def product(equation: str, *shape: int):
    return uses(lambda m, x: torch.einsum(equation, x, m.p), p=normal(*shape))


ROWS = [
    Row(LINEAR, "`nn.Linear`, one position", lambda: nn.Linear(6, 5), features),
    Row(LINEAR, "`nn.Linear`, 4-D input", lambda: nn.Linear(6, 5), normal(B, 2, T, 6)),
    Row(LINEAR, "`nn.Linear` without bias", lambda: nn.Linear(6, 5, bias=False), sequence),
    Row(LINEAR, "`T = B`", lambda: nn.Linear(6, 5), square),
    Row(LINEAR, "Conv1D of transformers, which flattens", Conv1D, sequence),
    Row(
        LINEAR,
        "positions folded into the batch, `x.reshape(B * T, D)`",
        uses(
            flattened,
            a=lambda: nn.Linear(6, 5),
            b=lambda: nn.Linear(5, 2),
            scale=normal(5),
            shift=normal(),
        ),
        sequence,
        note="As long as rows stay where they are from there to the layer.",
    ),
    Row(
        LINEAR,
        "positions folded after a transpose",
        uses(
            lambda m, x: m.a(m.b(x).transpose(0, 1).reshape(-1, 6)),
            a=lambda: nn.Linear(6, 5),
            b=lambda: nn.Linear(6, 6),
        ),
        sequence,
    ),
    Row(
        LINEAR,
        "`nn.Bilinear`",
        uses(lambda m, x: m.a(x, x.tanh()), a=lambda: nn.Bilinear(6, 6, 2)),
        sequence,
        note="Pairs of inputs are made.",
    ),
    Row(
        CONVOLUTIONS,
        "frames folded into the batch",
        uses(flattened_images, a=lambda: nn.Conv2d(2, 3, 2)),
        normal(B, T, 2, 5, 7),
    ),
    Row(CONVOLUTIONS, "`nn.Conv2d`, `channels_last`", lambda: nn.Conv2d(2, 3, 3), images),
    Row(
        CONVOLUTIONS,
        "depthwise, stride, dilation",
        lambda: nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2),
        images,
    ),
    *(
        Row(
            CONVOLUTIONS,
            f'`padding_mode="{mode}"`',
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
            images,
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    Row(
        CONVOLUTIONS,
        '`padding="same"`',
        lambda: nn.Conv2d(2, 3, 3, padding="same"),
        images,
    ),
    Row(CONVOLUTIONS, "`nn.ConvTranspose1d`", transposed(1, 3, 5, 3), sequence),
    Row(
        CONVOLUTIONS,
        "`nn.ConvTranspose1d` with all options",
        transposed(1, 3, 6, 3, stride=2, padding=1, output_padding=1, groups=3, dilation=2),
        sequence,
    ),
    Row(
        CONVOLUTIONS,
        "`nn.ConvTranspose1d`, more output padding than stride",
        transposed(1, 3, 6, 2, stride=2, output_padding=2, dilation=3),
        sequence,
    ),
    Row(CONVOLUTIONS, "`nn.ConvTranspose2d`", transposed(2, 2, 3, (2, 3), stride=2), images),
    Row(
        CONVOLUTIONS,
        "`nn.ConvTranspose3d`, depthwise",
        transposed(3, 2, 2, 2, groups=2),
        normal(B, 2, 3, 2, 3),
    ),
    Row(LOOKUPS, "`nn.Embedding`", lambda: nn.Embedding(5, 6), ids()),
    Row(LOOKUPS, "`padding_idx`", lambda: nn.Embedding(5, 6, padding_idx=1), ids(length=9)),
    Row(LOOKUPS, "`nn.EmbeddingBag`, mean", bag(), ids()),
    Row(LOOKUPS, "`nn.EmbeddingBag`, sum", bag(mode="sum", padding_idx=2), ids(length=9)),
    Row(LOOKUPS, "`nn.EmbeddingBag`, mean with padding", bag(padding_idx=-1), ids(length=9)),
    Row(LOOKUPS, "`nn.EmbeddingBag`, max", bag(mode="max"), ids()),
    Row(
        LOOKUPS,
        "`nn.EmbeddingBag` with weights",
        uses(weighted, a=bag(mode="sum")),
        lambda: (ids()(), torch.rand(B, T)),
    ),
    Row(EINSUM, '`"btd,od->bto"`', product("btd,od->bto", 5, 6), sequence),
    Row(EINSUM, '`"btd,dhk->bhtk"`', product("btd,dhk->bhtk", 6, 2, 5), sequence),
    Row(EINSUM, '`"bthk,hko->bto"`', product("bthk,hko->bto", 2, 5, 3), normal(B, T, 2, 5)),
    Row(
        EINSUM,
        "the parameter first",
        uses(lambda m, x: torch.einsum("do,bd->ob", m.p, x).T, p=normal(6, 5)),
        features,
    ),
    Row(
        EINSUM,
        "a weight for each head",
        product("bthk,hko->btho", 2, 5, 3),
        normal(B, T, 2, 5),
    ),
    Row(OTHERS, "`nn.PReLU`", lambda: nn.PReLU(3), sequence),
    Row(OTHERS, "`nn.PReLU`, one slope", lambda: nn.PReLU(), features),
    Row(
        OTHERS,
        "any function of a parameter that was expanded over the batch, such as `torch.cdist`",
        uses(lambda m, x: torch.cdist(x, m.p.expand(len(x), -1, -1)), p=normal(5, 6)),
        sequence,
    ),
    Row(
        OTHERS,
        "`F.cosine_similarity` with a parameter",
        uses(lambda m, x: F.cosine_similarity(x, m.p, dim=-1), p=normal(6)),
        sequence,
    ),
    Row(
        OTHERS,
        "any other function, such as `torch.trapezoid`",
        uses(lambda m, x: torch.trapezoid(x, m.p), p=normal(6)),
        sequence,
        "fallback",
    ),
]
