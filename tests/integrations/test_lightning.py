"""The callback in Lightning's own Trainer, at every step against one example at a time."""

import copy
import csv
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import pycoherence as pc
from pycoherence.integrations.lightning import PACKAGES, PerExampleCallback
from pycoherence.robust import Rule

L = pytest.importorskip("lightning.pytorch")

pytestmark = [
    # Lightning's, about how the Trainer is set up here.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*returned `None`"),
    pytest.mark.filterwarnings("ignore:.*dataloader_iter"),
    # Lightning calls what newer versions of torch deprecate.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

Batch = tuple[Tensor, ...]


def batches(count: int, size: int = 5) -> list[Batch]:
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(count)]


def texts(count: int, padded: bool, size: int = 5) -> list[Batch]:
    """Token ids and labels; `-100` where a text has ended."""
    found = []
    for _ in range(count):
        ids, labels = torch.randint(1, 11, (size, 7)), torch.randint(11, (size, 7))
        if padded:
            for b in range(size):
                ids[b, 7 - b :], labels[b, 7 - b :] = 0, -100
        found.append((ids, labels))
    return found


def loader(data: list[Batch]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # pyright: ignore


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 11))


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def each_text(net: nn.Module, batch: Batch) -> Tensor:
    """The mean over texts of the mean over the tokens of each."""
    losses = F.cross_entropy(net(batch[0]).mT, batch[1], reduction="none")
    return (losses.sum(1) / (batch[1] != -100).sum(1)).mean()


def token_sum(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]).mT, batch[1], reduction="sum")


LossFn = Callable[[nn.Module, Batch], Tensor]


def module(
    net: nn.Module, loss_fn: LossFn, host: Any = L, optimizer: Any = None, **methods: Any
) -> Any:
    """A LightningModule that trains a network, with methods of its own."""

    def training_step(self: Any, batch: Batch, index: int) -> Any:
        return loss_fn(self.net, batch)

    def configure_optimizers(self: Any) -> Any:
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        return make(self.net.parameters())

    common = {"training_step": training_step, "configure_optimizers": configure_optimizers}
    made = type("Module", (host.LightningModule,), {**common, **methods})()
    made.net = net
    return made


def trainer(*callbacks: Any, host: Any = L, **options: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return host.Trainer(callbacks=list(callbacks), **{**quiet, **options})


class Oracle:
    """Takes down, before each batch, what one example at a time gives, and what was measured."""

    def __init__(self, loss_fn: LossFn, measured: Any) -> None:
        self.loss_fn, self.measured = loss_fn, measured
        self.waiting: list[Tensor] = []
        self.steps: list[tuple[list[Tensor], list[pc.Record]]] = []

    def callback(self, host: Any = L) -> Any:
        def on_train_batch_start(_: Any, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            found = oracle.per_example_gradients(pl_module.net, self.loss_fn, batch)
            self.waiting.append(oracle.joined(found))

        def on_train_batch_end(_: Any, trainer: Any, *__: Any) -> None:
            if trainer.global_step > len(self.steps):
                self.steps.append((self.waiting, list(self.measured.records)))
                self.waiting = []

        hooks = {
            "on_train_batch_start": on_train_batch_start,
            "on_train_batch_end": on_train_batch_end,
        }
        return type("OracleCallback", (host.Callback,), hooks)()

    def check(self, steps: int, tolerance: float = 1e-5) -> None:
        assert len(self.steps) == steps
        for expected, records in self.steps:
            assert len(records) == len(expected)
            for rows, record in zip(expected, records, strict=True):
                close(record.sq_norms.sqrt(), rows.norm(dim=1), tolerance)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=1e-7)


def watching(look: Callable[[Any], object]) -> Any:
    """A callback that is called with the Trainer after each batch."""

    def on_train_batch_end(_: Any, trainer: Any, *__: Any) -> None:
        look(trainer)

    return type("Watch", (L.Callback,), {"on_train_batch_end": on_train_batch_end})()


def fitted(
    net: nn.Module,
    loss_fn: LossFn,
    data: list[Batch],
    callback: Any,
    *others: Any,
    host: Any = L,
    methods: Mapping[str, Any] | None = None,
    own_loss: LossFn | None = None,
    **options: Any,
) -> Oracle:
    """Train, and say what was measured and should have been."""
    truth = Oracle(own_loss or loss_fn, callback)
    run = trainer(truth.callback(host), callback, *others, host=host, **options)
    run.fit(module(net, loss_fn, host, **(methods or {})), loader(data))
    expect_no_open_block()
    return truth


def expect_no_open_block() -> None:
    layer = nn.Linear(2, 1)
    with pc.collect(layer, pc.SqNorms()):
        layer(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_step_has_the_norms_of_one_example_at_a_time(package: str, accumulate: int) -> None:
    pytest.importorskip(package)
    host, callback = import_module(package), PerExampleCallback(pc.SqNorms(), pc.Gram())
    assert isinstance(callback, host.Callback)
    truth = fitted(
        classifier(),
        cross_entropy,
        batches(6),
        callback,
        host=host,
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    truth.check(steps=12 if accumulate == 1 else 4)  # 4 batches and then the 2 that are left
    assert callback.monitor is not None
    assert callback.monitor.noise_scale() > 0
    rows, record = truth.steps[-1][0][-1], truth.steps[-1][1][-1]
    close(record.gram, rows @ rows.mT)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_texts(padded: bool, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    truth = fitted(language_model(), each_text, texts(6, padded), PerExampleCallback(), **options)
    truth.check(steps=6 if accumulate == 1 else 2)
    callback = PerExampleCallback(loss_reduction="sum")
    truth = fitted(language_model(), token_sum, texts(6, padded), callback, **options)
    truth.check(steps=6 if accumulate == 1 else 2)


def test_noise_comes_once_a_step() -> None:
    """Four batches make a step, and then the two that are left."""
    found: list[Tensor] = []

    def take(_: Any, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found.append(next(pl_module.parameters()).grad.clone())

    watch = type("Watch", (L.Callback,), {"on_before_optimizer_step": take})()
    net, data = nn.Linear(6, 3000), [(torch.zeros(5, 6), torch.zeros(5)) for _ in range(6)]
    callback = PerExampleCallback(rule=pc.NormClip(1.0, 2.0, expected_batch_size=1))
    run = trainer(callback, watch, accumulate_grad_batches=4)
    run.fit(module(net, lambda net, batch: net(batch[0]).sum(1).mean() * 0), loader(data))
    for noise in found:  # that of the whole step, which the division of the loss leaves as it is
        assert abs(noise.std().item() / 2.0 - 1) < 0.05
    assert len(found) == 2


@pytest.mark.parametrize("by", ["itself", "hand", "scaler"])
def test_what_a_step_was_expected_to_have_is_its_only_divisor(by: str) -> None:
    """`.grad` is the sum of clipped gradients over that number, the 4 micro-batches of a step."""
    found: list[Tensor] = []

    def take(_: Any, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    watch = type("Watch", (L.Callback,), {"on_before_optimizer_step": take})()
    net, data = classifier(), batches(4)
    total = torch.zeros(sum(p.numel() for p in net.parameters()))
    for batch in data:
        rows = oracle.joined(oracle.per_example_gradients(net, cross_entropy, batch))
        weights = (0.05 / rows.norm(dim=1)).clamp(max=1)
        total += (weights @ rows).float()
    callback = PerExampleCallback(rule=pc.NormClip(0.05, expected_batch_size=100))
    options: dict[str, Any] = {"accumulate_grad_batches": 4}
    methods: dict[str, Any] = {}
    if by == "scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        options["plugins"] = [L.plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    if by == "hand":
        options = {}

        def training_step(self: Any, batch: Batch, index: int) -> None:
            with callback.micro_batch(loss_scale=1 / 4):
                self.manual_backward(cross_entropy(self.net, batch) / 4)
            if index == 3:
                self.optimizers().step()

        methods = {"training_step": training_step, "automatic_optimization": False}
    run = trainer(callback, watch, **options)
    run.fit(module(net, cross_entropy, **methods), loader(data))
    assert len(found) == 1
    error = (found[0] - total / 100).norm() / (0.05 * 20 / 100)  # of what it could be at most
    assert error < (1e-2 if by == "scaler" else 1e-5)  # the scaler's is in half precision


def test_a_scheduler_changes_how_much_is_accumulated() -> None:
    scheduler = L.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})
    callback = PerExampleCallback()
    truth = fitted(classifier(), cross_entropy, batches(4), callback, scheduler, max_epochs=2)
    truth.check(steps=4 + 2)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_scaler_is_known(accumulate: int) -> None:
    """The scaler doubles its scale of 1024 after each two steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    plugin = L.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    callback = PerExampleCallback()

    def half_precision(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch[0]).float(), batch[1])

    truth = fitted(
        classifier(),
        half_precision,
        batches(9),
        callback,
        own_loss=cross_entropy,
        plugins=[plugin],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.1,
    )
    truth.check(steps=9 if accumulate == 1 else 3, tolerance=1e-2)
    assert scaler.get_scale() == 1024 * 2 ** (4 if accumulate == 1 else 1)


def test_bfloat16_and_clipping() -> None:
    truth = fitted(
        classifier(),
        cross_entropy,
        batches(5),
        PerExampleCallback(),
        precision="bf16-mixed",
        gradient_clip_val=1e-3,
        accumulate_grad_batches=2,
    )
    truth.check(steps=3, tolerance=0.05)
    sizes = [rows.norm(dim=1).min() for step, _ in truth.steps for rows in step]
    assert min(sizes) > 0.1  # clipping, to less than that, comes after


def test_parameters_in_bfloat16() -> None:
    options = {"precision": "bf16-true", "accumulate_grad_batches": 2}
    truth = fitted(
        classifier(),
        lambda net, batch: cross_entropy(
            net, (batch[0].to(next(net.parameters()).dtype), batch[1])
        ),
        batches(4),
        PerExampleCallback(),
        **options,
    )
    truth.check(steps=2, tolerance=0.05)


def test_double_precision() -> None:
    data = [(x.double(), y) for x, y in batches(3)]
    truth = fitted(classifier(), cross_entropy, data, PerExampleCallback(), precision="64-true")
    truth.check(steps=3, tolerance=1e-10)


def test_validation_and_sanity_checks_do_not_disturb() -> None:
    callback, seen = PerExampleCallback(), []

    def validation_step(self: Any, batch: Batch, index: int) -> None:
        seen.append(len(callback.records) if callback.history else None)
        cross_entropy(self.net, batch)

    def val_dataloader(self: Any) -> Any:
        return loader(batches(2, size=3))

    truth = fitted(
        classifier(),
        cross_entropy,
        batches(5),
        callback,
        methods={"validation_step": validation_step, "val_dataloader": val_dataloader},
        accumulate_grad_batches=2,
        val_check_interval=1,
        num_sanity_val_steps=2,
    )
    truth.check(steps=3)
    assert len(seen) == 2 + 5 * 2


def test_every_measures_each_nth_optimizer_step() -> None:
    callback = PerExampleCallback(every=3)
    kept: list[list[Tensor]] = []
    watch = watching(lambda _: kept.append([record.sq_norms for record in callback.records]))
    run = trainer(callback, watch, accumulate_grad_batches=2)
    run.fit(module(classifier(), cross_entropy), loader(batches(10)))
    assert [row["step"] for row in callback.history] == [0, 3]
    assert [len(records) for records in kept] == [1, 2, 2, 2, 2, 2, 1, 2, 2, 2]
    assert torch.equal(kept[1][0], kept[5][0])
    assert not torch.equal(kept[6][0], kept[5][0])


def test_a_step_without_a_loss_leaves_no_block_open() -> None:
    callback = PerExampleCallback()

    def training_step(self: Any, batch: Batch, index: int) -> Tensor | None:
        loss = cross_entropy(self.net, batch)
        return None if index in (1, 3) else loss

    net = classifier()
    run = trainer(callback, accumulate_grad_batches=2)
    run.fit(module(net, cross_entropy, training_step=training_step), loader(batches(6)))
    assert len(callback.history) == 3
    assert len(callback.records) == 2
    expect_no_open_block()
    run = trainer(callback, max_epochs=1)
    run.fit(module(net, cross_entropy, training_step=training_step), loader(batches(4)))
    assert len(callback.history) == 2
    expect_no_open_block()


def test_an_epoch_that_a_hook_ends_leaves_no_block_open() -> None:
    callback = PerExampleCallback()

    def on_train_batch_start(self: Any, batch: Batch, index: int) -> int | None:
        return -1 if index == 2 else None

    fitted(
        classifier(),
        cross_entropy,
        batches(4),
        callback,
        methods={"on_train_batch_start": on_train_batch_start},
    )
    assert len(callback.history) == 2


def test_a_step_that_a_hook_ends_is_left_out() -> None:
    """Lightning drops the gradients of its batches when the next epoch begins."""
    callback = PerExampleCallback()

    def on_train_batch_start(self: Any, batch: Batch, index: int) -> int | None:
        return -1 if self.current_epoch == 0 and index == 3 else None

    fitted(
        classifier(),
        cross_entropy,
        batches(4),
        callback,
        methods={"on_train_batch_start": on_train_batch_start},
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    assert [row["batch_size"] for row in callback.history] == [10, 10, 10]


@pytest.mark.parametrize("keeps", [False, True])
def test_batches_that_take_no_step_are_left_out_unless_their_gradients_stay(keeps: bool) -> None:
    """Lightning zeroes gradients before each backward pass, whether a step used them or not."""
    callback, seen = PerExampleCallback(), list[float]()

    def optimizer_step(self: Any, epoch: int, index: int, optimizer: Any, closure: Any) -> None:
        if index % 2:
            optimizer.step(closure)
        else:
            closure()

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        seen.append(sum(p.grad.square().sum().item() for p in self.net.parameters()))

    def optimizer_zero_grad(self: Any, epoch: int, index: int, optimizer: Any) -> None:
        if index % 2 == 0:
            optimizer.zero_grad()

    methods: dict[str, Any] = {"optimizer_step": optimizer_step}
    methods["on_before_optimizer_step"] = on_before_optimizer_step
    if keeps:
        methods["optimizer_zero_grad"] = optimizer_zero_grad
    fitted(classifier(), cross_entropy, batches(6), callback, methods=methods)
    assert [row["batch_size"] for row in callback.history] == [10 if keeps else 5] * 3
    if not keeps:
        last = callback.records[0].coherence().sum_sq_norm / 25
        assert seen[-1] == pytest.approx(last, rel=1e-4)


HOOKS = [
    "training_step",
    "on_train_batch_start",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("rule", [None, pc.Median()])
def test_an_error_anywhere_leaves_no_block_open(hook: str, rule: Rule | None) -> None:
    callback = PerExampleCallback(rule=rule)

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("in a hook")

    with pytest.raises(ValueError, match="in a hook"):
        trainer(callback).fit(
            module(classifier(), cross_entropy, **{hook: fail}), loader(batches(2))
        )
    expect_no_open_block()
    trainer(callback).fit(module(classifier(), cross_entropy), loader(batches(3)))
    assert len(callback.history) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rule_makes_the_gradients_of_every_step(accumulate: int) -> None:
    rule, net, data = pc.NormClip(0.05), classifier(), batches(5)
    plain, expected = copy.deepcopy(net), []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for i, batch in enumerate(data):
        gradients = oracle.per_example_gradients(plain, cross_entropy, batch)
        norms = oracle.joined(gradients).norm(dim=1)
        weights = (0.05 / norms).clamp(max=1)
        for name, p in plain.named_parameters():
            mean = torch.einsum("b,b...->...", weights, gradients[name]) / len(norms) / accumulate
            p.grad = mean.float() + (0 if p.grad is None else p.grad)
        expected.append(weights)
        if (i + 1) % accumulate == 0 or i == len(data) - 1:
            optimizer.step()
            optimizer.zero_grad()
    callback = PerExampleCallback(rule=rule, every=2)
    trainer(callback, accumulate_grad_batches=accumulate).fit(
        module(net, cross_entropy), loader(data)
    )
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    decision = callback.reports[-1].network
    assert decision is not None
    assert decision.weights is not None
    close(decision.weights * 5, expected[-1])


def manual(callback: Any) -> dict[str, Any]:
    """Methods of a module with manual optimization: two micro-batches make a step."""

    def training_step(self: Any, batch: Batch, index: int) -> None:
        with callback.micro_batch(loss_scale=1 / 2):
            self.manual_backward(cross_entropy(self.net, batch) / 2)
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    return {"automatic_optimization": False, "training_step": training_step}


def test_manual_optimization_opens_its_own_blocks() -> None:
    callback = PerExampleCallback()
    methods = manual(callback)
    fitted(classifier(), cross_entropy, batches(6), callback, methods=methods).check(steps=3)


def test_manual_optimization_may_accumulate_across_epochs() -> None:
    callback = PerExampleCallback()
    count = 0

    def training_step(self: Any, batch: Batch, index: int) -> None:
        nonlocal count
        count += 1
        with callback.micro_batch():
            self.manual_backward(cross_entropy(self.net, batch))
        if count % 2 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()

    methods = {"automatic_optimization": False, "training_step": training_step}
    fitted(classifier(), cross_entropy, batches(3), callback, methods=methods, max_epochs=2).check(
        steps=3
    )


def test_manual_optimization_with_a_scaler() -> None:
    callback = PerExampleCallback()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    truth = fitted(
        classifier(),
        cross_entropy,
        batches(6),
        callback,
        methods=manual(callback),
        plugins=[L.plugins.MixedPrecision("16-mixed", "cpu", scaler)],
    )
    truth.check(steps=3, tolerance=1e-2)


def test_manual_optimization_without_a_block_is_refused() -> None:
    def training_step(self: Any, batch: Batch, index: int) -> None:
        self.manual_backward(cross_entropy(self.net, batch))
        self.optimizers().step()

    methods = {"automatic_optimization": False, "training_step": training_step}
    with pytest.raises(RuntimeError, match=r"none was measured.*micro_batch"):
        fitted(classifier(), cross_entropy, batches(2), PerExampleCallback(), methods=methods)


def test_two_optimizers_with_blocks_of_their_own_are_refused() -> None:
    callback = PerExampleCallback()

    def training_step(self: Any, batch: Batch, index: int) -> None:
        for optimizer in self.optimizers():
            with callback.micro_batch():
                self.manual_backward(cross_entropy(self.net, batch))
            optimizer.step()

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.net[::2]]

    methods = {
        "automatic_optimization": False,
        "training_step": training_step,
        "configure_optimizers": configure_optimizers,
    }
    with pytest.raises(RuntimeError, match=r"two optimizers.*pc\.GradientMonitor"):
        fitted(classifier(), cross_entropy, batches(2), callback, methods=methods)
    expect_no_open_block()


def test_two_optimizers_of_one_pass_are_one_step() -> None:
    callback = PerExampleCallback()

    def training_step(self: Any, batch: Batch, index: int) -> None:
        with callback.micro_batch():
            self.manual_backward(cross_entropy(self.net, batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.net[::2]]

    methods = {
        "automatic_optimization": False,
        "training_step": training_step,
        "configure_optimizers": configure_optimizers,
    }
    fitted(classifier(), cross_entropy, batches(3), callback, methods=methods).check(steps=3)
    assert len(callback.history) == 3


def test_a_block_of_ones_own_is_refused_elsewhere() -> None:
    callback = PerExampleCallback(every=5)
    with pytest.raises(RuntimeError, match=r"while trainer\.fit runs.*GradientMonitor"):
        callback.micro_batch().__enter__()
    assert callback.records == callback.reports == callback.history == []

    def training_step(self: Any, batch: Batch, index: int) -> Tensor:
        with callback.micro_batch():
            return cross_entropy(self.net, batch)

    with pytest.raises(RuntimeError, match="automatic optimization"):
        fitted(
            classifier(),
            cross_entropy,
            batches(2),
            callback,
            methods={"training_step": training_step},
        )


def configure_lbfgs(self: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_of_a_closure_that_runs_again_the_first_is_measured(accumulate: int) -> None:
    callback = PerExampleCallback()
    fitted(
        classifier(),
        cross_entropy,
        batches(4),
        callback,
        methods={"configure_optimizers": configure_lbfgs},
        accumulate_grad_batches=accumulate,
    ).check(steps=4 // accumulate)
    assert len(callback.history) == 4 // accumulate


def test_a_rule_with_a_closure_that_runs_again_is_refused() -> None:
    with pytest.raises(pc.UnsupportedError, match=r"closure several times.*rule=None"):
        fitted(
            classifier(),
            cross_entropy,
            batches(2),
            PerExampleCallback(rule=pc.Median()),
            methods={"configure_optimizers": configure_lbfgs},
        )
    expect_no_open_block()


def test_a_backward_of_the_modules_own_may_not_scale() -> None:
    def keeping(self: Any, loss: Tensor) -> None:
        loss.backward(retain_graph=True)

    callback = PerExampleCallback()
    fitted(classifier(), cross_entropy, batches(3), callback, methods={"backward": keeping}).check(
        steps=3
    )

    def halving(self: Any, loss: Tensor) -> None:
        (loss / 2).backward()

    with pytest.raises(pc.UnsupportedError, match=r"Module.backward multiplies the loss.*What to"):
        fitted(classifier(), cross_entropy, batches(2), callback, methods={"backward": halving})
    expect_no_open_block()


@pytest.mark.parametrize("marked", [False, True])
def test_a_step_that_takes_the_loader_marks_its_examples(marked: bool) -> None:
    """The batch is put together inside the block, of tensors that belong to nobody yet."""
    (x, y), net, callback = batches(1)[0], classifier(), PerExampleCallback()

    def training_step(self: Any, dataloader_iter: Any) -> Tensor:
        (x, y), _, _ = next(dataloader_iter)
        return cross_entropy(self.net, (pc.mark_examples(x, dim=0) if marked else x, y))

    expected = oracle.joined(oracle.per_example_gradients(net, cross_entropy, (x, y)))
    taking = module(net, cross_entropy, training_step=training_step)
    expecting = nullcontext() if marked else pytest.raises(pc.UnsupportedError, match="examples")
    with expecting:
        trainer(callback).fit(taking, DataLoader(TensorDataset(x, y), batch_size=5))
        close(callback.records[0].sq_norms.sqrt(), expected.norm(dim=1))
    expect_no_open_block()


class DoublingPrecision(L.plugins.Precision):
    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        return super().pre_backward(tensor * 2, module)


def expect_refused(why: str, lightning_module: Any = None, **options: Any) -> None:
    """The fit raises before anything is changed."""
    found = module(classifier(), cross_entropy) if lightning_module is None else lightning_module
    before = copy.deepcopy(found.state_dict())
    with pytest.raises(pc.UnsupportedError, match=why):
        trainer(PerExampleCallback(), **options).fit(found, loader(batches(2)))
    torch.testing.assert_close(found.state_dict(), before)
    expect_no_open_block()


def test_a_precision_plugin_that_may_scale_is_refused() -> None:
    expect_refused(r"DoublingPrecision.pre_backward.*What to do", plugins=[DoublingPrecision()])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("FSDPStrategy", "ModelParallelStrategy.*fully_shard"),
        ("DeepSpeedStrategy", 'strategy="ddp"'),
        ("XLAStrategy", "another device"),
        ("SingleDeviceXLAStrategy", "another device"),
    ],
)
def test_strategies_that_hide_the_gradients_are_refused(name: str, advice: str) -> None:
    """Made without their engines, which are not here."""
    kind = getattr(L.strategies, name)
    fake = SimpleNamespace(strategy=object.__new__(type("Mine", (kind,), {})))
    with pytest.raises(pc.UnsupportedError, match=f"^{name}.*What to do: .*{advice}"):
        PerExampleCallback().on_fit_start(fake, None)


class EngineStrategy(L.strategies.SingleDeviceStrategy):
    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


def test_a_strategy_that_accumulates_itself_is_refused() -> None:
    expect_refused(r"EngineStrategy: it accumulates.*What to do", strategy=EngineStrategy("cpu"))


def test_a_compiled_module_is_refused() -> None:
    compiled = torch.compile(module(classifier(), cross_entropy), backend="eager")
    expect_refused(r"Module is compiled.*What to do", compiled)


def test_batch_norm_is_refused_before_anything_changes() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    expect_refused("GroupNorm", module(net, cross_entropy))


def test_numbers_reach_the_loggers_at_the_steps_they_belong_to(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    boards = L.loggers.TensorBoardLogger(tmp_path, name="", version="board")
    table = L.loggers.CSVLogger(tmp_path, name="", version="table")
    callback = PerExampleCallback(every=2)
    monitored: list[Any] = []
    watch = watching(lambda trainer: monitored.append(trainer.callback_metrics.get("norm/mean")))
    run = trainer(callback, watch, logger=[boards, table], accumulate_grad_batches=2)
    run.fit(module(classifier(), cross_entropy), loader(batches(9)))

    names = set(callback.history[0]) - {"step"}
    assert {"norm/mean"} <= names
    read = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    with (tmp_path / "table" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in names:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in callback.history]
        assert [event.step for event in read.Scalars(name)] == [0, 2, 4]
        assert [(event.step, event.value) for event in read.Scalars(name)] == expected
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == expected
    assert monitored[1] is not None
    assert float(monitored[-1]) == pytest.approx(callback.history[-1]["norm/mean"])


def test_it_pickles_and_can_be_derived_from() -> None:
    callback = pickle.loads(pickle.dumps(PerExampleCallback(every=2)))
    assert isinstance(callback, L.Callback)
    trainer(callback).fit(module(classifier(), cross_entropy), loader(batches(4)))
    assert len(callback.history) == 2
    assert len(pickle.loads(pickle.dumps(Derived())).seen) == 1


class Derived(PerExampleCallback):
    def __init__(self) -> None:
        super().__init__(pc.SqNorms())
        self.seen = [1]


RULES_WITH_A_STATE: list[Callable[[], Rule]] = [
    lambda: pc.CenteredClip(0.1),
    lambda: pc.AdaptiveClip(100.0, learning_rate=1.0),
    lambda: pc.NNM(1, pc.AdaptiveClip(100.0, learning_rate=1.0)),
]


@pytest.mark.parametrize("make_rule", RULES_WITH_A_STATE)
def test_a_checkpoint_has_the_state_of_a_rule(make_rule: Any, tmp_path: Path) -> None:
    def fit(net: nn.Module, epochs: int, **options: Any) -> Any:
        run = trainer(PerExampleCallback(rule=make_rule()), max_epochs=epochs)
        run.fit(module(net, cross_entropy), loader(data), **options)
        return run

    net, data = classifier(), batches(3)
    whole, other = copy.deepcopy(net), classifier()
    fit(whole, 2)
    fit(net, 1).save_checkpoint(tmp_path / "half.ckpt")
    run = fit(other, 2, ckpt_path=tmp_path / "half.ckpt")
    assert run.global_step == 6
    assert [row["step"] for row in run.callbacks[0].history] == [3, 4, 5]
    torch.testing.assert_close(other.state_dict(), whole.state_dict())
    callback = PerExampleCallback(rule=pc.GAF(0.9) if "NNM" in str(make_rule()) else pc.Median())
    run = trainer(callback, max_epochs=2)  # a rule of another kind begins anew
    run.fit(module(net, cross_entropy), loader(data), ckpt_path=tmp_path / "half.ckpt")
    assert len(callback.history) == 3


def test_a_second_fit_begins_anew() -> None:
    callback = PerExampleCallback()
    for steps in (3, 2):
        fitted(classifier(), cross_entropy, batches(steps), callback).check(steps=steps)
        assert [row["step"] for row in callback.history] == list(range(steps))


SCRIPT = """
import sys
import pycoherence.integrations.lightning
assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & set(sys.modules)
"""


def test_the_package_of_the_trainer_is_the_one_that_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
    other = pytest.importorskip("pytorch_lightning")
    assert isinstance(PerExampleCallback(), L.Callback)
    assert isinstance(PerExampleCallback(), other.Callback)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    assert isinstance(PerExampleCallback(), other.Callback)
    assert not isinstance(PerExampleCallback(), L.Callback)


@contextmanager
def launched(rank: int, ranks: int) -> Iterator[None]:
    """Let Lightning find itself in processes that torchrun has started."""
    there = {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    before = dict(os.environ)
    os.environ.update(there)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_ranks(
    rank: int, rule: Rule | None, group: Any, accumulate: int, sharded: bool
) -> tuple[list[Any], list[Tensor]]:
    """The numbers of each step, and the weights after the last."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net, data = classifier(), batches(8)
    callback, kept = PerExampleCallback(rule=rule, group=group), []

    def look(trainer: Any) -> None:
        if trainer.global_step > len(kept):
            kept.append([record.sq_norms for record in callback.records])

    strategy = L.strategies.ModelParallelStrategy(2, 1) if sharded else "ddp"
    with launched(rank, 2):
        run = trainer(
            callback,
            watching(look),
            strategy=strategy,
            devices=2,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        )
        methods = {"configure_model": shard} if sharded else {}
        run.fit(module(net, cross_entropy, **methods), loader(data[rank::2]))
    weights = [p.full_tensor() if sharded else p for p in net.parameters()]  # pyright: ignore
    return kept, [p.detach() for p in weights]


def shard(self: Any) -> None:
    mesh = self.device_mesh["data_parallel"]
    for part in (self.net[0], self.net[2], self.net):
        fully_shard(part, mesh=mesh)


def one_process(rule: Rule | None, accumulate: int) -> tuple[list[Any], list[Tensor]]:
    """The same on batches that hold those of both ranks, one after the other."""
    torch.manual_seed(0)
    net, data = classifier(), batches(8)
    joined = [tuple(map(torch.cat, zip(*data[i : i + 2], strict=True))) for i in (0, 2, 4, 6)]
    callback = PerExampleCallback(rule=rule)
    truth = fitted(net, cross_entropy, joined, callback, accumulate_grad_batches=accumulate)
    rows = [[each.norm(dim=1).square() for each in expected] for expected, _ in truth.steps]
    return rows, [p.detach() for p in net.parameters()]


RANKS = [
    pytest.param("world", 1, False, id="all"),
    pytest.param("world", 2, False, id="all, accumulated"),
    pytest.param(None, 2, False, id="each"),
    pytest.param("world", 1, True, id="sharded"),
]


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(("group", "accumulate", "sharded"), RANKS)
def test_ranks(group: Any, accumulate: int, sharded: bool) -> None:
    rows, weights = one_process(None, accumulate)
    found = run_ranks(2, in_ranks, None, group, accumulate, sharded, timeout=150)
    for rank, (kept, theirs) in enumerate(found):
        mine = slice(None) if group else slice(5 * rank, 5 * rank + 5)
        for records, step in zip(kept, rows, strict=True):
            for sq_norms, expected in zip(records, step, strict=True):
                close(sq_norms, expected[mine])
        torch.testing.assert_close(theirs, weights)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("rule", [pc.Winsorized(1), pc.Krum(1, 3)], ids=["Winsorized", "Krum"])
def test_a_rule_over_all_ranks(rule: Rule) -> None:
    rows, weights = one_process(rule, 1)
    for kept, theirs in run_ranks(2, in_ranks, rule, "world", 1, False, timeout=150):
        for (sq_norms,), (expected,) in zip(kept, rows, strict=True):
            close(sq_norms, expected)
        torch.testing.assert_close(theirs, weights)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_fabric(accumulate: int, scaled: bool) -> None:
    """The recipe of docs/integrations-lightning.md."""
    fabric_package = import_module("lightning.fabric")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [fabric_package.plugins.MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    net = classifier()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    monitor = pc.GradientMonitor(net)
    found = getattr(fabric.strategy.precision, "scaler", None)
    assert (found is not None) == scaled
    data = batches(2 * accumulate)
    for step in range(2):
        expected = []
        for batch in data[step * accumulate : (step + 1) * accumulate]:
            expected.append(oracle.joined(oracle.per_example_gradients(net, cross_entropy, batch)))
            scale = (found.get_scale() if found else 1.0) / accumulate
            with monitor.micro_batch(loss_scale=scale):
                loss = F.cross_entropy(model(batch[0]).float(), batch[1])
                fabric.backward(loss / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        for record, rows in zip(monitor.records, expected, strict=True):
            close(record.sq_norms.sqrt(), rows.norm(dim=1), 1e-2 if scaled else 1e-5)
