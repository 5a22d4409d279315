"""In a loop with accelerate, statistics are those of one example at a time, at every step."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from support.checks import relative_error
from support.oracle import joined, per_example_gradients
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pycoherence as pc
from pycoherence.integrations.accelerate import PerExampleMonitor

EXACT = 1e-5
"""In float32, against one example at a time in float64."""

V, T = 7, 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerators share their state within a process."""
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, V))


def tokens(n: int, *, padded: bool) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(V, (n, T), generator=g) for _ in range(2))
    if padded:
        for b in range(n):
            labels[b, : b % 4] = -100
    return TensorDataset(ids, labels)


def own_sum(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="sum")


def own_mean(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    kept = (batch[1] != -100).sum(1)
    losses = F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)
    return (losses / kept).mean()


def truth(model: nn.Module, loss: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Norms `[B]`, one at a time, at the weights of now."""
    return joined(per_example_gradients(model, loss, batch)).square().sum(1).sqrt()


def train(
    accelerator: Accelerator, data: TensorDataset, *, by: str = "mean", **options: Any
) -> tuple[PerExampleMonitor, list[float], list[int]]:
    """A loop as people write it; the worst error of norms by micro-batch, and parts of steps."""
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=3)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, loader)
    monitor = PerExampleMonitor(accelerator, model, pc.SqNorms(), **options)
    wanted, errors, parts = list[Tensor](), list[float](), list[int]()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = own_mean if by == "mean" else own_sum
            wanted.append(truth(plain, loss, tuple(batch)))
            if by == "mean":
                with monitor.micro_batch():
                    accelerator.backward(own_mean(model, batch))
            elif by == "sum":
                with monitor.micro_batch(loss_reduction="sum", loss_scale=1 / 17):
                    accelerator.backward(own_sum(model, batch) / 17)
            else:
                with monitor.micro_batch(loss_reduction="sum"):
                    own_sum(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor.step() is not None:
                parts.append(len(wanted))
                found = [record.sq_norms.sqrt() for record in monitor.records]
                pairs = zip(found, wanted, strict=True)
                errors += [relative_error(one, other) for one, other in pairs]
            if accelerator.sync_gradients:
                wanted.clear()
    return monitor, errors, parts


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("by", ["mean", "sum", "backward"])
def test_norms_are_those_of_one_example_at_a_time(by: str, accumulate: int, padded: bool) -> None:
    """At every step, also the last, which has fewer micro-batches, and a smaller one."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    _, errors, parts = train(accelerator, tokens(16, padded=padded), by=by)
    assert parts == ([1] * 6 if accumulate == 1 else [4, 2])
    assert max(errors) < EXACT


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_grad_scaler(accumulate: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    _, errors, _ = train(accelerator, tokens(16, padded=True))
    assert accelerator.scaler.get_scale() > 2.0**8
    assert max(errors) < EXACT


def test_bfloat16() -> None:
    """Norms are those of a block by hand under the same autocast."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    plain, other = network(), network()
    model = accelerator.prepare(plain)
    monitor = PerExampleMonitor(accelerator, model)
    batch = tokens(4, padded=True).tensors
    with monitor.micro_batch():
        accelerator.backward(own_mean(model, batch))
    with pc.collect(other, pc.SqNorms()) as record:
        with torch.autocast("cpu", torch.bfloat16):
            logits = other(batch[0])
        own_mean(lambda _: logits.float(), batch).backward()
    assert relative_error(monitor.records[0].sq_norms, record.sq_norms.double()) < EXACT


def test_a_rule_fills_the_gradient() -> None:
    """Its radius is in units of the loss that accelerate is given."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    monitor = PerExampleMonitor(accelerator, model, rule=pc.NormClip(0.5))
    data = tokens(6, padded=True).tensors
    want: dict[str, Tensor] = {}
    for rows in (slice(0, 3), slice(3, 6)):
        batch = tuple(x[rows] for x in data)
        gradients = per_example_gradients(model, own_mean, batch)
        coef = (0.5 / truth(model, own_mean, batch)).clamp(max=1) / 3 / 2
        assert (coef < 1 / 6).any()
        for name, g in gradients.items():
            part = torch.einsum("b,b...->...", coef, g)
            want[name] = want[name] + part if name in want else part
        with accelerator.accumulate(model), monitor.micro_batch():
            accelerator.backward(own_mean(model, batch))
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, want[name]) < EXACT
    scalars = monitor.step()
    assert scalars is not None
    assert 0 < scalars["rule/clipped"] <= 1


@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_step_was_expected_to_have_is_its_only_divisor(scaled: bool) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = accelerator.prepare(network())
    monitor = PerExampleMonitor(accelerator, model, rule=pc.NormClip(0.5, expected_batch_size=50))
    data = tokens(6, padded=True).tensors
    want = torch.zeros(sum(p.numel() for p in model.parameters())).double()
    for rows in (slice(0, 3), slice(3, 6)):
        batch = tuple(x[rows] for x in data)
        gradients = joined(per_example_gradients(model, own_mean, batch))
        want += (0.5 / gradients.norm(dim=1)).clamp(max=1) @ gradients / 50
        with accelerator.accumulate(model), monitor.micro_batch():
            accelerator.backward(own_mean(model, batch))
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative_error(found, want * (8 if scaled else 1)) < EXACT


def test_trackers_of_the_accelerator_are_written_to(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    monitor, _, _ = train(accelerator, tokens(12, padded=True), log=accelerator, every=2)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name in ("norm/median", "coherence/m", "noise_scale"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(at["step"], pytest.approx(at[name], rel=1e-6)) for at in monitor.history]
    assert [at["step"] for at in monitor.history] == [0, 2]


def test_an_error_leaves_nothing_open() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(network())
    monitor = PerExampleMonitor(accelerator, model)
    with pytest.raises(ZeroDivisionError), monitor.micro_batch():
        raise ZeroDivisionError
    assert "backward" not in vars(accelerator)
    with monitor.micro_batch():
        accelerator.backward(own_mean(model, tokens(2, padded=False).tensors))
    assert monitor.records[0].batch_size == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_a_backward_that_cannot_be_seen_is_refused(scaled: bool) -> None:
    """Its division by the number of micro-batches would be taken for the loss's own."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if scaled else 4)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu")
    model = accelerator.prepare(network())
    backward, batch = accelerator.backward, tokens(2, padded=False).tensors
    monitor = PerExampleMonitor(accelerator, model)
    with (
        pytest.raises(pc.UnsupportedError, match=r"by a reference.*write accelerator\.backward"),
        monitor.micro_batch(),
    ):
        backward(own_mean(model, batch))
    assert all(p.grad is None for p in model.parameters())
    with monitor.micro_batch():
        accelerator.backward(own_mean(model, batch))
    assert relative_error(monitor.records[0].sq_norms.sqrt(), truth(model, own_mean, batch)) < EXACT


def test_a_backward_from_before_the_block_that_scales_nothing_is_fine() -> None:
    accelerator = Accelerator(cpu=True)
    model, batch = accelerator.prepare(network()), tokens(2, padded=False).tensors
    backward, monitor = accelerator.backward, PerExampleMonitor(accelerator, model)
    with monitor.micro_batch():
        backward(own_mean(model, batch))
    assert relative_error(monitor.records[0].sq_norms.sqrt(), truth(model, own_mean, batch)) < EXACT


REFUSALS = {
    "compiled": "is compiled.*leave the compiler out",
    "FSDP1": "FSDP1 flattens.*take FSDP2",
    "DeepSpeed": "DeepSpeed runs.*take DistributedDataParallel",
    "Megatron": "Megatron-LM runs.*take DistributedDataParallel",
    "LOMO": r"inside backward\(\).*steps after it",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_settings_are_refused(name: str) -> None:
    backend = SimpleNamespace(value="EAGER" if name == "compiled" else "NO")
    kinds = {
        "FSDP1": DistributedType.FSDP,
        "DeepSpeed": DistributedType.DEEPSPEED,
        "Megatron": DistributedType.MEGATRON_LM,
    }
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend)),
        distributed_type=kinds.get(name, DistributedType.NO),
        is_fsdp2=False,
        has_lomo_optimizer=name == "LOMO",
    )
    with pytest.raises(pc.UnsupportedError, match=REFUSALS[name]):
        PerExampleMonitor(accelerator, network())


@pytest.mark.parametrize("scale", [0.0, "2", torch.amp.GradScaler("cpu")])
def test_scales_that_are_no_numbers_are_refused(scale: Any) -> None:
    accelerator = Accelerator(cpu=True)
    monitor = PerExampleMonitor(accelerator, network())
    with (
        pytest.raises((TypeError, ValueError), match="expected loss_scale"),
        monitor.micro_batch(loss_scale=scale),
    ):
        pass


def ranks_train(rank: int) -> tuple[list[float], list[int]]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    reset()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    try:
        _, errors, parts = train(accelerator, tokens(17, padded=True))
    finally:
        reset()
    return errors, parts


@pytest.mark.slow
@needs_gloo
def test_distributed_data_parallel() -> None:
    for errors, parts in run_ranks(2, ranks_train, timeout=120):
        assert parts == [2, 1]
        assert max(errors) < EXACT
