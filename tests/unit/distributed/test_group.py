"""Statistics and rules over the examples of several processes, beside one process with all."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import pycoherence as pc

pytestmark = needs_gloo

PER_EXAMPLE = ("sq_norms", "gram", "dots")
PER_NUMBER = ("first_moment", "second_moment", "sign_sum")


class Net(nn.Module):
    """A tied table, a layer used twice, a scale, a convolution, and a layer without a use."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.norm = nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.conv, self.few, self.unused = nn.Conv1d(6, 6, 3), nn.Linear(6, 1), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.twice(self.table(ids)).tanh())
        x = self.conv(self.norm(x).mT).mT
        return F.linear(x, self.table.weight) * self.few(x).exp()


def make() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net().double()
    return net, copy.deepcopy(net)


def batch(sizes: tuple[int, ...], rank: int, step: int = 0) -> tuple[Tensor, Tensor, slice]:
    """The ids and classes of all examples, and the place of those of a rank."""
    generator, start = torch.Generator().manual_seed(step), sum(sizes[:rank])
    ids, classes = (torch.randint(9, (sum(sizes), n), generator=generator) for n in (5, 3))
    return ids, classes, slice(start, start + sizes[rank])


def loss(model: nn.Module, ids: Tensor, classes: Tensor, reduction: str = "mean") -> Tensor:
    each = F.cross_entropy(model(ids).mT, classes, reduction="none").mean(1)
    return each.mean() if reduction == "mean" else each.sum()


def same(ours: Any, theirs: Any, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")


def check_grads(net: nn.Module, alone: nn.Module, name: str) -> None:
    for (key, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        zero = torch.zeros_like(q)
        same(zero if p.grad is None else p.grad, zero if q.grad is None else q.grad, name + key)


def wrapped(net: nn.Module, wrapper: str) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=True) if wrapper else net


def statistics() -> Iterator[list[pc.statistics.Statistic]]:
    yield [pc.SqNorms(), pc.Gram(), pc.Dots("mean"), pc.Moments(), pc.SignSum()]
    yield [pc.SqNorms()]
    yield [pc.Gram()]


def check_statistics(rank: int, sizes: tuple[int, ...], reduction: str, wrapper: str) -> None:
    net, alone = make()
    ours = wrapped(net, wrapper)
    for step, asked in enumerate(statistics()):
        ids, classes, mine = batch(sizes, rank, step)
        options: Any = {"loss_reduction": reduction}
        with pc.collect(alone, *asked, **options) as expected:
            loss(alone, ids, classes, reduction).backward()
        with pc.collect(ours, *asked, group=dist.group.WORLD, **options) as record:
            loss(ours, ids[mine], classes[mine], reduction).backward()
        assert record.batch_size == sum(sizes)
        assert record.local.batch_size == sizes[rank]
        kinds = {name for one in asked for name in one.results}
        for name in kinds & {*PER_EXAMPLE}:
            same(getattr(record, name), getattr(expected, name), name)
            largest = getattr(expected, name).abs().max() if sum(sizes) else 0.0
            error = (getattr(record, name) - getattr(expected, name)).abs()
            assert (error <= 1e-12 * largest).all(), name
            whole = {key.removeprefix("module."): x for key, x in record.by_parameter.items()}
            for key, one in expected.by_parameter.items():
                same(getattr(whole[key], name), getattr(one, name), f"{name} of {key}")
        if len(asked) > 1:
            for name in PER_NUMBER:
                for key, one in expected.by_parameter.items():
                    same(getattr(whole[key], name), getattr(one, name), f"{name} of {key}")
        if "sq_norms" in kinds:
            same(record.local.sq_norms, expected.sq_norms[mine], "own norms")
            if sum(sizes):
                same(record.coherence().m, expected.coherence().m, "coherence")
        if "gram" in kinds:
            same(record.local.gram, expected.gram[mine, mine], "own gram")


@pytest.mark.parametrize("wrapper", ["", "ddp"])
@pytest.mark.parametrize("sizes", [(4,), (3, 4), (4, 0, 3), (2, 1, 5, 2)])
def test_statistics_are_those_of_one_process(sizes: tuple[int, ...], wrapper: str) -> None:
    run_ranks(len(sizes), check_statistics, sizes, "mean", wrapper)


def test_statistics_of_a_sum() -> None:
    run_ranks(2, check_statistics, (3, 4), "sum", "ddp")


RULES: list[Callable[[], Any]] = [
    lambda: pc.Winsorized(1),
    lambda: pc.TrimmedMean(1),
    lambda: pc.Median(),
    lambda: pc.MedianOfMeans(3),
    lambda: pc.SignAgreement(0.3),
    lambda: pc.Phocas(1),
    lambda: pc.MeaMed(1),
    lambda: pc.Krum(1, m=2),
    lambda: pc.Krum(1, per="parameter"),
    lambda: pc.Bulyan(1),
    lambda: pc.GeometricMedian(),
    lambda: pc.CenteredClip(0.1),
    lambda: pc.NormClip(0.1),
    lambda: pc.GAF(0.99),
    lambda: pc.Reweight(lambda record: record.sq_norms),
]
MORE_RULES: list[Callable[[], Any]] = [
    lambda: pc.MDA(2),
    lambda: pc.SMEA(1),
    lambda: pc.MoNNA(2, trusted=1),
    lambda: pc.NNM(2, pc.NormClip(0.1)),
    lambda: pc.NNM(2, pc.TrimmedMean(1)),
    lambda: pc.ARC(2, pc.Bulyan(1)),
    lambda: pc.Bucketing(2, pc.Median(), torch.Generator().manual_seed(3)),
    lambda: pc.FromWeighting(lambda gram: gram.sum(1) / gram.sum()),
]
OUTVOTING = (pc.Winsorized, pc.TrimmedMean, pc.Phocas, pc.MeaMed)


def check_rules(
    rank: int, sizes: tuple[int, ...], reduction: str, wrapper: str, more: bool = False
) -> None:
    net, alone = make()
    ours = wrapped(net, wrapper)
    options: Any = {"loss_reduction": reduction}
    for make_rule in MORE_RULES if more else RULES:
        rule, theirs = make_rule(), make_rule()
        ours.zero_grad()
        alone.zero_grad()
        options["outvoted"] = isinstance(rule, OUTVOTING)
        for step in range(2):
            ids, classes, mine = batch(sizes, rank, step)
            # Norms that the pass has measured are not taken again.
            asked = [pc.SqNorms()] if step or isinstance(rule, pc.Reweight) else []
            with pc.aggregate(alone, theirs, *asked, **options) as expected:
                loss(alone, ids, classes, reduction).backward()
            world = dist.group.WORLD
            with pc.aggregate(ours, rule, *asked, group=world, **options) as found:
                loss(ours, ids[mine], classes[mine], reduction).backward()
            if asked:
                same(found.record.sq_norms, expected.record.sq_norms, f"{rule}: norms")
            check_grads(net, alone, f"{rule}: ")
            assert found.report.batch_size == sum(sizes)
            check_reports(found.report, expected.report)
            if theirs.__class__ is pc.CenteredClip:
                theirs.centre.reset()
                rule.centre.reset()


def check_reports(found: pc.Report, expected: pc.Report) -> None:
    whole = {name.removeprefix("module."): one for name, one in found.by_parameter.items()}
    assert whole.keys() == expected.by_parameter.keys()
    if expected.outvoted is not None:
        same(found.outvoted, expected.outvoted, "outvoted")
    for name, one in expected.by_parameter.items():
        for field, value in vars(one).items():
            if value is not None:
                same(getattr(whole[name], field), value, f"{field} of {name}")


@pytest.mark.parametrize("wrapper", ["", "ddp"])
@pytest.mark.parametrize("sizes", [(7,), (5, 4), (4, 0, 4), (1, 2, 5, 2)])
def test_rules_are_those_of_one_process(sizes: tuple[int, ...], wrapper: str) -> None:
    run_ranks(len(sizes), check_rules, sizes, "mean", wrapper)


@pytest.mark.parametrize("wrapper", ["", "ddp"])
def test_more_rules_are_those_of_one_process(wrapper: str) -> None:
    run_ranks(3, check_rules, (4, 0, 5), "mean", wrapper, True)


def test_rules_of_a_sum() -> None:
    run_ranks(2, check_rules, (5, 4), "sum", "ddp")


def check_not_finite(rank: int, sizes: tuple[int, ...]) -> None:
    for make_rule in (*RULES, *MORE_RULES):
        net, alone = nn.Linear(5, 2).double(), nn.Linear(5, 2).double()
        alone.load_state_dict(net.state_dict())
        for q in (net, alone):
            torch.nn.init.constant_(q.weight, 0.5)
            torch.nn.init.zeros_(q.bias)
        ours = DistributedDataParallel(net)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
        x[sum(sizes[:1]) + 1] = torch.nan
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for nonfinite in ("drop", "nan"):
            alone.zero_grad()
            ours.zero_grad()
            asked = (pc.SqNorms(), pc.Gram())
            with pc.aggregate(alone, make_rule(), *asked, nonfinite=nonfinite):
                alone(x).square().sum(1).mean().backward()
            options: Any = {"nonfinite": nonfinite, "group": dist.group.WORLD}
            with pc.aggregate(ours, make_rule(), *asked, **options):
                ours(x[mine]).square().sum(1).mean().backward()
            for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


def test_examples_that_are_not_finite_on_one_rank() -> None:
    run_ranks(3, check_not_finite, (4, 3, 3))


def check_bits(rank: int, sizes: tuple[int, ...]) -> None:
    """Whole numbers, whose sums do not round, so that order statistics have to be the same bits."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 7)).double()
    for p in net.parameters():
        p.data = torch.randint(-3, 4, p.shape, generator=generator).double()
    alone, ours = copy.deepcopy(net), DistributedDataParallel(net)
    x = torch.randint(-3, 4, (sum(sizes), 5), generator=generator).double()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for rule in (pc.Winsorized(1), pc.Median(), pc.TrimmedMean(1), pc.MeaMed(2)):
        ours.zero_grad()
        alone.zero_grad()
        with pc.aggregate(alone, rule, loss_reduction="sum"):
            alone(x).square().sum().backward()
        with pc.aggregate(ours, rule, loss_reduction="sum", group=dist.group.WORLD):
            ours(x[mine]).square().sum().backward()
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.equal(q.grad)


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (2, 3, 2, 1)])
def test_order_statistics_have_the_same_bits(sizes: tuple[int, ...]) -> None:
    run_ranks(len(sizes), check_bits, sizes)


def check_options(rank: int) -> None:
    """The options of the wrapper, accumulation, scaled losses and groups of rows."""
    sizes = (4, 6)
    for kwargs in (
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True, "bucket_cap_mb": 0.0001},
    ):
        net, alone = make()
        del net.unused, alone.unused
        ours = DistributedDataParallel(net, **kwargs)  # pyright: ignore
        for step in range(3):
            ours.zero_grad(set_to_none=step != 2)
            alone.zero_grad()
            ids, classes, mine = batch(sizes, rank, step)
            with pc.aggregate(alone, pc.Winsorized(1), loss_scale=8.0, group_size=2):
                (8 * loss(alone, ids, classes)).backward()
            options: Any = {"loss_scale": 8.0, "group_size": 2, "group": dist.group.WORLD}
            with pc.aggregate(ours, pc.Winsorized(1), **options):
                (8 * loss(ours, ids[mine], classes[mine])).backward()
            check_grads(net, alone, str(kwargs))
            with pc.collect(ours, pc.SqNorms(), pc.Gram(), **options) as record:
                (8 * loss(ours, ids[mine], classes[mine])).backward()
            with pc.collect(alone, pc.SqNorms(), pc.Gram(), loss_scale=8.0, group_size=2) as one:
                (8 * loss(alone, ids, classes)).backward()
            same(record.gram, one.gram, "gram")
            same(record.sq_norms, one.sq_norms, "norms")
    net, alone = make()
    ours = DistributedDataParallel(net, find_unused_parameters=True)
    for rule in (pc.Median(), pc.Krum(1)):  # accumulated over two batches, and averaged once
        ours.zero_grad()
        alone.zero_grad()
        options["outvoted"] = isinstance(rule, OUTVOTING)
        for step in range(2):
            ids, classes, mine = batch(sizes, rank, step)
            with pc.aggregate(alone, rule):
                loss(alone, ids, classes).backward()
            if step:
                with pc.aggregate(ours, rule, group=dist.group.WORLD):
                    loss(ours, ids[mine], classes[mine]).backward()
            else:
                with ours.no_sync(), pc.aggregate(ours, rule, group=dist.group.WORLD):
                    loss(ours, ids[mine], classes[mine]).backward()
        check_grads(net, alone, f"accumulated {rule}: ")


def test_options_of_the_wrapper() -> None:
    run_ranks(2, check_options)


def check_verbs(rank: int) -> None:
    sizes = (4, 0, 3)
    net, alone = make()
    ours, world = DistributedDataParallel(net, find_unused_parameters=True), dist.group.WORLD
    ids, classes, mine = batch(sizes, rank)
    own = (ids[mine], classes[mine])
    weights = torch.linspace(-1, 1, sum(sizes), dtype=torch.float64)
    for coef in (weights, lambda record: 1 / record.sq_norms.sqrt()):
        expected = pc.weighted_sum(alone, lambda m, b: loss(m, *b), (ids, classes), coef)
        found = pc.weighted_sum(ours, lambda m, b: loss(m, *b), own, coef, group=world)
        for name, value in expected.items():
            same(found[f"module.{name}"], value, name)
    with pc.collect(ours, pc.SqNorms(), keep_factors=True, group=world) as record:
        loss(ours, *own).backward()
    with pytest.raises(RuntimeError, match=r"record\.local\.weighted_sum"):
        record.weighted_sum(weights)
    part = record.local.weighted_sum(weights[mine])
    expected = pc.weighted_sum(alone, lambda m, b: loss(m, *b), (ids, classes), weights)
    for name, value in expected.items():
        total = part[f"module.{name}"].clone()
        dist.all_reduce(total)
        same(total, value, name)

    meter, whole = pc.CoherenceMeter(ours), pc.CoherenceMeter(alone)
    for step in range(2):
        ids, classes, mine = batch(sizes, rank, step)
        whole.update(lambda m, b: loss(m, *b), (ids, classes))
        if sizes[rank]:
            meter.update(lambda m, b: loss(m, *b), (ids[mine], classes[mine]))
    meter.all_reduce(world)
    assert meter.n == whole.n
    same(meter.compute().m, whole.compute().m, "meter")
    moved = copy.deepcopy(net)
    if rank == 2:
        nn.init.zeros_(moved.few.weight)
    meter = pc.CoherenceMeter(moved)
    meter.update(lambda m, b: loss(m, *b), (ids, classes))
    with pytest.raises(ValueError, match=r"same weights, got others on ranks \[2\]"):
        meter.all_reduce(world)


def test_other_verbs() -> None:
    run_ranks(3, check_verbs)


def check_verify(rank: int) -> None:
    net, _ = make()
    ours = DistributedDataParallel(net, find_unused_parameters=True)
    sizes = (2, 3)
    ids, classes, mine = batch(sizes, rank)
    options: Any = {"group": dist.group.WORLD}
    found = pc.verify(ours, lambda m, b: loss(m, *b), (ids[mine], classes[mine]), **options)
    assert found.failures == []
    # A loss that is no mean over the examples of one rank alone.
    wrong = 2.0 if rank else 1.0

    def bad(model: nn.Module, b: Any) -> Tensor:
        return loss(model, *b) * (wrong if len(b[0]) > 1 else 1.0)

    with pytest.raises(pc.VerificationError, match=r"squared norms off by"):
        pc.verify(ours, bad, (ids[mine], classes[mine]), **options)


def test_verify_together() -> None:
    run_ranks(2, check_verify)


def check_one_loss(rank: int) -> None:
    """A sum over the examples of all ranks, over their number: `.grad` is its gradient."""
    sizes, world = (3, 6), 2
    net, alone = make()
    ours = DistributedDataParallel(net, find_unused_parameters=True)
    ids, classes, mine = batch(sizes, rank)
    scale = world / sum(sizes)
    options: Any = {"loss_reduction": "sum", "loss_scale": scale, "group": dist.group.WORLD}
    with pc.collect(ours, pc.SqNorms(), **options) as record:
        (loss(ours, ids[mine], classes[mine], "sum") * scale).backward()
    with pc.collect(alone, pc.SqNorms()) as expected:
        loss(alone, ids, classes).backward()
    same(record.sq_norms, expected.sq_norms, "norms")
    same(record.coherence().m, expected.coherence().m, "coherence")
    check_grads(net, alone, "")


def test_uneven_batches_under_one_loss() -> None:
    run_ranks(2, check_one_loss)


def check_pairs(rank: int, sizes: tuple[int, ...]) -> None:
    """Each rank numbers its own examples; those of one process follow on each other."""
    ids, classes, own = batch(sizes, rank)
    net, alone = make()
    pairs, start = [], 0
    for size in sizes:
        pairs.append(start + torch.arange(size // 2).repeat(2))
        start += size // 2
    mine = pairs[rank] - pairs[rank].min() if sizes[rank] else pairs[rank]
    options: dict[str, Any] = {"group": dist.group.WORLD, "group_by": mine}
    for rule in (None, pc.Median(), pc.Krum(0)):
        net.zero_grad()
        alone.zero_grad()
        if rule is None:
            ours: Any = pc.collect(net, pc.SqNorms(), pc.Gram(), **options)
            theirs: Any = pc.collect(alone, pc.SqNorms(), pc.Gram(), group_by=torch.cat(pairs))
        else:
            ours = pc.aggregate(net, rule, **options)
            theirs = pc.aggregate(alone, rule, group_by=torch.cat(pairs))
        with ours as found:
            loss(net, ids[own], classes[own]).backward()
        with theirs as expected:
            loss(alone, ids, classes).backward()
        if rule is None:
            assert found.batch_size == sum(sizes) // 2
            same(found.gram, expected.gram, "gram")
            same(found.sq_norms, expected.sq_norms, "sq_norms")
        else:
            check_grads(net, alone, repr(rule))


def test_pairs_of_each_rank() -> None:
    run_ranks(2, check_pairs, (6, 2))


def check_noise(rank: int) -> None:
    net = nn.Linear(200, 50, bias=False).double()
    dist.broadcast(net.weight.data, 0)
    torch.manual_seed(rank)
    rule, x = pc.NormClip(1.0, 2.0), torch.zeros(2, 200, dtype=torch.float64)
    with pc.aggregate(net, rule, group=dist.group.WORLD, loss_reduction="sum"):
        net(x).sum().backward()
    assert net.weight.grad is not None
    assert abs(net.weight.grad.std().item() - 2.0) < 0.05
    others = net.weight.grad.clone()
    dist.broadcast(others, 0)
    assert others.equal(net.weight.grad)


def test_noise_is_added_once() -> None:
    run_ranks(2, check_noise)


def check_wrappers(rank: int) -> None:
    world = dist.group.WORLD
    x = torch.randn(4, 5)
    hooked = DistributedDataParallel(nn.Linear(5, 2))
    hooked.register_comm_hook(None, default_hooks.fp16_compress_hook)
    with (
        pytest.raises(pc.UnsupportedError, match=r"has a communication hook"),
        pc.aggregate(hooked, pc.Median(), group=world),
    ):
        hooked(x)
    alone = dist.new_group([rank], use_local_synchronization=True)
    plain = DistributedDataParallel(nn.Linear(5, 2))
    with (
        pytest.raises(pc.UnsupportedError, match=r"averages over the ranks \[0, 1\]"),
        pc.aggregate(plain, pc.Median(), group=alone),
    ):
        plain(x)
    with pytest.raises(pc.UnsupportedError, match=r"averages over the ranks \[0, 1\]"):
        pc.aggregate(plain, pc.NormClip(1.0), group=alone).__enter__()
    with pc.collect(plain.module, pc.Gram(), group=world) as record:  # what is inside the wrapper
        plain(x).sum().backward()
    assert record.gram.shape == (8, 8)
    with Join([plain]), pytest.raises(pc.UnsupportedError, match=r"given to Join"):
        pc.collect(plain, pc.SqNorms(), group=world).__enter__()


def test_wrappers_that_average_otherwise_are_refused() -> None:
    run_ranks(2, check_wrappers)


def check_uses(rank: int) -> None:
    """Groups of some ranks, unlike workspaces, gradients that are asked for, and half precision."""
    world = dist.group.WORLD
    for one in range(2):
        dist.new_group([one])
    if rank == 0:
        with pc.collect(
            nn.Linear(5, 2), pc.SqNorms(), group=dist.new_group([0], use_local_synchronization=True)
        ):
            pass
    net, alone = make()
    ours = DistributedDataParallel(net, find_unused_parameters=True)
    sizes = (5, 4)
    ids, classes, mine = batch(sizes, rank)
    pc.set_workspace(200 if rank else None)
    with pc.collect(alone, pc.Gram()) as expected:
        loss(alone, ids, classes).backward()
    with pc.collect(ours, pc.Gram(), group=world) as record:
        loss(ours, ids[mine], classes[mine]).backward()
    pc.set_workspace(None)
    same(record.gram, expected.gram, "gram")
    used = [name for name, _ in net.named_parameters() if "unused" not in name]
    with pc.aggregate(alone, pc.Median()):
        leaves = [dict(alone.named_parameters())[name] for name in used]
        wanted = torch.autograd.grad(loss(alone, ids, classes), leaves)
    with pc.aggregate(ours, pc.Median(), group=world):
        leaves = [dict(net.named_parameters())[name] for name in used]
        found = torch.autograd.grad(loss(ours, ids[mine], classes[mine]), leaves)
    for name, a, b in zip(used, found, wanted, strict=True):
        same(a, b, name)
    half = DistributedDataParallel(nn.Linear(1, 1, bias=False).half())
    x = torch.full((2, 1), 40000.0, dtype=torch.float16)
    with pc.aggregate(half, pc.Median(), group=world):
        half(x).mean().backward()
    assert half.module.weight.grad.item() == 40000  # pyright: ignore


def check_half(rank: int) -> None:
    """All examples on one rank: the shares are one and zero, and all send the same dtype."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3).bfloat16(), torch.randn(8, 6).bfloat16()
    alone = copy.deepcopy(net)
    with pc.aggregate(alone, pc.Median()):
        alone(x).square().mean(1).mean().backward()
    with pc.aggregate(net, pc.Median(), group=dist.group.WORLD):
        net(x[: 0 if rank else 8]).square().mean(1).mean().backward()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_half_precision_with_all_examples_on_one_rank() -> None:
    run_ranks(2, check_half)


def test_other_uses() -> None:
    run_ranks(2, check_uses)


def check_groups(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    net, alone = make()
    sizes = (1, 2, 3, 2)
    ids, classes, mine = batch(sizes, rank)
    with pc.collect(alone, pc.Gram()) as whole:
        loss(alone, ids, classes).backward()
    with pc.collect(net, pc.Gram(), group=mesh) as record:
        loss(net, ids[mine], classes[mine]).backward()
    same(record.gram, whole.gram, "mesh of two dimensions")
    with pc.collect(net, pc.Gram(), group=mesh["a"]) as record:
        loss(net, ids[mine], classes[mine]).backward()
    order = [i for r in (rank % 2, rank % 2 + 2) for i in range(*batch(sizes, r)[2].indices(8))]
    same(record.gram, whole.gram[order][:, order], "one dimension")


def test_groups_and_meshes() -> None:
    run_ranks(4, check_groups)


def test_what_is_no_group_is_refused() -> None:
    model: Any = nn.Linear(2, 1)
    for verb in (
        lambda group: pc.collect(model, pc.SqNorms(), group=group),
        lambda group: pc.aggregate(model, pc.Median(), group=group),
    ):
        with pytest.raises(TypeError, match=r"ProcessGroup, a DeviceMesh or None, got 3"):
            verb(3)
