"""Attention and Transformer layers, with the batch first and second."""

import warnings

import torch
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, uses

T, S = 3, 5
sequence, square = normal(B, T, 6), normal(B, B, 6)
words = ids(5, T)
pair = lambda: (torch.randn(B, T, 6), torch.randn(B, S, 6))  # noqa: E731
ATTENTION = Topic("`nn.MultiheadAttention`")
TRANSFORMER = Topic("Transformer layers")


def attention(width: int = 6, **options):
    return lambda: nn.MultiheadAttention(width, 2, batch_first=True, **options)


def to_itself(**options):
    return lambda m, x: m.a(x, x, x, **options)[0]


def to_another(**options):
    return lambda m, x, y: m.a(x, y, y, **options)[0]


def swapped(m, x):
    x = x.transpose(0, 1)
    return m.a(x, x, x)[0].transpose(0, 1)


def causal(**options):
    mask = nn.Transformer.generate_square_subsequent_mask
    return lambda m, x: m.a(x, x, x, attn_mask=mask(T, dtype=x.dtype), is_causal=True, **options)[0]


def padded(**options):
    def call(m, x, y):
        hidden = torch.arange(S).expand(len(x), S) > 2
        return m.a(x, y, y, key_padding_mask=hidden, **options)[0]

    return call


def encoder_layer(**options):
    return lambda: nn.TransformerEncoderLayer(6, 2, 5, 0.0, **options)


def decoder_layer(**options):
    return lambda: nn.TransformerDecoderLayer(6, 2, 5, 0.0, **options)


def encoder(**options):
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(6, 2, 5, 0.0, **options)
        nested = options == {"batch_first": True}
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=nested)

    return build


def transformer() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.Transformer(6, 2, 1, 1, 5, 0.0)


def in_time_order(m, x):
    """Models of words may have the time first throughout."""
    x = m.embedding(x).transpose(0, 1)
    x = x * 2 + m.position[: len(x)]
    return m.head(m.a(x)).transpose(0, 1)


def from_memory(m, x, y):
    return m.a(m.b(x), m.b(y))


def from_memory_in_time_order(m, x, y):
    x, y = (m.b(z).transpose(0, 1) for z in (x, y))
    return m.c(m.a(x, y)).transpose(0, 1)


ATTENTION.add("to itself", uses(to_itself(), a=attention()), sequence)
ATTENTION.add("`need_weights=False`", uses(to_itself(need_weights=False), a=attention()), sequence)
ATTENTION.add("to another sequence", uses(to_another(), a=attention()), pair)
ATTENTION.add(
    "three different inputs",
    uses(lambda m, x: m.a(x, x.tanh(), x.sin())[0], a=attention()),
    sequence,
)
ATTENTION.add(
    "`kdim` and `vdim`, separate projections",
    uses(lambda m, x, y: m.a(x, y, y[..., :3])[0], a=attention(kdim=6, vdim=3)),
    pair,
)
ATTENTION.add(
    "`kdim` and `vdim` without biases",
    uses(lambda m, x, y: m.a(x, y, y[..., :3])[0], a=attention(kdim=6, vdim=3, bias=False)),
    pair,
)
ATTENTION.add("`bias=False`", uses(to_itself(), a=attention(bias=False)), sequence)
ATTENTION.add("`batch_first=False`", uses(swapped, a=lambda: nn.MultiheadAttention(6, 2)), sequence)
ATTENTION.add(
    "`batch_first=False`, `T = B`", uses(swapped, a=lambda: nn.MultiheadAttention(6, 2)), square
)
ATTENTION.add("`T = B`", uses(to_itself(), a=attention()), square)
for weights in (True, False):
    for name, build in (
        (
            "`add_bias_kv` and a padding mask",
            uses(padded(need_weights=weights), a=attention(add_bias_kv=True)),
        ),
        (
            "`add_zero_attn` and a padding mask",
            uses(padded(need_weights=weights), a=attention(add_zero_attn=True)),
        ),
    ):
        ATTENTION.add(f"{name}{', `need_weights=False`' * (not weights)}", build, pair)
ATTENTION.add("causal", uses(causal(), a=attention()), sequence)
ATTENTION.add(
    "causal, `need_weights=False`", uses(causal(need_weights=False), a=attention()), sequence
)
ATTENTION.add(
    "without a batch, `[T, E]`",
    uses(lambda m, x: m.a(x[0], x[0], x[0])[0], a=attention()),
    sequence,
    "refused",
    says="no batch dimension",
)
for when, options in (("", {}), (", `norm_first`", {"norm_first": True})):
    for name, build in (
        ("`nn.TransformerEncoderLayer`", encoder_layer(batch_first=True, **options)),
    ):
        TRANSFORMER.add(f"{name}{when}", uses(lambda m, x: m.a(x), a=build), sequence)
TRANSFORMER.add(
    "`nn.TransformerEncoder`, `activation=gelu`, no biases",
    uses(lambda m, x: m.a(x), a=encoder(batch_first=True, activation="gelu", bias=False)),
    sequence,
)
for more, norm_first, inputs in (
    ("", False, words),
    (", `norm_first`", True, words),
    (", `T = B`", True, ids(5, B)),
):
    TRANSFORMER.add(
        f"the time first{more}",
        uses(
            in_time_order,
            embedding=embedding(5, 6),
            position=normal(7, 1, 6),
            a=encoder(norm_first=norm_first),
            head=linear(6, 3),
        ),
        inputs,
    )
TRANSFORMER.add(
    "`nn.TransformerEncoderLayer` alone, the time first",
    uses(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=encoder_layer(norm_first=True)),
    square,
)
for more, options in (
    ("", {"batch_first": True}),
    (", `norm_first`", {"batch_first": True, "norm_first": True}),
    (", the time first", {}),
    (", the time first, `norm_first`", {"norm_first": True}),
):
    TRANSFORMER.add(
        f"`nn.TransformerDecoderLayer`{more}",
        uses(
            from_memory if options.get("batch_first") else from_memory_in_time_order,
            a=decoder_layer(**options),
            b=linear(6, 6),
            c=linear(6, 3),
        ),
        pair,
    )
TRANSFORMER.add(
    "`nn.Transformer`, the time first",
    uses(lambda m, x, y: m.a(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1), a=transformer),
    pair,
)
TRANSFORMER.add(
    "time-first words into an embedding, then attention",
    uses(
        lambda m, x: m.a(m.embedding(x.T)).transpose(0, 1),
        embedding=embedding(5, 6),
        a=encoder(),
    ),
    ids(5, B),
)


@ATTENTION("`batch_first=False`, to another sequence", pair, a=lambda: nn.MultiheadAttention(6, 2))
def swapped_to_another(m, x, y):
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    return m.a(x, y, y, need_weights=False)[0].transpose(0, 1)


@ATTENTION(
    "a mask for each head of each example", lambda: (*pair(), torch.rand(B, 2, T, S)), a=attention()
)
def each_head_its_own(m, x, y, mask):
    return m.a(x, y, y, attn_mask=mask.flatten(0, 1) > 0.6)[0]


@ATTENTION("the weights in the loss", sequence, a=attention())
def weights_too(m, x):
    found, weights = m.a(x, x, x, average_attn_weights=False)
    return torch.cat([found.flatten(1), weights.flatten(1)], 1)


@ATTENTION(
    "learned queries, repeated over the batch",
    sequence,
    note="Cheaper with `batch_first=True` and `expand`.",
    a=lambda: nn.MultiheadAttention(6, 2),
    queries=normal(S, 6),
)
def queries(m, x):
    asked = m.queries.unsqueeze(1).repeat(1, len(x), 1)
    x = x.transpose(0, 1)
    return m.a(asked, x, x)[0].transpose(0, 1)


@ATTENTION("a learned mask", pair, a=attention(), mask=normal(T, S))
def learned_mask(m, x, y):
    return m.a(x, y, y, attn_mask=m.mask)[0]


@TRANSFORMER(
    "`nn.TransformerEncoder` in eval mode, padded",
    sequence,
    note="Torch takes its fast path only where no gradients are.",
    a=lambda: encoder(batch_first=True)().eval(),
)
def encode_padded(m, x):
    return m.a(x, src_key_padding_mask=torch.arange(T).expand(len(x), T) > 1)
