"""Autocast: statistics are those of the same pass, one example at a time, but for rounding."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Uses, embedding, linear, normal, uses
from support.checks import assert_grads_equal, assert_sums, relative_error
from support.oracle import LossFn
from torch import Tensor, nn

import pycoherence as pc

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

B, T = 4, 3
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
X = torch.randn(B, T, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 3], [1, 0, 2]])


def tied(m: Uses, ids: Tensor) -> Tensor:
    """A table that is looked up, and multiplied with in another dtype."""
    return F.linear(m.norm(m.inner(m.table(ids))).tanh(), m.table.weight)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(T, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU(), nn.ConvTranspose1d(5, 2, 2)
    )


TIED = {"table": embedding(5, 6), "norm": lambda: nn.LayerNorm(6), "inner": linear(6, 6)}
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), X),
    "norms": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6, 1e-5)), X),
    "batch-norm": (lambda: nn.Sequential(nn.Conv1d(T, 5, 1), nn.BatchNorm1d(5).eval()), X),
    "instance-norm": (lambda: nn.Sequential(nn.InstanceNorm1d(T, affine=True), nn.Linear(6, 2)), X),
    "convolutions": (convolutions, X),
    "tied": (uses(tied, **TIED), IDS),
    "embedding-bag": (lambda: nn.Sequential(nn.EmbeddingBag(5, 6), nn.Linear(6, 2)), IDS),
    "matmul": (uses(lambda m, x: (x @ m.p) @ m.p.mT, p=normal(6, 5)), X),
    "rmatmul": (uses(lambda m, x: m.p @ x, p=normal(5, T)), X),
    "addmm": (uses(lambda m, x: torch.addmm(m.b, x[:, 0], m.p), p=normal(6, 5), b=normal(5)), X),
    "einsum": (uses(lambda m, x: torch.einsum("bti,oi->bto", x, m.p), p=normal(5, 6)), X),
    "numbers": (uses(lambda m, x: F.linear(x, m.q) * m.p + m.p, p=normal(5), q=normal(5, 6)), X),
    "made": (uses(lambda m, x: F.linear(x, (m.q * 2) @ m.p), p=normal(5, 6), q=normal(7, 5)), X),
    "slice": (uses(lambda m, x: F.linear(x, m.p[1:4, :6]), p=normal(5, 7)), X),
}


def squares(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x).float().flatten(1)
    return (out - torch.linspace(-1, 1, out.shape[1])).square().mean(1).mean()


def autocast(loss: LossFn, dtype: torch.dtype, scale: float = 1.0) -> LossFn:
    @functools.wraps(loss)
    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            found = loss(model, x)
        return found * scale

    return run


def one_by_one(model: nn.Module, loss: LossFn, x: Tensor) -> dict[str, Tensor]:
    """The gradients of each example, of the same pass, by plain autograd."""
    found = []
    for b in range(len(x)):
        alone = copy.deepcopy(model)
        loss(alone, x[b : b + 1]).backward()
        found.append([p.grad for p in alone.parameters() if p.grad is not None])
    names = [name for name, _ in model.named_parameters()]
    return {n: torch.stack(g) for n, g in zip(names, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_and_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build, x = MODELS[name]
    model, loss = build(), autocast(squares, dtype)
    truth, plain = one_by_one(model, loss, x), copy.deepcopy(model)
    loss(plain, x).backward()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    statistics = pc.SqNorms(), pc.Gram(), pc.Dots(direction)
    with pc.collect(model, *statistics, keep_factors=True) as record:
        loss(model, x).backward()
    eps, coef = torch.finfo(dtype).eps, torch.linspace(-1, 2, B)
    assert_sums(record.weighted_sum(coef), truth, coef, 16 * eps)
    for n, g in truth.items():
        flat, one = g.flatten(1), record.by_parameter[n]
        assert one.sq_norms.dtype == torch.float32
        assert relative_error(one.sq_norms, flat.square().sum(1)) < 8 * eps, n
        assert relative_error(one.gram, flat @ flat.T) < 8 * eps, n
        along = flat @ direction[n].flatten()
        near = 8 * eps * flat.norm(dim=1) * direction[n].norm()
        assert ((one.dots - along).abs() < near).all(), n
        assert model.get_parameter(n).grad.dtype == torch.float32
    assert_grads_equal(model, plain, 16 * eps)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_autocast(name: str) -> None:
    """Bit for bit, and of the same dtype."""
    torch.manual_seed(0)
    build, x = MODELS[name]
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with pc.collect(model, pc.SqNorms()):
            ours = model(x)
    assert ours.dtype == plain.dtype
    assert torch.equal(ours, plain)


def test_the_gradient_of_the_input_is_that_of_autocast() -> None:
    model, found = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), []
    for captured in (False, True):
        x = X.clone().requires_grad_()
        with pc.collect(model, pc.SqNorms()) if captured else torch.enable_grad():
            autocast(squares, torch.bfloat16)(model, x).backward()
        found.append(x.grad)
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)


def test_a_backward_pass_inside_autocast() -> None:
    model = MODELS["linear"][0]()
    with torch.autocast("cpu", torch.bfloat16), pc.collect(model, pc.SqNorms()) as record:
        squares(model, X).backward()
    truth = one_by_one(model, autocast(squares, torch.bfloat16), X)
    total = torch.stack([g.flatten(1).square().sum(1) for g in truth.values()]).sum(0)
    assert relative_error(record.sq_norms, total) < 8 * torch.finfo(torch.bfloat16).eps


def test_the_general_fallback_runs_in_autocast() -> None:
    def unknown(m: Uses, x: Tensor) -> Tensor:
        return torch.trapezoid(x, m.p) + torch.trapezoid(x, m.q)

    model = Uses(unknown, p=torch.randn(6), q=torch.randn(6))
    truth = one_by_one(model, autocast(squares, torch.bfloat16), X)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pc.collect(model, pc.SqNorms(), on_unsupported="vmap") as record,
    ):
        loss = squares(model, X)
        loss.backward()
    assert list(record.fallbacks) == ["p", "q"]
    for name, g in truth.items():
        norms = record.by_parameter[name].sq_norms
        assert relative_error(norms, g.flatten(1).square().sum(1)) < 0.05


def test_other_verbs_under_autocast() -> None:
    model = MODELS["linear"][0]()
    loss = autocast(squares, torch.bfloat16)
    truth = one_by_one(model, loss, X)
    coef = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert_sums(pc.weighted_sum(model, loss, X, coef), truth, coef, 0.1)
    meter = pc.CoherenceMeter(model)
    meter.update(loss, X)
    with pc.aggregate(model, pc.Median()):
        loss(model, X).backward()
    for name, p in model.named_parameters():
        ordered = truth[name].sort(0).values
        assert p.grad is not None
        assert relative_error(p.grad, ordered[1:3].mean(0)) < 0.1, name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lists_are_torchs(device: str) -> None:
    """What we leave as it is is in none of torch's lists; what we cast is in one."""
    from pycoherence.capture import autocast as ours

    listed = functools.partial(ours._is_listed, device=device)
    for name in ours._AS_THEY_ARE:
        assert not listed(name), name
    cast = ours._LOWER | ours._FLOAT32 | ours._WIDEST
    missing = {name for name in cast if not listed(name)}
    on_cpu = {"mv", "addmv", "einsum", *ours._FLOAT32, *ours._WIDEST}
    assert missing <= (on_cpu if device == "cpu" else {"addmv", "rms_norm"})


@pytest.mark.parametrize("given", ["number", "scaler"])
def test_the_scale_of_the_loss_is_divided_out(given: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = MODELS["linear"][0]()
    loss = autocast(squares, torch.float16)
    plain, direction = copy.deepcopy(model), {n: torch.ones_like(p) for n, p in named(model)}
    scaler.scale(loss(plain, X)).backward()
    found = []
    for scale in (1.0, scaler if given == "scaler" else 1024.0):
        model.zero_grad()
        statistics = pc.SqNorms(), pc.Gram(), pc.Dots(direction), pc.Moments()
        options: dict[str, Any] = {"loss_scale": scale, "keep_factors": True}
        with pc.collect(model, *statistics, **options) as record:
            total = loss(model, X)
            (total if scale == 1.0 else scaler.scale(total)).backward()
        found.append(record)
        if given == "scaler" and scale is scaler:
            scaler.update(4096.0)  # after the pass: nothing changes
    bias = [record.by_parameter["0.bias"] for record in found]
    for name in ("sq_norms", "gram", "dots", "first_moment", "second_moment"):
        ones = found if hasattr(type(found[0]), name) and "moment" not in name else bias
        assert relative_error(*(getattr(one, name) for one in reversed(ones))) < 0.01, name
    assert found[0].coherence().m == pytest.approx(found[1].coherence().m, rel=0.01)
    sums = [record.weighted_sum(torch.ones(B)) for record in found]
    assert all(relative_error(sums[1][name], sums[0][name]) < 0.01 for name, _ in named(model))
    assert_grads_equal(model, plain, 0.01)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


RULES = [pc.Winsorized(1), pc.NormClip(0.05), pc.GeometricMedian(), pc.CenteredClip(0.05)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_aggregates_of_a_scaled_loss(rule: Any, reduction: Any) -> None:
    """As of the loss itself; `.grad` is scaled, and the scaler divides it before the step."""
    models = [MODELS["linear"][0]() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    loss = autocast(squares, torch.float16, 1.0 if reduction == "mean" else B)
    with pc.aggregate(models[0], copy.deepcopy(rule), loss_reduction=reduction):
        loss(models[0], X).backward()
    with pc.aggregate(models[1], copy.deepcopy(rule), loss_reduction=reduction, loss_scale=scaler):
        scaler.scale(loss(models[1], X)).backward()
    scaler.unscale_(optimizer)
    assert_grads_equal(models[1], models[0], 0.02)


def test_overflow_shows_as_inf_and_the_scaler_skips_the_step() -> None:
    model = MODELS["linear"][0]()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pc.collect(model, pc.SqNorms(), loss_scale=scaler) as record:
        scaler.scale(autocast(squares, torch.float16)(model, X)).backward()
    assert not record.sq_norms.isfinite().any()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_scale_that_changes_inside_the_block_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 2)})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pc.collect(model, pc.SqNorms(), loss_scale=scaler):
        scaler.scale(model["a"](X).sum()).backward()
        scaler.update(8.0)
        with pytest.raises(pc.UnsupportedError, match=r"4\.0.*8\.0.*update\(\) after the block"):
            scaler.scale(model["b"](X).sum()).backward()


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1.0, ValueError), ("x", TypeError), (True, TypeError)]
)
def test_what_is_no_scale(value: Any, error: type[Exception]) -> None:
    for verb in (
        lambda: pc.collect(nn.Linear(2, 1), pc.SqNorms(), loss_scale=value),
        lambda: pc.aggregate(nn.Linear(2, 1), pc.Median(), loss_scale=value),
    ):
        with pytest.raises(error, match="loss_scale"):
            verb()
