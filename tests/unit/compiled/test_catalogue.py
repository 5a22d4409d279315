"""Models of the catalogue go through a compiled step bit for bit, or are refused in words.

All rows take minutes, so that one of twelve is taken, and the first refused one of each topic.
`REFUSED` lists all that are refused; a row that is not taken here was compared when it was made.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from catalogue.row import Row
from catalogue.rows import all_rows
from support.replayed import assert_same

import pycoherence as pc

CAPTURE = "the capture has to read numbers"
HOST = "reads numbers of the batch or the parameters"
SETS = "sets attributes of modules"
ELSEWHERE = "neither in the batch nor"
RUNS = "does not run"
TRACES = "cannot trace this pass"
KEPT = "kept a tensor of the pass"
ROUNDS = "gave other numbers"

REFUSED: dict[str, dict[str, str]] = {
    "Experts": {
        "a module for each, `index_add_`": HOST,
        "a module for each, `index_add_`, `T = B`": HOST,
        "slices of one parameter in a loop": HOST,
        "slices of one parameter in a loop, `T = B`": HOST,
        "tokens sorted by expert, `split`": CAPTURE,
        "tokens sorted by expert, `split`, `T = B`": CAPTURE,
        "all tokens through each, `bmm`": CAPTURE,
        "all tokens through each, `bmm`, `T = B`": CAPTURE,
        "one for a token, written back by a mask": HOST,
        "one for a token, written back by a mask, `T = B`": HOST,
        "one for an example": HOST,
        "a bias for the choice, a shared expert, `found[token] += y`": CAPTURE,
        "a buffer of slots filled by `index_put`": CAPTURE,
    },
    "Ids `[B]`, one for an example": {
        "a conditional random field, `p[y, z]`": CAPTURE,
        "vector quantisation, codes of flattened positions": CAPTURE,
    },
    "Graphs": {
        "nodes of all graphs in one list, `index_add`": HOST,
        "a network of edges, `scatter_add_` and `scatter_reduce`": HOST,
        "attention to neighbours, vectors `[D, 1]`": HOST,
        "a weight for each kind of edge": HOST,
        "a norm over the nodes of each graph": HOST,
        "packed sequences in one list, attention within each": HOST,
        "nodes picked out by a mask, and put back": HOST,
    },
    "Other layers": {
        "any other function, such as `torch.trapezoid`": CAPTURE,
    },
    "Weights that are made": {
        "`spectral_norm` of old, in training mode": SETS,
        "`weight_norm` of old": SETS,
    },
    "Models of `transformers`": {
        "Llama with activation checkpointing": ROUNDS,
    },
    "Rows moved and put back": {
        "sorted by length": CAPTURE,
        "`index_select`, back by `gather`": CAPTURE,
        "`found[order] = y`": CAPTURE,
        "positions sorted by a score": CAPTURE,
        "some examples through a layer, `masked_scatter`": HOST,
        "examples that leave early": HOST,
    },
    "Products with a parameter": {
        "`torch.baddbmm`, the parameter added": TRACES,
    },
    "Learned values in place of some": {
        "`x[hidden] = p` (SpecAugment)": CAPTURE,
        "`index_put`": HOST,
        "features of images put among words, `masked_scatter`": CAPTURE,
    },
    "Recurrences in a loop": {
        "Mamba, a selective scan": RUNS,
        "Mamba, a selective scan, `T = B`": RUNS,
        "two states for each example, reordered": CAPTURE,
        "two states for each example, reordered, `T = B`": CAPTURE,
    },
    "Complex numbers made of real parameters": {
        "`F.linear` of complex numbers, `abs`, `conj` and `polar`": CAPTURE,
    },
    "Tables of relative positions": {
        "an index kept by `functools.lru_cache`, `T = B`": ELSEWHERE,
    },
    "The time first throughout": {
        "marked words into an embedding, then `nn.GRU`": HOST,
        "marked words into an embedding, then `nn.GRU`, `T = B`": HOST,
    },
    "Learned tokens beside those of examples": {
        "ViT-MAE, patches left out and put back by `gather`": CAPTURE,
        "written into zeros": KEPT,
    },
    "Scalars": {
        "CLIP, similarities of all pairs, their diagonal": CAPTURE,
    },
}
"""By topic and name, what the error says."""

ROWS = [row for row in all_rows() if row.outcome != "refused"]


FIRST = {(topic, next(iter(rows))) for topic, rows in REFUSED.items()}
TAKEN = [row for i, row in enumerate(ROWS) if i % 12 == 0 or (row.topic, row.name) in FIRST]


def test_the_list_names_rows() -> None:
    named = {(topic, name) for topic, rows in REFUSED.items() for name in rows}
    assert named <= {(row.topic, row.name) for row in ROWS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the hosts of some models
@pytest.mark.parametrize("row", TAKEN, ids=lambda row: f"{row.topic}: {row.name}")
def test_a_row(row: Row) -> None:
    torch.manual_seed(0)
    model: Any = row.build()
    torch.manual_seed(0)
    twin: Any = row.build()
    step = pc.compile(model, row.loss, pc.SqNorms(), pc.Moments())
    says = REFUSED.get(row.topic, {}).get(row.name)
    with nullcontext() if row.context is None else row.context():
        if says is not None:
            with pytest.raises((pc.UnsupportedError, pc.VerificationError), match=says) as error:
                step(row.batch)
            assert "What to do:" in str(error.value)
            return
        for _ in range(3):
            model.zero_grad()
            twin.zero_grad()
            assert_same(step, model, twin, row.loss, row.batch, pc.SqNorms(), pc.Moments())
    assert step.traces == 1
