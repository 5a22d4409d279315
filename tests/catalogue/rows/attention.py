"""Attention and Transformer layers, with the batch first and second."""

import warnings

import torch
from torch import nn

from catalogue.row import B, Row, normal, uses

T, S = 3, 5
sequence, square = normal(B, T, 6), normal(B, B, 6)
pair = lambda: (torch.randn(B, T, 6), torch.randn(B, S, 6))  # noqa: E731

ATTENTION = "`nn.MultiheadAttention`"
TRANSFORMER = "Transformer layers"


def attention(width: int = 6, **options):
    return lambda: nn.MultiheadAttention(width, 2, batch_first=True, **options)


def to_itself(**options):
    return lambda m, x: m.a(x, x, x, **options)[0]


def to_another(**options):
    return lambda m, x, y: m.a(x, y, y, **options)[0]


def swapped(m, x):
    x = x.transpose(0, 1)
    return m.a(x, x, x)[0].transpose(0, 1)


def swapped_to_another(m, x, y):
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    return m.a(x, y, y, need_weights=False)[0].transpose(0, 1)


def causal(**options):
    mask = nn.Transformer.generate_square_subsequent_mask
    return lambda m, x: m.a(x, x, x, attn_mask=mask(T, dtype=x.dtype), is_causal=True, **options)[0]


def padded(**options):
    def call(m, x, y):
        hidden = torch.arange(S).expand(len(x), S) > 2
        return m.a(x, y, y, key_padding_mask=hidden, **options)[0]

    return call


def each_head_its_own(m, x, y, mask):
    return m.a(x, y, y, attn_mask=mask.flatten(0, 1) > 0.6)[0]


def weights_too(m, x):
    found, weights = m.a(x, x, x, average_attn_weights=False)
    return torch.cat([found.flatten(1), weights.flatten(1)], 1)


def queries(m, x):
    asked = m.queries.unsqueeze(1).repeat(1, len(x), 1)
    x = x.transpose(0, 1)
    return m.a(asked, x, x)[0].transpose(0, 1)


def learned_mask(m, x, y):
    return m.a(x, y, y, attn_mask=m.mask)[0]


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
    """As in models of words that have the time first throughout."""
    x = m.embedding(x).transpose(0, 1)
    x = x * 2 + m.position[: len(x)]
    return m.head(m.a(x)).transpose(0, 1)


def words():
    return torch.randint(5, (B, T))


def encode_padded(m, x):
    return m.a(x, src_key_padding_mask=torch.arange(T).expand(len(x), T) > 1)


def from_memory(m, x, y):
    return m.a(m.b(x), m.b(y))


def from_memory_in_time_order(m, x, y):
    x, y = (m.b(z).transpose(0, 1) for z in (x, y))
    return m.c(m.a(x, y)).transpose(0, 1)


ROWS = [
    Row(ATTENTION, "to itself", uses(to_itself(), a=attention()), sequence),
    Row(
        ATTENTION,
        "`need_weights=False`",
        uses(to_itself(need_weights=False), a=attention()),
        sequence,
    ),
    Row(ATTENTION, "the weights in the loss", uses(weights_too, a=attention()), sequence),
    Row(ATTENTION, "to another sequence", uses(to_another(), a=attention()), pair),
    Row(
        ATTENTION,
        "three different inputs",
        uses(lambda m, x: m.a(x, x.tanh(), x.sin())[0], a=attention()),
        sequence,
    ),
    Row(
        ATTENTION,
        "`kdim` and `vdim`, separate projections",
        uses(lambda m, x, y: m.a(x, y, y[..., :3])[0], a=attention(kdim=6, vdim=3)),
        pair,
    ),
    Row(
        ATTENTION,
        "`kdim` and `vdim` without biases",
        uses(lambda m, x, y: m.a(x, y, y[..., :3])[0], a=attention(kdim=6, vdim=3, bias=False)),
        pair,
    ),
    Row(ATTENTION, "`bias=False`", uses(to_itself(), a=attention(bias=False)), sequence),
    Row(
        ATTENTION,
        "`batch_first=False`",
        uses(swapped, a=lambda: nn.MultiheadAttention(6, 2)),
        sequence,
    ),
    Row(
        ATTENTION,
        "`batch_first=False`, to another sequence",
        uses(swapped_to_another, a=lambda: nn.MultiheadAttention(6, 2)),
        pair,
    ),
    Row(
        ATTENTION,
        "`batch_first=False`, `T = B`",
        uses(swapped, a=lambda: nn.MultiheadAttention(6, 2)),
        square,
    ),
    Row(ATTENTION, "`T = B`", uses(to_itself(), a=attention()), square),
    *(
        Row(ATTENTION, f"{name}{', `need_weights=False`' * (not weights)}", build, pair)
        for weights in (True, False)
        for name, build in (
            (
                "`add_bias_kv` and a padding mask",
                uses(padded(need_weights=weights), a=attention(add_bias_kv=True)),
            ),
            (
                "`add_zero_attn` and a padding mask",
                uses(padded(need_weights=weights), a=attention(add_zero_attn=True)),
            ),
        )
    ),
    Row(ATTENTION, "causal", uses(causal(), a=attention()), sequence),
    Row(
        ATTENTION,
        "causal, `need_weights=False`",
        uses(causal(need_weights=False), a=attention()),
        sequence,
    ),
    Row(
        ATTENTION,
        "a mask for each head of each example",
        uses(each_head_its_own, a=attention()),
        lambda: (*pair(), torch.rand(B, 2, T, S)),
    ),
    Row(
        ATTENTION,
        "a learned mask",
        uses(learned_mask, a=attention(), mask=normal(T, S)),
        pair,
    ),
    Row(
        ATTENTION,
        "learned queries, repeated over the batch",
        uses(queries, a=lambda: nn.MultiheadAttention(6, 2), queries=normal(S, 6)),
        sequence,
        note="Cheaper with `batch_first=True` and `expand`.",
    ),
    Row(
        ATTENTION,
        "without a batch, `[T, E]`",
        uses(lambda m, x: m.a(x[0], x[0], x[0])[0], a=attention()),
        sequence,
        "refused",
        says="no batch dimension",
    ),
    *(
        Row(TRANSFORMER, f"{name}{when}", uses(lambda m, x: m.a(x), a=build), sequence)
        for when, options in (("", {}), (", `norm_first`", {"norm_first": True}))
        for name, build in (
            ("`nn.TransformerEncoderLayer`", encoder_layer(batch_first=True, **options)),
        )
    ),
    Row(
        TRANSFORMER,
        "`nn.TransformerEncoder`, `activation=gelu`, no biases",
        uses(lambda m, x: m.a(x), a=encoder(batch_first=True, activation="gelu", bias=False)),
        sequence,
    ),
    Row(
        TRANSFORMER,
        "`nn.TransformerEncoder` in eval mode, padded",
        uses(encode_padded, a=lambda: encoder(batch_first=True)().eval()),
        sequence,
        note="Torch takes its fast path only where no gradients are.",
    ),
    *(
        Row(
            TRANSFORMER,
            f"the time first{more}",
            uses(
                in_time_order,
                embedding=lambda: nn.Embedding(5, 6),
                position=normal(7, 1, 6),
                a=encoder(norm_first=norm_first),
                head=lambda: nn.Linear(6, 3),
            ),
            inputs,
        )
        for more, norm_first, inputs in (
            ("", False, words),
            (", `norm_first`", True, words),
            (", `T = B`", True, lambda: torch.randint(5, (B, B))),
        )
    ),
    Row(
        TRANSFORMER,
        "`nn.TransformerEncoderLayer` alone, the time first",
        uses(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=encoder_layer(norm_first=True)),
        square,
    ),
    *(
        Row(
            TRANSFORMER,
            f"`nn.TransformerDecoderLayer`{more}",
            uses(
                from_memory if options.get("batch_first") else from_memory_in_time_order,
                a=decoder_layer(**options),
                b=lambda: nn.Linear(6, 6),
                c=lambda: nn.Linear(6, 3),
            ),
            pair,
        )
        for more, options in (
            ("", {"batch_first": True}),
            (", `norm_first`", {"batch_first": True, "norm_first": True}),
            (", the time first", {}),
            (", the time first, `norm_first`", {"norm_first": True}),
        )
    ),
    Row(
        TRANSFORMER,
        "`nn.Transformer`, the time first",
        uses(
            lambda m, x, y: m.a(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1),
            a=transformer,
        ),
        pair,
    ),
    Row(
        TRANSFORMER,
        "time-first words into an embedding, then attention",
        uses(
            lambda m, x: m.a(m.embedding(x.T)).transpose(0, 1),
            embedding=lambda: nn.Embedding(5, 6),
            a=encoder(),
        ),
        lambda: torch.randint(5, (B, B)),
    ),
]
