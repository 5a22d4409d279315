"""In a Trainer, statistics are those of one example at a time, at every step."""

import copy
import gc
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from support.checks import relative_error
from support.fine_tuning import (
    MicroBatch,
    OwnLoss,
    Texts,
    Watch,
    arguments,
    bert,
    causal,
    class_loss,
    classifier,
    collate,
    gradients_one_at_a_time,
    logits_of,
    norms_one_at_a_time,
    seq2seq,
    square_error,
    token_sum,
    token_sum_of_answer,
)
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames, ParallelMode

import pycoherence as pc
from pycoherence.integrations.transformers import KeepIndex, PerExampleCallback, PerExampleTrainer

EXACT = 1e-5
"""In float32, against one example at a time in float64."""


RADIUS = 9.0
"""It clips some of the examples."""


class Plain(Trainer):
    """A Trainer of the user, which knows nothing of this library."""


class Mixed(PerExampleTrainer, Plain):
    pass


class Keep(TrainerCallback):
    """Keeps the records of each step, as another callback may."""

    def __init__(self, callback: PerExampleCallback) -> None:
        self.callback = callback
        self.steps: list[list[Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append([record.sq_norms.sqrt() for record in self.callback.records])
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.grads.append(grads)


class Run:
    """A short run of a Trainer, and what it has seen."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        folder: Path,
        callback: PerExampleCallback | None = None,
        kind: type[Trainer] = Plain,
        before: Callable[[Trainer], None] = lambda trainer: None,
        collator: Callable[[list[Any]], Any] = collate,
        given: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        self._watch = Watch(model, collator)
        self.model = model
        self.callback = callback or PerExampleCallback(pc.SqNorms())
        self.keep = Keep(self.callback)
        self.trainer = kind(
            model,
            arguments(folder, **options),
            train_dataset=data,
            callbacks=[self.keep, self.callback],
            data_collator=self._watch.collate,
            **given,
        )
        before(self.trainer)
        self.trainer.train()

    @property
    def seen(self) -> list[MicroBatch]:
        return self._watch.seen

    @property
    def norms(self) -> list[Tensor]:
        return [norms for step in self.keep.steps for norms in step]


def assert_exact(run: Run, own_loss: OwnLoss) -> None:
    assert len(run.norms) == len(run.seen)
    for found, seen in zip(run.norms, run.seen, strict=True):
        assert relative_error(found, norms_one_at_a_time(run.model, seen, own_loss)) < EXACT


MODELS: dict[str, tuple[Callable[[], nn.Module], str, OwnLoss]] = {
    "causal": (causal, "tokens", token_sum),
    "seq2seq": (seq2seq, "tokens", token_sum_of_answer),
    "classes": (classifier, "classes", class_loss),
    "classes by a mean": (bert, "classes", class_loss),
    "numbers": (lambda: bert(1), "numbers", square_error),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_one_example_at_a_time(
    name: str, accumulate: int, padded: bool, tmp_path: Path
) -> None:
    """At every step, the last with fewer micro-batches, and a smaller one."""
    make, kind, own_loss = MODELS[name]
    data = Texts(16, padded=padded, kind=kind)
    run = Run(make(), data, tmp_path, gradient_accumulation_steps=accumulate)
    assert [len(step) for step in run.keep.steps] == ([1] * 6 if accumulate == 1 else [4, 2])
    assert len(run.norms[-1]) == 1
    assert_exact(run, own_loss)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_mixin_gives_the_same(accumulate: int, tmp_path: Path) -> None:
    data = Texts(11, padded=True)
    runs = [
        Run(causal(), data, tmp_path, kind=kind, gradient_accumulation_steps=accumulate)
        for kind in (Plain, Mixed)
    ]
    assert_exact(runs[1], token_sum)
    for one, other in zip(runs[0].norms, runs[1].norms, strict=True):
        assert torch.equal(one, other)


def test_training_is_what_it_is_without_it(tmp_path: Path) -> None:
    models = causal(), causal()
    Run(models[0], Texts(13, padded=True), tmp_path, gradient_accumulation_steps=2)
    options = arguments(tmp_path, gradient_accumulation_steps=2)
    data = Texts(13, padded=True)
    Trainer(models[1], options, train_dataset=data, data_collator=collate).train()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert relative_error(p.detach(), q.detach().double()) < EXACT


class OwnMean(Plain):
    """With a loss of its own in place of the model's, the mean over examples of their means."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none").sum(1)
        loss = (losses / (labels != -100).sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


class Regularised(Plain):
    """With a term beside the model's loss, which is none of its examples'."""

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
        loss = loss + 1e-3 * outputs.logits.detach().square().mean()
        return (loss, outputs) if return_outputs else loss


def own_mean(model: nn.Module, batch: Any) -> Tensor:
    return token_sum(model, batch) / (batch["labels"][0, 1:] != -100).sum()


def sum_over_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].mT
    return F.cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch


def mean_over_tokens(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"][:, :-1].mT, labels[:, 1:])


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    logits, labels = logits_of(model, batch)[:-1], batch["labels"][0, 1:]
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    return F.cross_entropy(logits, labels, **options)


LOSSES: dict[str, tuple[OwnLoss, dict[str, Any]]] = {
    "function, sum": (token_sum, {"given": {"compute_loss_func": sum_over_items}}),
    "function, mean": (token_sum, {"given": {"compute_loss_func": mean_over_tokens}}),
    "label smoothing": (smoothed, {"label_smoothing_factor": 0.1}),
    "own compute_loss": (own_mean, {"kind": OwnMean}),
    "own compute_loss round the model's": (token_sum, {"kind": Regularised}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_other_origin(name: str, tmp_path: Path) -> None:
    own_loss, options = LOSSES[name]
    data = Texts(11, padded=True)
    run = Run(causal(), data, tmp_path, gradient_accumulation_steps=2, **options)
    assert_exact(run, own_loss)


def own(loss_of: Callable[[Any, Tensor], Tensor]) -> type[Plain]:
    """A Trainer with a loss of its own, of what the model gives and the labels."""

    class Own(Plain):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return loss_of(model(**inputs), inputs["labels"])

    return Own


def each_token(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="none")


def test_a_mean_over_tokens_is_no_mean_over_rows(tmp_path: Path) -> None:
    """With those that do not count, or without."""
    for kind in (
        own(lambda outputs, labels: each_token(outputs, labels).mean()),
        own(lambda outputs, labels: each_token(outputs, labels)[labels[:, 1:] != -100].mean()),
    ):
        assert_exact(Run(causal(), Texts(6, padded=True), tmp_path, kind=kind), token_sum)


def pairs(outputs: Any, labels: Tensor) -> Tensor:
    chosen, rejected = each_token(outputs, labels).sum(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize(
    ("loss_of", "said"),
    [
        (pairs, "mean of 2 terms"),
        (lambda outputs, labels: outputs.loss + outputs.logits.mean(), "mean of several means"),
        (
            lambda outputs, labels: 0.5 * outputs.loss + outputs.logits.var(),
            "neither that it was divided",
        ),
    ],
    ids=["pairs", "a mean beside", "a variance beside"],
)
def test_means_of_others_are_refused(loss_of: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(pc.UnsupportedError, match=rf"{said}.*loss_reduction='mean'"):
        Run(
            causal(),
            Texts(4, padded=False),
            tmp_path,
            kind=own(loss_of),
            per_device_train_batch_size=4,
        )


class Beside(Plain):
    """With a term of its own beside the model's loss, which num_items_in_batch divides."""

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
        loss = 0.5 * loss + 0.5 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_a_term_beside_the_loss_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pc.UnsupportedError, match="terms that num_items_in_batch does not divide"):
        Run(causal(), Texts(3, padded=False), tmp_path, kind=Beside)
    callback = PerExampleCallback(loss_reduction="mean")
    Run(causal(), Texts(3, padded=False), tmp_path, callback, kind=Beside)
    assert callback.records[0].batch_size == 3


def test_a_term_beside_what_items_divide_is_refused(tmp_path: Path) -> None:
    def more(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return sum_over_items(outputs, labels, num_items_in_batch) + outputs["logits"].mean()

    with pytest.raises(pc.UnsupportedError, match="terms that num_items_in_batch does not divide"):
        Run(causal(), Texts(3, padded=False), tmp_path, given={"compute_loss_func": more})


@pytest.mark.parametrize("name", ["classes", "classes by a mean", "numbers"])
def test_the_gradient_of_a_group_is_the_sum_of_its_rows(name: str, tmp_path: Path) -> None:
    make, kind, own_loss = MODELS[name]
    data = Texts(4, padded=True, kind=kind)
    callback = PerExampleCallback(group_size=2)
    run = Run(make(), data, tmp_path, callback, per_device_train_batch_size=4)
    gradients = gradients_one_at_a_time(run.model, run.seen[0], own_loss)
    sums = [g.unflatten(0, (2, 2)).sum(1).flatten(1) for g in gradients.values()]
    truth = sum(g.square().sum(1) for g in sums).sqrt()
    assert relative_error(run.norms[0], truth) < EXACT


class MaskedMean(Plain):
    """With a mean that no function of torch has taken."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none")
        loss = losses.sum() / (labels != -100).sum()
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_does_not_show_its_scale_is_refused(tmp_path: Path) -> None:
    model = causal()
    with pytest.raises(pc.UnsupportedError, match=r"would be a guess.*loss_reduction='mean'"):
        Run(model, Texts(6, padded=True), tmp_path, kind=MaskedMean)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_such_a_loss_may_be_described(loss_reduction: Any, tmp_path: Path) -> None:
    callback = PerExampleCallback(loss_reduction=loss_reduction)
    run = Run(causal(), Texts(6, padded=True), tmp_path, callback, kind=MaskedMean)
    for found, seen in zip(run.norms, run.seen, strict=True):
        counted = (seen.batch["labels"][:, 1:] != -100).sum()
        factor = (len(found) if loss_reduction == "mean" else 1) / counted
        truth = norms_one_at_a_time(run.model, seen, token_sum)
        assert relative_error(found, factor * truth) < EXACT


def test_losses_of_several_calls_are_refused(tmp_path: Path) -> None:
    class Twice(Plain):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss + model(**inputs).loss

    with pytest.raises(pc.UnsupportedError, match="made of 2 losses"):
        Run(causal(), Texts(3, padded=False), tmp_path, kind=Twice)


def test_a_loss_that_training_step_makes_is_refused(tmp_path: Path) -> None:
    class Own(Plain):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            loss = model(input_ids=inputs["input_ids"]).logits.square().mean()
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(pc.UnsupportedError, match="not from compute_loss"):
        Run(causal(), Texts(3, padded=False), tmp_path, kind=Own)


# How people run it.


def own_hands(seen: MicroBatch, model: nn.Module, **autocast: Any) -> Tensor:
    """The norms by a block of `collect` round the plain sum over tokens."""
    model = copy.deepcopy(model)
    model._forward_pre_hooks.clear()
    model.load_state_dict(seen.state)
    ids, mask, labels = (seen.batch[k] for k in ("input_ids", "attention_mask", "labels"))
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        with torch.autocast("cpu", **autocast):
            logits = model(ids, attention_mask=mask).logits
        F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="sum").backward()
    return record.sq_norms.sqrt()


def test_bfloat16(tmp_path: Path) -> None:
    data = Texts(10, padded=True)
    run = Run(causal(), data, tmp_path, bf16=True, gradient_accumulation_steps=2)
    for found, seen in zip(run.norms, run.seen, strict=True):
        # The Trainer scales the loss before it goes back, which rounds other numbers.
        assert relative_error(found, own_hands(seen, run.model, dtype=torch.bfloat16)) < 2e-2
        assert relative_error(found, norms_one_at_a_time(run.model, seen, token_sum)) < 5e-2


def test_a_grad_scaler(tmp_path: Path) -> None:
    """The scale that it multiplies the loss by, which it changes, is divided by."""

    def scaled(trainer: Trainer) -> None:
        trainer.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=1
        )

    data = Texts(10, padded=True)
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    run = Run(causal(), data, tmp_path, before=scaled, **options)
    scaler = run.trainer.accelerator.scaler
    assert scaler is not None
    assert scaler.get_scale() == 2.0**12
    assert_exact(run, token_sum)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_activation_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    run = Run(
        causal(),
        Texts(7, padded=True),
        tmp_path,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_exact(run, token_sum)


# peft asks by a name that transformers has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # from zero, half of the gradients would be zero
    run = Run(model, Texts(7, padded=True), tmp_path, gradient_accumulation_steps=2)
    assert_exact(run, token_sum)
    assert set(run.callback.records[-1].by_parameter) == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_steps_count_on_from_a_checkpoint(tmp_path: Path) -> None:
    data, options = Texts(12, padded=False), {"save_strategy": "steps", "save_steps": 2}
    run = Run(causal(), data, tmp_path, max_steps=2, **options)
    assert [at["step"] for at in run.callback.history] == [0, 1]
    callback = PerExampleCallback()
    more = arguments(tmp_path, max_steps=4)
    trainer = Trainer(
        causal(), more, train_dataset=data, callbacks=[callback], data_collator=collate
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [at["step"] for at in callback.history] == [2, 3]


def test_each_nth_step(tmp_path: Path) -> None:
    callback = PerExampleCallback(every=3)
    run = Run(causal(), Texts(12, padded=False), tmp_path, callback)
    assert [at["step"] for at in callback.history] == [0, 3]
    for step in (0, 3):
        truth = norms_one_at_a_time(run.model, run.seen[step], token_sum)
        assert relative_error(run.keep.steps[step][0], truth) < EXACT


def test_evaluation_between_steps_is_not_measured(tmp_path: Path) -> None:
    data = Texts(6, padded=True)
    options = {"eval_strategy": "steps", "eval_steps": 1}
    run = Run(causal(), data, tmp_path, given={"eval_dataset": data}, **options)
    for one, other in zip(run.norms, Run(causal(), data, tmp_path).norms, strict=True):
        assert torch.equal(one, other)
    evaluated = [at for at in run.trainer.state.log_history if "eval_loss" in at]
    assert len(evaluated) == 2
    assert not any("norm/mean" in at for at in evaluated)


@pytest.mark.parametrize("kind", [Plain, Mixed])
@pytest.mark.parametrize("every", [1, 2])
def test_a_rule_fills_the_gradient_at_each_step(
    kind: type[Trainer], every: int, tmp_path: Path
) -> None:
    """Its radius is in units of the token sums, and the Trainer's scale is put back."""
    callback = PerExampleCallback(rule=pc.NormClip(RADIUS), every=every)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    run = Run(causal(), Texts(12, padded=True), tmp_path, callback, kind, **options)
    clipped = 0
    for at, grads in enumerate(run.keep.grads):
        parts = run.seen[2 * at : 2 * at + 2]
        items = sum((part.batch["labels"][:, 1:] != -100).sum() for part in parts)
        want = {name: torch.zeros_like(g).double() for name, g in grads.items()}
        for part in parts:
            gradients = gradients_one_at_a_time(run.model, part, token_sum)
            norms = norms_one_at_a_time(run.model, part, token_sum)
            coef = (RADIUS / norms).clamp(max=1) / items
            clipped += (norms > RADIUS).sum()
            for name, g in gradients.items():
                want[name] += torch.einsum("b,b...->...", coef, g)
        for name, g in grads.items():
            assert relative_error(g, want[name]) < EXACT
    assert 0 < clipped < 12
    assert len(callback.history) == (2 if every == 1 else 1)
    assert 0 < callback.history[0]["rule/clipped"] < 1
    assert callback.reports[0].network is not None


def tags(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The events in a folder of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {file.parent for file in folder.rglob("events.*")}
    events = EventAccumulator(str(path))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_tensorboard_has_the_scalars(kind: type[Trainer], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    callback = PerExampleCallback(pc.SqNorms(), pc.Gram(), rule=pc.NormClip(RADIUS), every=2)
    options = {"report_to": "tensorboard", "logging_steps": 2, "gradient_accumulation_steps": 2}
    run = Run(causal(), Texts(30, padded=True), tmp_path, callback, kind, **options)
    found, history = tags(tmp_path), callback.history
    assert [at["step"] for at in history] == [0, 2, 4]
    for name in ("norm/median", "norm/q90", "coherence/m", "noise_scale", "rule/clipped"):
        said = [(step, value) for step, value in found[f"train/{name}"]]
        assert said == [
            (2, pytest.approx(history[0][name], rel=1e-6)),
            (4, pytest.approx(history[1][name], rel=1e-6)),
        ]
    assert len(found["train/loss"]) == 2
    kept = [at["noise_scale"] for at in run.trainer.state.log_history if "noise_scale" in at]
    assert kept == [history[0]["noise_scale"], history[1]["noise_scale"]]


def test_labels_that_do_not_count_are_refused(tmp_path: Path) -> None:
    class Ignored(Texts):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            one = super().__getitem__(i)
            return {**one, "labels": torch.full_like(one["labels"], -100)}

    for model in (causal(), seq2seq()):
        with pytest.raises(ValueError, match="labels that count, got 0"):
            Run(model, Ignored(3, padded=False), tmp_path)


# The most surprising examples.


def test_surprising_examples_by_their_index(tmp_path: Path) -> None:
    """Shuffled and accumulated, over the last epoch."""
    data = Texts(14, padded=True)
    callback = PerExampleCallback(top=4)
    order: list[list[int]] = []
    collator = KeepIndex(collate)

    def noted(examples: list[Any]) -> Any:
        order.append([int(one["index"]) for one in examples])
        return collator(examples)

    run = Run(
        causal(),
        data,
        tmp_path,
        callback,
        collator=noted,
        remove_unused_columns=False,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    steps = [part for step, parts in enumerate(run.keep.steps, 1) for part in [step] * len(parts)]
    found = [
        (index, norm, step)
        for indices, norms, step in zip(order, run.norms, steps, strict=True)
        for index, norm in zip(indices, norms.tolist(), strict=True)
    ]
    best = sorted(found[14:], key=lambda one: -one[1])[:4]
    assert callback.surprising == best
    assert sorted(i for i, _, _ in found[14:]) == list(range(14))
    assert order[:5] != [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13]]


def test_examples_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'index' in each batch.*KeepIndex"):
        Run(causal(), Texts(3, padded=False), tmp_path, PerExampleCallback(top=2))
    collator = KeepIndex(collate, "number")
    with pytest.raises(ValueError, match="column 'number' in the dataset"):
        Run(causal(), Texts(3, padded=False), tmp_path, collator=collator)


# Errors.


class Broken(Plain):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        Trainer.compute_loss(self, *args, **kwargs)
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", [Broken, type("MixedBroken", (PerExampleTrainer, Broken), {})])
def test_an_error_leaves_nothing_open(kind: type[Trainer], tmp_path: Path) -> None:
    callback, model = PerExampleCallback(), causal()
    trainer = kind(
        model,
        arguments(tmp_path),
        train_dataset=Texts(6, padded=False),
        data_collator=collate,
        callbacks=[callback],
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert not model._forward_hooks
    x = collate([Texts(6, padded=False)[0]])
    with pc.collect(model, pc.SqNorms()) as record:
        model(**x).loss.backward()
    assert record.sq_norms.shape == (1,)


class Careful(Plain):
    """Leaves out a batch that does not fit into memory, and goes on."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        inner, model, calls = self.training_step, self.model, list[int]()

        def step(*given: Any) -> Tensor:
            calls.append(1)
            handle = model.register_forward_hook(self.fail) if len(calls) == 1 else None
            try:
                return inner(*given)
            except torch.OutOfMemoryError:
                return torch.tensor(0.0)
            finally:
                if handle is not None:
                    handle.remove()

        self.training_step = step  # and stays there
        return super()._run_epoch(*args, **kwargs)

    @staticmethod
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")


def test_a_step_that_is_left_out_does_not_end_the_rule(tmp_path: Path) -> None:
    data, callback = Texts(12, padded=True), PerExampleCallback(rule=pc.NormClip(1e-3))
    run = Run(causal(), data, tmp_path, callback, kind=Careful, max_grad_norm=0.0)
    assert [len(step) for step in run.keep.steps] == [0, 1, 1, 1]
    for grads in run.keep.grads[1:]:
        assert 0 < sum(g.square().sum() for g in grads.values()).sqrt() < 1e-3
    assert vars(run.trainer)["training_step"].__name__ == "step"


@pytest.mark.parametrize("other", [False, True], ids=["same callback", "another"])
def test_training_after_an_error(other: bool, tmp_path: Path) -> None:
    callback, data = PerExampleCallback(), Texts(6, padded=True)
    options = arguments(tmp_path, learning_rate=0.0)
    given: Any = {"train_dataset": data, "data_collator": collate, "callbacks": [callback]}
    trainer = Plain(causal(), options, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "compute_loss", Broken.compute_loss)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    if other:
        trainer.remove_callback(callback)
        trainer.add_callback(callback := PerExampleCallback())
    trainer.train()
    assert len(callback.history) == 2
    assert "training_step" not in vars(trainer)


def test_training_twice(tmp_path: Path) -> None:
    run = Run(causal(), Texts(6, padded=False), tmp_path)
    first = run.callback.history
    assert "training_step" not in vars(run.trainer)
    run.trainer.train()
    assert len(run.callback.history) == len(first) == 2
    assert "training_step" not in vars(run.trainer)


def test_the_mixin_needs_its_callback(tmp_path: Path) -> None:
    trainer = Mixed(causal(), arguments(tmp_path), train_dataset=Texts(3, padded=False))
    with pytest.raises(ValueError, match=r"expected one PerExampleCallback.*got 0"):
        trainer.train()


def test_bad_options_are_refused() -> None:
    for options, error in (
        ({"every": 0}, ValueError),
        ({"top": -1}, ValueError),
        ({"loss_reduction": "token"}, ValueError),
        ({"group_size": 0}, ValueError),
        ({"rule": pc.NormClip(1.0, expected_batch_size=8)}, ValueError),
        ({"rule": pc.AdaptiveClip(1.0, expected_batch_size=8)}, ValueError),
    ):
        with pytest.raises(error, match="expected"):
            PerExampleCallback(**options)
    with pytest.raises(ValueError, match=r"pc.SqNorms\(\) among the statistics"):
        PerExampleCallback(pc.Gram(), top=3)


@pytest.mark.parametrize("name", ["torch_compile", "FSDP1", "DeepSpeed", "copies", "fused"])
def test_bad_settings_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    said = {
        "torch_compile": "torch_compile.*leave the compiler out",
        "FSDP1": "FSDP1 flattens.*take FSDP2",
        "DeepSpeed": "DeepSpeed runs.*take DistributedDataParallel",
        "copies": "not_distributed runs copies.*one process for each GPU",
        "fused": r"steps inside backward\(\).*adamw_torch",
    }
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    options = compiled if name == "torch_compile" else {}
    trainer = Plain(
        causal(),
        arguments(tmp_path, **options),
        train_dataset=Texts(3, padded=False),
        data_collator=collate,
        callbacks=[PerExampleCallback()],
    )
    if name == "fused":
        monkeypatch.setattr(trainer.args, "optim", OptimizerNames.LOMO)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    elif name == "copies":
        mode = property(lambda _: ParallelMode.NOT_DISTRIBUTED)
        monkeypatch.setattr(TrainingArguments, "parallel_mode", mode)
    elif name != "torch_compile":
        mode = DistributedType.FSDP if name == "FSDP1" else DistributedType.DEEPSPEED
        trainer.accelerator = Stated(trainer.accelerator, mode)
    with pytest.raises(pc.UnsupportedError, match=said[name]):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("host", ["transformers", "accelerate"])
def test_old_versions_are_refused(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "train_dataset": Texts(3, padded=False),
        "callbacks": [PerExampleCallback()],
    }
    trainer = Plain(causal(), arguments(tmp_path), **options)
    monkeypatch.setattr(f"{host}.__version__", "1.5.2")
    with pytest.raises(
        pc.UnsupportedError, match=rf"{host} 1.5.2 .*install {host} [\d.]+ or later"
    ):
        trainer.train()


class Stated:
    """An accelerator that says another kind of itself."""

    def __init__(self, accelerator: Any, kind: DistributedType) -> None:
        self.accelerator, self.distributed_type = accelerator, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)


class OwnSmoothed(Plain):
    """Divides a loss of its own, made of two sums, by the number of items of all processes."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].mT
        options = {"label_smoothing": 0.1, "reduction": "sum"}
        return F.cross_entropy(logits, labels, **options) / num_items_in_batch


class OwnSum(Plain):
    """Divides a sum of its own by the same number, and multiplies by that of processes."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        loss = sum_over_items(model(**inputs), labels, num_items_in_batch)
        return loss * self.accelerator.num_processes


def ranks_train(rank: int, folder: str) -> tuple[dict[str, list[float]], str]:
    """Train on one of several ranks; the errors of norms, and what is said of an own loss."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    kinds: dict[str, Any] = {
        "across": {},
        "each": {"average_tokens_across_devices": False},
        "own": {"kind": OwnSum},
    }
    options: dict[str, Any] = {"gradient_accumulation_steps": 4, "ddp_backend": "gloo"}
    data, errors = Texts(22, padded=True), dict[str, list[float]]()
    for name, kind in kinds.items():
        run = Run(causal(), data, Path(folder), **options, **kind)
        assert isinstance(run.trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        assert len(run.seen) == 4
        errors[name] = [
            relative_error(found, norms_one_at_a_time(run.model, seen, token_sum))
            for found, seen in zip(run.norms, run.seen, strict=True)
        ]
    with pytest.raises(pc.UnsupportedError) as refused:
        Run(causal(), data, Path(folder), kind=OwnSmoothed, **options)
    with pytest.raises(pc.UnsupportedError, match="take a rule over coordinates"):
        Run(causal(), data, Path(folder), PerExampleCallback(rule=pc.NormClip(1.0)), **options)
    # Here the wrapper passes what the model gives through a function of its own.
    options |= {"ddp_find_unused_parameters": True}
    run = Run(bert(), Texts(22, padded=True, kind="classes"), Path(folder), **options)
    errors["a mean"] = [
        relative_error(found, norms_one_at_a_time(run.model, seen, class_loss))
        for found, seen in zip(run.norms, run.seen, strict=True)
    ]
    return errors, str(refused.value)


@pytest.mark.slow
@needs_gloo
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Tokens are averaged over processes or in each; a loss that does not say is refused."""
    for errors, said in run_ranks(2, ranks_train, str(tmp_path), timeout=120):
        for found in errors.values():
            assert len(found) == 4
            assert max(found) < EXACT
        assert "give TrainingArguments(average_tokens_across_devices=False)" in said


def test_no_graph_outlives_its_step(tmp_path: Path) -> None:
    """It would be freed by the garbage collector alone, and memory taken anew for the next."""

    class Mark:
        pass

    marks: list[weakref.ref[Mark]] = []

    def mark(module: nn.Module, args: Any, found: Any) -> None:
        if module.training:
            marks.append(weakref.ref(here := Mark()))
            found.logits.grad_fn.metadata["mark"] = here

    class Look(TrainerCallback):
        alive: ClassVar[list[int]] = []

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.alive.append(sum(one() is not None for one in marks))

    model = causal()
    model.register_forward_hook(mark)
    gc.collect()
    gc.disable()
    try:
        data = Texts(9, padded=False)
        Run(model, data, tmp_path, before=lambda trainer: trainer.add_callback(Look()))
    finally:
        gc.enable()
    assert len(marks) == 3
    assert Look.alive == [0, 0, 0]
