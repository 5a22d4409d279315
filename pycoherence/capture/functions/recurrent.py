"""Recurrent layers and their cells, one step after the other."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, Handler, register_decomposition

State = tuple[Tensor, ...]
"""`h`, and in an LSTM `c`."""

Cell = Callable[[Tensor, Tensor, State], State]
"""From what input and hidden state give to the gates, and the state, the next state."""


class Weights(NamedTuple):
    """The weights of a layer in one direction: of input and hidden state, then of projections."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    reset, update = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    new = (x_n + reset * h_n).tanh()
    return (new + update * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _step(cell: Cell, gates: Tensor, state: State, weights: Weights) -> State:
    hidden = F.linear(state[0], weights.hh, weights.bias_hh)
    state = cell(gates, hidden, state)
    if weights.hr is None:
        return state
    return F.linear(state[0], weights.hr), *state[1:]


def _direction(
    cell: Cell, x: Tensor, state: State, weights: Weights, *, backwards: bool
) -> tuple[Tensor, State]:
    """Outputs `[T, B, H]` and the last state of one direction of a layer over `x` `[B, T, I]`."""
    steps = F.linear(x, weights.ih, weights.bias_ih).unbind(1)
    found: list[Tensor] = []
    for gates in steps[::-1] if backwards else steps:
        state = _step(cell, gates, state, weights)
        found.append(state[0])
    return torch.stack(found[::-1] if backwards else found), state


def _weights(parameters: Sequence[Tensor], runs: int, *, biases: bool) -> list[Weights]:
    """The flat list of parameters, by layer and direction."""
    each = len(parameters) // runs
    parts = [parameters[i * each : (i + 1) * each] for i in range(runs)]
    if not biases:
        parts = [[*part[:2], None, None, *part[2:]] for part in parts]
    return [Weights._make([*part, None][:5]) for part in parts]


class Form(NamedTuple):
    """The arguments of a recurrent layer after its parameters."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        """The number of directions of each layer."""
        return 2 if self.bidirectional else 1


def _layers(
    cell: Cell, x: Tensor, first: State, params: Sequence[Tensor], form: Form
) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[T, B, H]` of the last of all layers over `x` `[B, T, I]`, and all last states."""
    runs = form.num_layers * form.directions
    weights = _weights(params, runs, biases=form.has_biases)
    last: list[State] = []
    output = x.transpose(0, 1)
    for layer in range(form.num_layers):
        if layer:
            output = F.dropout(output, form.dropout, form.train)
        outs: list[Tensor] = []
        for way in range(form.directions):
            state = tuple(h[:, len(last)] for h in first)
            inputs = (output.transpose(0, 1), state, weights[len(last)])
            out, state = _direction(cell, *inputs, backwards=way == 1)
            outs.append(out)
            last.append(state)
        output = torch.cat(outs, -1)
    return output, [torch.stack(h) for h in zip(*last, strict=True)]


def _layer(cell: Cell, states: int) -> Handler:
    """The handler of a recurrent layer whose state is `states` tensors."""

    def layer(c: CallContext, input: Tensor, hx: Any, params: Any, *options: Any) -> Any:
        if isinstance(hx, Tensor) and not hx.is_floating_point():
            _refuse_packed(c)
        form = Form(*options)
        place = 0 if form.batch_first else 1
        if input.dim() != 3 or not input.shape[1 - place]:
            return NotImplemented  # torch says why
        c.declare(input, place)
        states_of = [c.aligned(h, 1, input, place) for h in (hx if states > 1 else [hx])]
        with c.tracked():
            x = input if form.batch_first else input.transpose(0, 1)
            first = tuple(h.transpose(0, 1) for h in states_of)
            output, last = _layers(cell, x, first, params, form)
            if form.batch_first:
                output = output.transpose(0, 1)
        return output, *last

    return layer


def _refuse_packed(c: CallContext) -> None:
    c.refuse(
        "a packed sequence holds other examples at each step, in an order that is not known here",
        "give the layer padded inputs [B, T, ...] instead; take each example's output at its last "
        "step, output[range(B), lengths - 1], and leave padding out of the loss; if it is "
        "bidirectional, flip each example within its length for the second direction",
    )


def _cell(cell: Cell, states: int) -> Handler:
    """The handler of a single step."""

    def step(
        c: CallContext,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        c.declare(input, 0)
        state = [c.aligned(h, 0, input, 0) for h in (hx if states > 1 else [hx])]
        weights = Weights(w_ih, w_hh, b_ih, b_hh)
        with c.tracked():
            found = _step(cell, F.linear(input, w_ih, b_ih), tuple(state), weights)
        return found if states > 1 else found[0]

    return step


for _name, _function, _states in (
    ("lstm", _lstm, 2),
    ("gru", _gru, 1),
    ("rnn_tanh", _tanh, 1),
    ("rnn_relu", _relu, 1),
):
    register_decomposition(getattr(torch, _name))(_layer(_function, _states))
    register_decomposition(getattr(torch, f"{_name}_cell"))(_cell(_function, _states))
