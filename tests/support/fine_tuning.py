"""Tiny models, data and loops as people fine-tune, and what each of their steps has seen."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from support.oracle import per_example_gradients

VOCABULARY, PAD, CLASSES = 19, 0, 3

Batch = Mapping[str, Tensor]
OwnLoss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch of one example."""


class Texts(Dataset[dict[str, Tensor]]):
    """Sequences of tokens; with `padded` of different lengths, and labels that do not count."""

    def __init__(self, n: int, *, padded: bool, kind: str = "tokens") -> None:
        self.n, self.padded, self.kind = n, padded, kind

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(i)
        size = 4 + i % 4 if self.padded else 6
        ids = torch.randint(1, VOCABULARY, (size,), generator=g)
        labels = ids.clone()
        if self.padded:
            labels[: i % 3] = -100
        if self.kind == "classes":
            labels = torch.tensor(i % CLASSES)
        elif self.kind == "numbers":
            labels = torch.randn((), generator=g)
        return {"input_ids": ids, "labels": labels, "index": torch.tensor(i)}


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest, and drop the indices, as many collators do."""
    size = max(len(one["input_ids"]) for one in examples)

    def padded(name: str, value: int) -> Tensor:
        return torch.stack(
            [F.pad(one[name], (0, size - len(one[name])), value=value) for one in examples]
        )

    ids = padded("input_ids", PAD)
    is_one_each = examples[0]["labels"].dim() == 0
    labels = [one["labels"] for one in examples]
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.stack(labels) if is_one_each else padded("labels", -100),
    }


SIZES = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2}
LLAMA = {**SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 1, "pad_token_id": PAD}


def causal() -> nn.Module:
    """Its loss is the sum over tokens, divided by `num_items_in_batch`."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **LLAMA))


def classifier() -> nn.Module:
    """Its loss is the sum over examples, divided by `num_items_in_batch`."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(num_hidden_layers=1, num_labels=CLASSES, **LLAMA)
    )


def bert(labels: int = CLASSES) -> nn.Module:
    """Its loss is the mean over examples, though it is given `num_items_in_batch`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=1,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    return BertForSequenceClassification(config)


def seq2seq() -> nn.Module:
    """Its loss is the mean over the tokens of the micro-batch."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=12,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The outputs of the model for one example."""
    given = {name: x for name, x in batch.items() if x.dim() == 2 and name != "labels"}
    return model(**given).logits[0]


def token_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The sum over the tokens of an example that follow others and count."""
    return F.cross_entropy(logits_of(model, batch)[:-1], batch["labels"][0, 1:], reduction="sum")


def token_sum_of_answer(model: nn.Module, batch: Batch) -> Tensor:
    """The sum over the tokens of an answer that count."""
    logits = model(**batch).logits[0]
    return F.cross_entropy(logits, batch["labels"][0], reduction="sum")


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(logits_of(model, batch), batch["labels"][0])


def square_error(model: nn.Module, batch: Batch) -> Tensor:
    return (logits_of(model, batch)[0] - batch["labels"][0]).square()


class MicroBatch(NamedTuple):
    """The inputs of a forward pass of training.

    Attributes:
        state: The weights then.
        batch: What the collator gave.
    """

    state: dict[str, Tensor]
    batch: Batch


class Watch:
    """Sees the micro-batches of a run, in order.

    Args:
        model: What is trained.
        collator: Gives the batches, in the process that trains.
    """

    def __init__(self, model: nn.Module, collator: Callable[[list[Any]], Batch]) -> None:
        self._collator = collator
        self._batches: list[Batch] = []
        self._states: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._see)

    def collate(self, examples: list[Any]) -> Batch:
        batch = self._collator(examples)
        self._batches.append({name: x.clone() for name, x in batch.items() if name != "index"})
        return batch

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            state = {name: x.detach().clone() for name, x in module.state_dict().items()}
            self._states.append(state)

    @property
    def seen(self) -> list[MicroBatch]:
        pairs = zip(self._states, self._batches, strict=True)
        return [MicroBatch(state, batch) for state, batch in pairs]


def gradients_one_at_a_time(
    model: nn.Module, seen: MicroBatch, own_loss: OwnLoss
) -> dict[str, Tensor]:
    """`[B, *shape]` for each parameter, at the weights of that pass, in float64."""
    model = copy.deepcopy(model).eval()
    model._forward_pre_hooks.clear()
    model.load_state_dict(seen.state)
    names = list(seen.batch)

    def loss(model: nn.Module, values: tuple[Tensor, ...]) -> Tensor:
        return own_loss(model, dict(zip(names, values, strict=True)))

    return per_example_gradients(model, loss, tuple(seen.batch.values()))


def norms_one_at_a_time(model: nn.Module, seen: MicroBatch, own_loss: OwnLoss) -> Tensor:
    """Norms `[B]`."""
    gradients = gradients_one_at_a_time(model, seen, own_loss)
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Settings of a short run on the CPU that writes nothing."""
    given = {
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**given, **options})
