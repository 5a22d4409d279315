"""Measures statistics in the loops of Trainer, accelerate and Lightning, beside a bare loop.

    python -m bench hosts [--hosts transformers ...] [--rounds N] [--quick] [--out FILE]

Each loop trains the same small Llama on the same batches, with `SqNorms` and their scalars at every
step and without. The norms of all steps are first compared with those of the bare loop. Loops then
take turns, in another order in every round, on one thread; a step counts from one batch to the
next. Figures are medians: a measured step as a multiple of the host's plain one; and a bare step
with a block, plus what the host adds to a step beyond what the block adds to a bare one, as a
multiple of that bare step.
"""

import random
import statistics
from collections.abc import Iterator, Sequence

import torch

from bench.hosts.loops import LOOPS, Task
from bench.shared import options, results
from bench.shared.results import Row

BARE = "bare loop"
LIMIT = 1e-4


def make(quick: bool) -> Task:
    """A Llama of two layers, and its batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, batch, length, steps = (32, 2, 8, 4) if quick else (256, 8, 64, 14)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    return Task(model, torch.randint(256, (steps * batch, length)), batch)


def measure(hosts: Sequence[str], rounds: int, quick: bool) -> Iterator[Row]:
    """A row for each loop."""
    task = make(quick)
    truth = torch.tensor(LOOPS[BARE](task, True).norms)
    errors = {}
    for host in hosts:
        found = torch.tensor(LOOPS[host](task, True).norms)
        same = found.shape == truth.shape
        errors[host] = ((found - truth).abs().max() / truth.max()).item() if same else float("inf")
    right = [host for host in hosts if errors[host] < LIMIT]
    turns = [(host, measured) for host in right for measured in (False, True)]
    seconds: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for turn in random.sample(turns, len(turns)):
            seconds[turn] += LOOPS[turn[0]](task, turn[1]).seconds
    medians = {turn: statistics.median(each) for turn, each in seconds.items()}
    block = medians[BARE, True]
    adds = block - medians[BARE, False]
    for host in hosts:
        row: Row = {"host": host, "error": errors[host]}
        if host in right:
            plain, measured = medians[host, False], medians[host, True]
            row |= {"plain": plain, "measured": measured, "ratio": measured / plain}
            row["beside"] = (measured - plain - adds + block) / block
        yield row


def main(argv: Sequence[str]) -> int:
    """Run; fails if a loop gave other norms than the bare one."""
    parser = options.measuring("hosts", __doc__)
    names = [name for name in LOOPS if name != BARE]
    parser.add_argument("--hosts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = 1 if args.quick else args.rounds
    rows = results.written(measure([BARE, *args.hosts], rounds, args.quick), args.out)
    failed, shown = 0, []
    for row in rows:
        if "ratio" not in row:
            failed += 1
            shown.append([row["host"], *["-"] * 4, f"{row['error']:.1g}, too large"])
            continue
        times = [f"{1e3 * row[name]:.1f} ms" for name in ("plain", "measured")]
        ratios = [f"{row[name]:.3f}x" for name in ("ratio", "beside")]
        shown.append([row["host"], *times, *ratios, f"{row['error']:.1g}"])
    head = ["loop", "plain step", "with norms", "ratio", "beside the bare block", "error"]
    print("\n".join(results.table(head, shown)))
    return int(failed > 0)
