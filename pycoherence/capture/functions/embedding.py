"""`torch.nn.functional.embedding`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.capture.sharded import Cuts
from pycoherence.sites import EmbeddingSite, Site


class Embedding(LayerRule):
    """Rows of a table; each id is a row of the input."""

    features = 0
    cuts = Cuts(((0, 1),), {(0, 1): {0: -1}})

    def __init__(self, padding_idx: int | None) -> None:
        self._padding_idx = padding_idx

    def forward(self, ids: Tensor, weight: Tensor) -> tuple[Tensor, Kept]:
        self._size = weight.shape[0]
        return F.embedding(ids, weight, self._padding_idx), (ids,)

    def input_grad(self, g: Tensor, ids: Tensor) -> None:
        return None

    def factors(self, rows: Rows, g: Tensor, ids: Tensor) -> tuple[Site]:
        return (EmbeddingSite(rows(ids), rows(g), self._size, self._padding_idx),)


@register_function(F.embedding)
def embedding(
    c: CallContext,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    for option, value in (
        ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", scale_grad_by_freq),
        ("sparse", sparse),
    ):
        if value:
            c.refuse(
                f"the option {option} has no per-example meaning here",
                f"build the layer without {option}",
            )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return c.layer(Embedding(padding_idx), input, weight)
