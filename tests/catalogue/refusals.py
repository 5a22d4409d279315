"""Models that cannot be measured, and what the error must say of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catalogue.parts import (
    B,
    Native,
    after_linear,
    custom,
    embedding,
    features,
    ids,
    sequence,
)
from catalogue.row import Uses


@dataclass(frozen=True)
class Refusal:
    """One such model.

    Attributes:
        build: The model.
        inputs: Its input.
        says: Patterns that must all be found in the message: where, which parameter, which
            function, and the way out.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    says: tuple[str, ...]


def module(path: str, parameter: str) -> str:
    return rf"parameter '{parameter}' of module '{path}'"


FIX = "What to do: "
BATCH_NORM = (r"module '1' \(BatchNorm1d\)", "mix", FIX, "eval mode", "GroupNorm")

REFUSALS: dict[str, Refusal] = {
    "batch-norm": Refusal(after_linear(nn.BatchNorm1d(6)), features, BATCH_NORM),
    "batch-norm-not-affine": Refusal(
        after_linear(nn.BatchNorm1d(6, affine=False)), features, BATCH_NORM
    ),
    "batch-norm-frozen": Refusal(
        after_linear(nn.BatchNorm1d(6).requires_grad_(False)), features, BATCH_NORM
    ),
    "batch-norm-no-running-statistics": Refusal(
        after_linear(nn.BatchNorm1d(6, track_running_stats=False).eval()),
        features,
        ("'1'", "mix", FIX),
    ),
    "sync-batch-norm": Refusal(
        after_linear(nn.SyncBatchNorm(6)), features, ("'1'", "SyncBatchNorm", "mix", FIX)
    ),
    "batch-norm-functional": Refusal(
        lambda: Uses(
            lambda m, x: torch.batch_norm(m.a(x), None, None, None, None, True, 0.1, 1e-5, False),
            a=nn.Linear(6, 6),
        ),
        features,
        ("batch_norm", "mix", FIX),
    ),
    "attention-unbatched": Refusal(
        lambda: Uses(lambda m, x: m.a(x[0], x[0], x[0])[0], a=nn.MultiheadAttention(6, 2)),
        sequence,
        (
            r"parameter 'in_proj_weight' of module 'a'",
            "multi_head_attention_forward",
            "no batch dimension",
            FIX,
        ),
    ),
    "lstm-packed": Refusal(
        lambda: Uses(
            lambda m, x: m.a(nn.utils.rnn.pack_padded_sequence(x, [3] * B, batch_first=True))[0][0],
            a=nn.LSTM(6, 2, batch_first=True),
        ),
        sequence,
        (r"parameter 'weight_ih_l0' of module 'a'", "lstm", "packed", FIX, "padded"),
    ),
    "parameter-as-input": Refusal(
        lambda: Uses(
            lambda m, x: F.linear(m.a.weight, m.b.weight) + x.sum(),
            a=nn.Linear(6, 4),
            b=nn.Linear(6, 6),
        ),
        features,
        (module("a", "weight"), "Tensor.add", FIX),
    ),
    "parameter-as-its-own-input": Refusal(
        lambda: Uses(lambda m, x: F.linear(m.a.weight, m.a.weight) + x.sum(), a=nn.Linear(6, 6)),
        features,
        (module("a", "weight"), "Tensor.add", "mixed over the batch", FIX),
    ),
    "unbatched-linear": Refusal(
        lambda: nn.Linear(6, 2), lambda: torch.randn(6), ("'weight' of the model itself", "linear")
    ),
    "unbatched-conv": Refusal(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2)),
        lambda: torch.randn(2, 5, 5),
        (module("0", "weight"), "conv2d", r"\(2, 5, 5\) has no batch dimension", FIX),
    ),
    "unbatched-layer-norm": Refusal(
        lambda: nn.LayerNorm(6), lambda: torch.randn(6), ("layer_norm", r"\(6,\)", FIX)
    ),
    "layer-norm-over-the-batch": Refusal(
        lambda: nn.LayerNorm((B, 6)), features, ("layer_norm", "batch dimension", FIX)
    ),
    "max-norm": Refusal(embedding(max_norm=1.0), ids, (module("0", "weight"), "max_norm", FIX)),
    "scale-grad-by-freq": Refusal(
        embedding(scale_grad_by_freq=True), ids, (module("0", "weight"), "scale_grad_by_freq", FIX)
    ),
    "sparse": Refusal(embedding(sparse=True), ids, (module("0", "weight"), "sparse", FIX)),
    "native-function": Refusal(
        custom(lambda x, s: x * Native.apply(s)), features, (module("1", "scale"), "Native", FIX)
    ),
    "native-function-next-to-a-known-use": Refusal(
        lambda: Uses(
            lambda m, x: m.a(x) + F.linear(x, Native.apply(m.a.weight)), a=nn.Linear(6, 4)
        ),
        features,
        (module("a", "weight"), "Native", FIX),
    ),
}
