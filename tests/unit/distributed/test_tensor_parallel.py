"""Tensor parallelism: statistics and gradients are those of the model on one process."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoherence as pc
from pycoherence.sites import Layout

B, T, D, V = 5, 6, 6, 7

Loss = Callable[[nn.Module, Any], Tensor]


class Net(nn.Module):
    """Layers that are parallel by columns and by rows, a norm between them, and a plain one."""

    def __init__(self, bias: bool = True, hidden: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden, bias), nn.Linear(hidden, D, bias)
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 3, bias)
        self.unused = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.down(F.relu(self.up(x)))))


class Flat(Net):
    """The same for positions of all examples in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, D)).view(*x.shape[:-1], 3)


class Late(Net):
    """The same with the batch in the second dimension of all that is inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Twice(Net):
    """One layer of each kind, called twice."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(F.relu(self.up(x)))
        return self.out(self.norm(x))


class Derived(Net):
    """Weights that are made of parameters, and one that is also used transposed."""

    def forward(self, x: Tensor) -> Tensor:
        x = distributed(self, x)
        h = F.linear(x, self.up.weight * 2, self.up.bias)
        y = F.linear(F.relu(h), self.down.weight.exp(), self.down.bias)
        return whole(y @ self.up.weight.T)


class Again(Net):
    """Layers that run again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

        return self.out(self.norm(x + checkpoint(run, x, use_reentrant=False)))


class Local(Net):
    """A parameter that is put together where no mode sees it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight
        return F.linear(x, weight.full_tensor() if hasattr(weight, "full_tensor") else weight)


class Scaled(nn.Module):
    """A norm that is written down."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight


class Attention(nn.Module):
    """Heads on different ranks."""

    def __init__(self) -> None:
        super().__init__()
        # A bias of the keys changes nothing but by rounding.
        self.q, self.k, self.v = nn.Linear(D, 12), nn.Linear(D, 12, False), nn.Linear(D, 12)
        self.o, self.norm = nn.Linear(12, D), nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, 2)).transpose(1, 2)

        h = self.norm(x)
        q, k, v = (heads(layer(h)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Words(nn.Module):
    """A table of words, attention, and classes; the table may be that of the classes too."""

    def __init__(self, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D, padding)
        self.block, self.classes = Attention(), nn.Linear(D, V, bias=False)
        if tied:
            self.classes.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.classes(self.block(self.words(ids)))


class Sequence(nn.Module):
    """Norms on slices of the sequence."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(V, D), norm(D), norm(D)
        self.up, self.down, self.out = nn.Linear(D, 12), nn.Linear(12, D), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(F.relu(self.up(self.first(x))))
        return self.out(self.second(x))


class LateSequence(Sequence):
    """The same with the batch in the second dimension."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.mT).transpose(0, 1)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def summed(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2)).sum() if x.dim() == 3 else model(x).square().sum()


def guesses(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def floats(rows: int = B, positions: int | None = T) -> Tensor:
    shape = (rows, D) if positions is None else (rows, positions, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def words(rows: int = B) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


# Plans are made in the ranks, since what they hold is imported with torch.distributed.tensor.


def rows_and_columns(local: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    up = ColwiseParallel(use_local_output=local)
    return {"up": up, "down": RowwiseParallel(), "unused": ColwiseParallel()}


def of_words(by_rows: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    table = (
        RowwiseParallel(input_layouts=Replicate())
        if by_rows
        else ColwiseParallel(output_layouts=Replicate())
    )
    attention = {f"block.{name}": ColwiseParallel() for name in "qkv"}
    return {
        "words": table,
        **attention,
        "block.o": RowwiseParallel(),
        "classes": ColwiseParallel(output_layouts=Replicate()),
    }


def left_sharded() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel

    return {**of_words(), "classes": ColwiseParallel(use_local_output=False)}


def of_sequence(dim: int = 1) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
    )

    cut = Shard(dim)
    return {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=cut),
        "first": SequenceParallel(sequence_dim=dim),
        "up": ColwiseParallel(input_layouts=cut),
        "down": RowwiseParallel(output_layouts=cut),
        "second": SequenceParallel(sequence_dim=dim),
        "out": ColwiseParallel(input_layouts=cut, output_layouts=Replicate()),
    }


def distributed(model: nn.Module, x: Tensor, *placements: Any) -> Tensor:
    """An input, distributed over the ranks that a model is."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    p = next(model.parameters())
    if not hasattr(p, "device_mesh"):
        return x
    return distribute_tensor(x, p.device_mesh, placements or [Replicate()] * p.device_mesh.ndim)


def whole(x: Any) -> Any:
    """All of what may be distributed."""
    if isinstance(x, Mapping):
        return {name: whole(value) for name, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def same(ours: Any, expected: Any, **options: Any) -> None:
    torch.testing.assert_close(whole(ours), expected, **options)


class Pair:
    """A model and its twin on all ranks."""

    def __init__(
        self, make: Callable[[], nn.Module], plan: Callable[[], dict[str, Any]], **options: Any
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import parallelize_module

        torch.manual_seed(0)
        self.alone = make().to(options.get("dtype", torch.float64))
        for name in options.get("frozen", ()):
            self.alone.get_parameter(name).requires_grad_(False)
        self.ours = copy.deepcopy(self.alone)
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        parallelize_module(self.ours, mesh, plan())
        if options.get("tied"):
            self.ours.classes.weight = self.ours.words.weight

    def step(self) -> None:
        for model in (self.ours, self.alone):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()

    def same_gradients(self, **options: Any) -> None:
        for (name, p), q in zip(self.ours.named_parameters(), self.alone.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, name
                continue
            assert p.grad is not None, name
            assert type(p.grad) is type(p.data), name
            assert getattr(p.grad, "placements", None) == getattr(p, "placements", None), name
            same(p.grad, q.grad, **options)


def check_statistics(pair: Pair, loss: Loss, batch: Any, **options: Any) -> None:
    """Everything that `collect` measures."""
    mean = options.pop("mean", True)
    reduction = "mean" if mean else "sum"
    torch.manual_seed(2)
    directions = {
        n: torch.randn_like(p) for n, p in pair.alone.named_parameters() if p.requires_grad
    }
    coef = torch.rand(len(batch)).to(next(pair.alone.parameters()).dtype)
    for asked in (
        (pc.SqNorms(),),
        (pc.Gram(), pc.Dots(directions)),
        (pc.SqNorms(), pc.Dots("mean"), pc.SignSum()),
        (pc.SqNorms(), pc.Moments()),
    ):
        records = []
        for model in (pair.ours, pair.alone):
            model.zero_grad()
            with pc.collect(model, *asked, loss_reduction=reduction, keep_factors=True) as record:
                loss(model, batch).backward()
            records.append(record)
        ours, expected = records
        assert ours.batch_size == expected.batch_size == len(batch)
        for name in ("sq_norms", "gram", "dots"):
            if hasattr(expected, name):
                assert type(getattr(ours, name)) is Tensor
                same(getattr(ours, name), getattr(expected, name), **options)
        for name, parameter in expected.by_parameter.items():
            mine = ours.by_parameter[name]
            for key in ("sq_norms", "gram", "first_moment", "second_moment", "sign_sum"):
                # Signs of numbers near zero are those of rounding.
                if hasattr(parameter, key) and not (key == "sign_sum" and "atol" in options):
                    same(getattr(mine, key), getattr(parameter, key), **options)
        if hasattr(expected, "sq_norms"):
            m = [r.coherence().m for r in records]
            assert m[0] == pytest.approx(m[1], rel=options.get("rtol", 1e-6))
        pair.same_gradients(**options)
        same(ours.weighted_sum(coef), expected.weighted_sum(coef), **options)


def check_rules(pair: Pair, loss: Loss, batch: Any, *rules: Any) -> None:
    """Rules fill `.grad` with the gradients of the whole model."""
    for rule in rules or (
        pc.Winsorized(1),
        pc.Median(),
        pc.Krum(1),
        pc.NormClip(0.1, 0.5),
        pc.CenteredClip(1.0),
        pc.SignAgreement(0.5),
        pc.ARC(1, pc.TrimmedMean(1)),
    ):
        twin, outvoted = copy.deepcopy(rule), list[Tensor | None]()
        for model, one in ((pair.ours, rule), (pair.alone, twin)):
            model.zero_grad()
            for _ in range(2):
                torch.manual_seed(3)
                # Rounding decides in which numbers that should be zero an example is outvoted.
                votes = isinstance(rule, pc.Winsorized) and not rules
                with pc.aggregate(model, one, outvoted=votes) as found:
                    loss(model, batch).backward()
            assert found.report.batch_size == len(batch)
            outvoted.append(found.report.outvoted)
        torch.testing.assert_close(*outvoted)
        pair.same_gradients()


def check_weighted_sum(pair: Pair, loss: Loss, batch: Any) -> None:
    found = [
        pc.weighted_sum(model, loss, batch, lambda record: 1 / record.sq_norms.sqrt())
        for model in (pair.ours, pair.alone)
    ]
    same(*found)


def run_mlp(rank: int) -> None:
    pair = Pair(Net, rows_and_columns)
    for _ in range(2):
        check_statistics(pair, squares, floats())
        pair.step()
    check_rules(pair, squares, floats())
    check_weighted_sum(pair, squares, floats())


def run_mlps(rank: int) -> None:
    for make in (Flat, Late, Twice):
        pair = Pair(make, rows_and_columns)
        check_statistics(pair, squares, floats())
        check_rules(pair, squares, floats(), pc.Winsorized(1), pc.Krum(1))
    pair = Pair(lambda: Net(bias=False), rows_and_columns, frozen=["up.weight", "norm.bias"])
    check_statistics(pair, summed, floats(), mean=False)
    for batch in (floats(positions=None), floats(positions=1), floats(rows=1)):
        check_statistics(Pair(Net, rows_and_columns), squares, batch)
    for hidden in (7, 1):  # slices of other sizes, and empty ones
        pair = Pair(lambda hidden=hidden: Net(hidden=hidden), lambda: rows_and_columns(local=False))
        check_statistics(pair, squares, floats())
        check_rules(pair, squares, floats(), pc.Winsorized(1), pc.Krum(1))


def run_words(rank: int) -> None:
    for make, plan, tied in (
        (Words, of_words, False),
        (lambda: Words(padding=2), of_words, False),
        (Words, lambda: of_words(by_rows=False), False),
        (lambda: Words(tied=True), of_words, True),
    ):
        pair = Pair(make, plan, tied=tied)
        check_statistics(pair, guesses, words())
        check_rules(pair, guesses, words(), pc.Winsorized(1), pc.Krum(1))


def run_left_sharded(rank: int) -> None:
    from torch.distributed.tensor.parallel import loss_parallel

    pair = Pair(Words, left_sharded)
    with loss_parallel():
        check_statistics(pair, guesses, words())


def run_sequence(rank: int) -> None:
    for norm in (nn.LayerNorm, nn.RMSNorm, Scaled):
        pair = Pair(lambda norm=norm: Sequence(norm), of_sequence)
        check_statistics(pair, guesses, words())
        check_rules(pair, guesses, words(), pc.Winsorized(1), pc.Krum(1))
    check_statistics(Pair(LateSequence, lambda: of_sequence(0)), guesses, words())


def hooked(model: nn.Module, x: Tensor) -> Tensor:
    modules = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_full_backward_hook(lambda *_: None) for module in modules]
    loss = squares(model, x)
    for handle in handles:
        handle.remove()
    return loss


def run_derived(rank: int) -> None:
    check_statistics(Pair(Derived, lambda: rows_and_columns(local=False)), squares, floats())
    check_statistics(Pair(Again, rows_and_columns), squares, floats())
    for make in (Net, Late):
        check_statistics(Pair(make, lambda: rows_and_columns(local=False)), hooked, floats())
    with pytest.raises(pc.UnsupportedError, match=r"bypassing"):
        check_statistics(Pair(Local, rows_and_columns), squares, floats())


def run_batches(rank: int) -> None:
    """Rows of the batch on different ranks, and a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    batch = floats(rows=6)
    pair = Pair(Net, dict)
    distribute_module(pair.ours, init_device_mesh("cpu", (torch.distributed.get_world_size(),)))

    def rows(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, distributed(model, x, Shard(0)))

    check_statistics(pair, rows, batch)
    check_rules(pair, rows, batch)

    def part(name: str, module: nn.Module, mesh: Any) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            cut = {"up": Shard(0), "down": Shard(1)}.get(name if p.dim() > 1 else "", Replicate())
            moved = distribute_tensor(p.detach(), mesh, [Replicate(), cut])
            setattr(module, key, nn.Parameter(moved))

    pair = Pair(Net, dict)
    mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()))
    distribute_module(pair.ours, mesh, part)
    check_statistics(pair, lambda model, x: squares(model, distributed(model, x)), batch)


def run_refused(rank: int) -> None:
    """A placement that is none of the usual ones."""
    from torch.distributed.tensor.placement_types import Shard

    class Strange(Shard):
        pass

    pair = Pair(Net, rows_and_columns)
    with pytest.raises(pc.UnsupportedError, match=r"Strange is not known.*Shard and Replicate"):
        Layout(pair.ours.up.weight.device_mesh, (Strange(0),), (4, 4)).expect_known(["up.weight"])


def run_traffic(rank: int) -> None:
    """Nothing is gathered for factors of layers that are parallel, nor for norms on slices."""
    from torch.distributed.tensor.debug import CommDebugMode

    for make, plan, loss, batch in (
        (Net, rows_and_columns, squares, floats()),
        (Sequence, of_sequence, guesses, words()),
        (lambda: Sequence(Scaled), of_sequence, guesses, words()),
    ):
        pair = Pair(make, plan)
        counts = []
        for measured in (True, False):
            with CommDebugMode() as comm:
                if measured:
                    with pc.collect(pair.ours, pc.SqNorms()):
                        loss(pair.ours, batch).backward()
                else:
                    loss(pair.ours, batch).backward()
            gathers = (n for op, n in comm.get_comm_counts().items() if "gather" in str(op))
            counts.append(sum(gathers))
        assert counts[0] == counts[1]


def run_verbs(rank: int) -> None:
    """Records are pickled, meters filled, models verified."""
    pair = Pair(Net, rows_and_columns)
    found = []
    for model in (pair.ours, pair.alone):
        x = floats(rows=6).transpose(0, 1).contiguous()
        with pc.collect(model, pc.SqNorms(), pc.Moments(), group_size=2) as record:
            pc.mark_examples(x, dim=1)
            squares(model, x).backward()
        copied = pickle.loads(pickle.dumps(record))
        meter = pc.CoherenceMeter(model)
        for _ in range(2):
            meter.update(squares, floats())
        ms = [copied.coherence().m, meter.compute().m]
        found.append([record.sq_norms, torch.tensor(ms, dtype=torch.float64)])
    same(*found)
    pair.same_gradients()
    assert not pc.verify(pair.ours, squares, floats()).failures
    check_weighted_sum(pair, squares, floats())


def run_short(rank: int) -> None:
    pair = Pair(Net, rows_and_columns, dtype=torch.bfloat16)
    check_statistics(pair, squares, floats().bfloat16(), rtol=0.1, atol=0.05)


@needs_gloo
def test_layers_by_columns_and_rows() -> None:
    run_ranks(2, run_mlp)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("work", [run_mlps, run_words, run_sequence])
def test_three_ranks(work: Any) -> None:
    run_ranks(3, work)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        run_mlps,
        run_words,
        run_left_sharded,
        run_sequence,
        run_derived,
        run_batches,
        run_refused,
        run_traffic,
        run_verbs,
    ],
)
def test_two_ranks(work: Any) -> None:
    run_ranks(2, work)


@needs_gloo
@pytest.mark.slow
def test_short_floats() -> None:
    run_ranks(2, run_short)


def test_nothing_is_imported_for_it() -> None:
    code = "import sys, pycoherence; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
