"""Recurrent layers and cells, with the batch first and second."""

import torch
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, uses

T = 3
sequence, square, features = normal(B, T, 6), normal(B, B, 6), normal(B, 6)
RECURRENT = Topic("Recurrent layers")
SLOW = "Carried out step by step, without the kernels of cuDNN."
KINDS = {"`nn.RNN`": nn.RNN, "`nn.LSTM`": nn.LSTM, "`nn.GRU`": nn.GRU}
CELLS = {"`nn.RNNCell`": nn.RNNCell, "`nn.LSTMCell`": nn.LSTMCell, "`nn.GRUCell`": nn.GRUCell}


def forward(m, x):
    return m.a(x)[0]


def time_first(m, x):
    return m.a(x.transpose(0, 1))[0].transpose(0, 1)


def last(m, x):
    state = m.a(x.transpose(0, 1))[1]
    state = state[0] if isinstance(state, tuple) else state
    return m.head(torch.cat([state[-2], state[-1]], -1))


def steps(m, x):
    state, found = None, []
    for step in x.unbind(1):
        state = m.a(step, state)
        found.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(found, 1)


for name, kind in KINDS.items():
    for more, build, inputs in (
        ("", uses(forward, a=lambda kind=kind: kind(6, 5, batch_first=True)), sequence),
        (
            ", two layers, bidirectional",
            uses(
                forward,
                a=lambda kind=kind: kind(6, 5, 2, batch_first=True, bidirectional=True),
            ),
            sequence,
        ),
        (
            ", `batch_first=False`, no biases",
            uses(time_first, a=lambda kind=kind: kind(6, 5, 2, bias=False)),
            sequence,
        ),
        (
            ", `batch_first=False`, `T = B`",
            uses(time_first, a=lambda kind=kind: kind(6, 5, bidirectional=True)),
            square,
        ),
        (
            ", the last states",
            uses(
                last,
                a=lambda kind=kind: kind(6, 5, bidirectional=True),
                head=linear(10, 3),
            ),
            square,
        ),
    ):
        RECURRENT.add(f"{name}{more}", build, inputs, note=SLOW if not more else "")
RECURRENT.add(
    '`nn.RNN`, `nonlinearity="relu"`',
    uses(forward, a=lambda: nn.RNN(6, 5, 2, nonlinearity="relu", batch_first=True)),
    sequence,
)
RECURRENT.add(
    "`nn.LSTM`, `proj_size`",
    uses(forward, a=lambda: nn.LSTM(6, 5, 2, proj_size=2, batch_first=True, bidirectional=True)),
    sequence,
)
RECURRENT.add(
    "`nn.GRU` with the time first, and positions repeated over the batch",
    uses(
        lambda m, x: time_first(m, x) + m.p.unsqueeze(0).repeat(len(x), 1, 1),
        a=lambda: nn.GRU(6, 5),
        p=normal(T, 5),
    ),
    sequence,
)
RECURRENT.add(
    "the same, and added with the time first",
    uses(
        lambda m, x: (m.a(x.transpose(0, 1))[0] + m.p.unsqueeze(1).repeat(1, len(x), 1)).transpose(
            0, 1
        ),
        a=lambda: nn.GRU(6, 5),
        p=normal(B, 5),
    ),
    square,
    note="Cheaper without the `repeat`: addition broadcasts.",
)
for name, kind in CELLS.items():
    for s in (sequence,):
        RECURRENT.add(f"{name}, called in a loop", uses(steps, a=lambda kind=kind: kind(6, 5)), s)
RECURRENT.add(
    "`nn.GRUCell`, once, no biases",
    uses(lambda m, x: m.a(x, x[:, :5]), a=lambda: nn.GRUCell(6, 5, bias=False)),
    features,
)
RECURRENT.add(
    "one example after the other, `[T, I]`",
    uses(
        lambda m, x: torch.stack([m.head(m.a(one)[0]) for one in x]),
        a=lambda: nn.LSTM(6, 5),
        head=linear(5, 3),
    ),
    sequence,
)
RECURRENT.add(
    "time-first words into an embedding, then `nn.GRU`",
    uses(
        lambda m, x: m.a(m.embedding(x.T))[0].transpose(0, 1),
        embedding=embedding(5, 6),
        a=lambda: nn.GRU(6, 5),
    ),
    ids(5, B),
)


@RECURRENT(
    "embedding, `nn.LSTM` with the time first, head",
    ids(5, B),
    embedding=embedding(5, 6),
    a=lambda: nn.LSTM(6, 5, 2),
    head=linear(5, 3),
)
def from_words(m, x):
    return m.head(m.a(m.embedding(x).transpose(0, 1))[0]).transpose(0, 1)


@RECURRENT(
    "`nn.LSTM`, learned first states, expanded and repeated",
    sequence,
    note="Their gradients are made `[B, ...]`.",
    a=lambda: nn.LSTM(6, 5, 2, batch_first=True),
    h=normal(2, 1, 5),
    c=normal(2, 1, 5),
)
def learned_state(m, x):
    h, c = m.h.expand(-1, len(x), -1), m.c.repeat(1, len(x), 1)
    return m.a(x, (h.contiguous(), c))[0]


@RECURRENT(
    "`nn.GRU`, a first state made of the input",
    square,
    a=lambda: nn.GRU(6, 5),
    b=linear(6, 5),
)
def given_state(m, x):
    h = m.b(x[:, 0]).tanh().unsqueeze(0)
    return m.a(x.transpose(0, 1), h)[0].transpose(0, 1)


@RECURRENT(
    "encoder and decoder",
    sequence,
    a=lambda: nn.LSTM(6, 5, batch_first=True),
    b=lambda: nn.LSTM(6, 5, batch_first=True),
)
def to_decoder(m, x):
    state = m.a(x)[1]
    return m.b(x[:, 1:].tanh(), state)[0]


@RECURRENT(
    "packed sequences",
    sequence,
    "refused",
    says="packed sequence.*padded inputs",
    note="Give it padded inputs, and take each example's output at its last step.",
    a=lambda: nn.LSTM(6, 5, batch_first=True),
)
def packed(m, x):
    return m.a(nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True))[0].data
