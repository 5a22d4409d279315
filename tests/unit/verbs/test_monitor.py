"""Statistics of the steps of a training loop: pooled over micro-batches, and written down."""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import joined, per_example_gradients
from torch import Tensor, nn

import pycoherence as pc


def make() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return joined(per_example_gradients(model, loss_fn, (x, y)))


def run(monitor: pc.GradientMonitor, model: nn.Module, x: Tensor, y: Tensor, sizes: Any) -> Any:
    for part in zip(x.split(sizes), y.split(sizes), strict=True):
        with monitor.micro_batch(loss_scale=1 / len(sizes)):
            (loss_fn(model, part) / len(sizes)).backward()
    return monitor.step()


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (10, 1)])
def test_scalars_are_those_of_the_gradients(sizes: tuple[int, ...]) -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model, pc.SqNorms(), pc.Gram(), pc.Dots("mean"))
    found = run(monitor, model, x, y, sizes)
    rows = rows_of(model, x, y)
    parts = rows.split(sizes)
    norms = rows.norm(dim=1).sort().values
    s = sum(p.sum(0).square().sum().item() for p in parts)
    q = rows.square().sum().item()
    pairs = sum(n * (n - 1) for n in sizes)
    gram = [p @ p.T for p in parts]
    cosines = [g / p.norm(dim=1) / p.norm(dim=1)[:, None] for g, p in zip(gram, parts, strict=True)]
    signal = sum((g.sum() - g.trace()).item() for g in gram) / pairs
    spread = sum((p - p.mean(0)).square().sum().item() for p in parts)
    variance = spread / sum(n - 1 for n in sizes)
    dots = torch.cat([p @ p.mean(0) for p in parts])
    expected = {
        "batch_size": 11,
        "norm/mean": norms.mean().item(),
        "norm/median": norms[5].item(),
        "norm/q90": norms[9].item(),
        "norm/max": norms[10].item(),
        "coherence/m": s / q,
        "coherence/unbiased_alpha": signal / (q / 11),
        "gradient/sq_norm": signal,
        "gradient/variance": variance,
        "noise_scale": variance / signal,
        "cosine/mean": sum((c.sum() - c.trace()).item() for c in cosines) / pairs,
        "dots/mean": dots.mean().item(),
        "dots/negative": (dots < 0).sum().item() / 11,
    }
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)
    assert [len(r.sq_norms) for r in monitor.records] == [*sizes]
    norms = torch.cat([r.sq_norms for r in monitor.records])
    torch.testing.assert_close(norms, rows.square().sum(1))


def test_one_batch_agrees_with_its_coherence() -> None:
    model, x, y = make()
    with pc.collect(model, pc.SqNorms()) as record:
        loss_fn(model, (x, y)).backward()
    coherence, found = record.coherence(), record.scalars()
    assert found["coherence/m"] == pytest.approx(coherence.m)
    assert found["coherence/unbiased_alpha"] == pytest.approx(coherence.unbiased_alpha)
    assert found["noise_scale"] == pytest.approx(coherence.noise_scale)
    s, q = coherence.sum_sq_norm, coherence.total_sq_norm
    assert found["gradient/sq_norm"] == pytest.approx(pc.metrics.gradient_sq_norm(s, q, 11))
    assert found["gradient/variance"] == pytest.approx(pc.metrics.gradient_variance(s, q, 11))


def test_every() -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model, every=3)
    found = [run(monitor, model, x, y, (5, 6)) for _ in range(7)]
    assert [at is not None for at in found] == [True, False, False, True, False, False, True]
    assert [at["step"] for at in monitor.history] == [0, 3, 6]
    assert len(monitor.records) == 2
    assert repr(monitor) == "GradientMonitor(steps=7, measured=3)"


@pytest.mark.parametrize("every", [1, 2])
def test_a_rule_runs_at_every_step(every: int) -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model, rule=pc.NormClip(0.5), every=every)
    rows = rows_of(model, x, y)
    clipped = rows * (0.5 / rows.norm(dim=1)).clamp(max=1)[:, None]
    for step in range(2):
        model.zero_grad()
        found = run(monitor, model, x, y, (5, 6))
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected = (clipped[:5].mean(0) + clipped[5:].mean(0)) / 2
        torch.testing.assert_close(flat, expected)
        if step % every == 0:
            shares = [(p.norm(dim=1) > 0.5).double().mean().item() for p in rows.split([5, 6])]
            assert found["rule/clipped"] == pytest.approx(sum(shares) / 2)
            assert len(monitor.reports) == 2
    torch.testing.assert_close(monitor.records[1].sq_norms, rows[5:].square().sum(1))


def test_noise_scale_over_steps() -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model)
    for seed in range(4):
        torch.manual_seed(seed)
        run(monitor, model, torch.randn_like(x), y, (11,))
    sides = [(at["gradient/variance"], at["gradient/sq_norm"]) for at in monitor.history]
    for last in (None, 2, 9):
        variance, signal = (sum(x) for x in zip(*sides[-(last or 4) :], strict=True))
        assert monitor.noise_scale(last) == pytest.approx(variance / signal)
    with pytest.raises(ValueError, match="expected last to be at least 1"):
        monitor.noise_scale(0)
    with pytest.raises(RuntimeError, match="no step has measured norms"):
        pc.GradientMonitor(model, pc.Gram()).noise_scale()


def test_noise_scale_leaves_out_steps_that_cannot_tell() -> None:
    model, x, y = make()
    monitor, single = pc.GradientMonitor(model), pc.GradientMonitor(model)
    found = [run(monitor, model, x[:n], y[:n], (n,)) for n in (4, 1, 6)]
    sides = [(at["gradient/variance"], at["gradient/sq_norm"]) for at in (found[0], found[2])]
    monitor.history[1]["gradient/variance"] = monitor.history[1]["gradient/sq_norm"] = math.nan
    for last in (None, 2):
        variance, signal = (sum(x) for x in zip(*sides, strict=True))
        assert monitor.noise_scale(last) == pytest.approx(variance / signal)
    run(single, model, x[:1], y[:1], (1,))
    single.history[0]["gradient/sq_norm"] = math.nan
    with pytest.raises(RuntimeError, match="of two examples or more"):
        single.noise_scale()


RULES = [
    pc.NormClip(1.0, expected_batch_size=4),
    pc.AutoClip(1.0),
    pc.AdaptiveClip(1.0, expected_batch_size=4),
    pc.CenteredClip(1.0),
    pc.GeometricMedian(),
    pc.Winsorized(1),
    pc.SignAgreement(0.5),
    pc.NNM(1, pc.NormClip(1.0)),
    pc.ARC(1, pc.Median()),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first", [5, 0])
def test_an_empty_step_of_a_rule_has_the_columns_of_others(
    rule: Any, first: int, tmp_path: Path
) -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    monitor = pc.GradientMonitor(model, rule=rule, log=tmp_path / "steps.csv")

    def step(*sizes: int) -> Any:
        for n in sizes:
            with monitor.micro_batch(loss_reduction="sum"):
                model(x[:n]).square().sum().backward()
        return monitor.step()

    steps = [step(first), step(5 - first), step(5, 0)]
    shares = [name for name in ("rule/clipped", "rule/iterations") if name in steps[0]]
    for name in shares:
        empty = next(at for at in steps if not at["batch_size"])
        assert empty[name] == 0 or math.isnan(empty[name])
        assert math.isfinite(steps[2][name])  # an empty part of a step does not count
    assert all(math.isfinite(c) for c in rule.state_dict().get("threshold", {}).values())


def test_an_error_leaves_no_block_open() -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model)
    with pytest.raises(ZeroDivisionError), monitor.micro_batch():
        _ = 1 / 0
    unseen = pytest.raises(RuntimeError, match="no backward pass of the model was seen")
    with unseen, monitor.micro_batch():
        loss_fn(model, (x, y))
    monitor.open()
    with pytest.raises(RuntimeError, match="a micro-batch is open"):
        monitor.open()
    with pytest.raises(RuntimeError, match=r"call close\(\) or abandon\(\) before step"):
        monitor.step()
    monitor.abandon()
    monitor.abandon()
    monitor.close()
    assert monitor.step() is None
    assert run(monitor, model, x, y, (11,))["batch_size"] == 11


def test_a_rule_is_left_too() -> None:
    model, x, y = make()
    monitor = pc.GradientMonitor(model, rule=pc.Median())
    monitor.open()
    monitor.abandon()
    unseen = pytest.raises(RuntimeError, match="no backward pass of the model was seen")
    with unseen, monitor.micro_batch():
        loss_fn(model, (x, y))
    assert run(monitor, model, x, y, (11,))["batch_size"] == 11


@pytest.mark.parametrize("seed", range(5))
def test_small_batches_have_no_spread(seed: int) -> None:
    model, x, y = make()
    x = x + seed
    model, x = model.float(), x.float()  # so that both sums differ by rounding
    found = run(pc.GradientMonitor(model), model, x[:1], y[:1], (1,))
    assert found["norm/max"] == found["norm/median"] > 0
    assert found["coherence/m"] == pytest.approx(1)
    assert all(math.isnan(found[n]) for n in ("noise_scale", "gradient/variance"))
    with pc.collect(model, pc.SqNorms(), pc.Gram(), pc.Dots("mean"), loss_reduction="sum") as empty:
        model(x[:0]).sum().backward()
    scalars = empty.scalars()
    assert scalars.pop("batch_size") == 0
    assert all(math.isnan(value) for value in scalars.values())


def test_csv(tmp_path: Path) -> None:
    model, x, y = make()
    path = tmp_path / "steps.csv"
    monitor = pc.GradientMonitor(model, log=path)
    first = run(monitor, model, x, y, (11,))
    run(pc.GradientMonitor(model, log=str(path)), model, x, y, (11,))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "0"]
    assert {name: float(value) for name, value in rows[1].items()} == {"step": 0, **first}
    other = pc.GradientMonitor(model, pc.Gram(), log=path)
    with pytest.raises(ValueError, match="write to another file"):
        run(other, model, x, y, (11,))


def test_other_places() -> None:
    model, x, y = make()
    seen: list[Any] = []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    class Run:
        def log(self, data: dict[str, float], step: int) -> None:
            seen.append((data, step))

    found = run(pc.GradientMonitor(model, log=Writer()), model, x, y, (11,))
    assert seen == [(name, value, 0) for name, value in found.items()]
    seen.clear()
    found = run(pc.GradientMonitor(model, log=Run()), model, x, y, (11,))
    assert seen == [(found, 0)]
    seen.clear()
    found = run(pc.GradientMonitor(model, log=lambda *got: seen.append(got)), model, x, y, (11,))
    assert seen == [(found, 0)]


def test_a_tensorboard_file_is_read_back(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, x, y = make()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        monitor = pc.GradientMonitor(model, every=2, log=writer)
        for _ in range(3):
            run(monitor, model, x, y, (5, 6))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("norm/mean", "noise_scale"):
        read = events.Scalars(name)
        assert [at.step for at in read] == [0, 2]
        assert [at.value for at in read] == pytest.approx([at[name] for at in monitor.history])


def test_bad_arguments() -> None:
    model, _, _ = make()
    for log in (3, logging.getLogger(), object()):
        with pytest.raises(TypeError, match="expected log to be a function"):
            pc.GradientMonitor(model, log=log)
    with pytest.raises(ValueError, match=r"ends in .csv, got the path 'steps.txt'"):
        pc.GradientMonitor(model, log="steps.txt")
    with pytest.raises(ValueError, match="expected every to be at least 1, got 0"):
        pc.GradientMonitor(model, every=0)
    with pytest.raises(ValueError, match="together with a rule"):
        pc.GradientMonitor(model, nonfinite="drop")
    with pytest.raises(TypeError, match="write SqNorms"):
        pc.GradientMonitor(model, pc.SqNorms)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected a rule such as"):
        pc.GradientMonitor(model, rule=3)  # pyright: ignore[reportArgumentType]


def test_noise_comes_with_the_last_micro_batch() -> None:
    model, x, y = make()
    rule = pc.NormClip(1.0, 50.0, torch.Generator().manual_seed(1), expected_batch_size=11)
    monitor = pc.GradientMonitor(model, rule=rule)
    sizes: list[float] = []
    for last in (False, False, True):
        with monitor.micro_batch(last=last):
            loss_fn(model, (x, y)).backward()
        sizes.append(max(p.grad.abs().max().item() for p in model.parameters()))  # pyright: ignore
    assert max(sizes[:2]) < 3 < sizes[2]


def test_pairs_of_rows_are_one_example() -> None:
    model, x = nn.Linear(3, 2), torch.randn(10, 3)
    monitor = pc.GradientMonitor(model, group_by=lambda rows: torch.arange(rows // 2).repeat(2))
    for part in x.split([6, 4]):
        with monitor.micro_batch():
            chosen, rejected = model(part).sum(1).chunk(2)
            nn.functional.softplus(rejected - chosen).mean().backward()
    found = monitor.step()
    assert found is not None
    assert found["batch_size"] == 5
    assert [record.batch_size for record in monitor.records] == [3, 2]
