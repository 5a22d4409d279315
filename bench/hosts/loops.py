"""The same training in a loop of one's own and in those of hosts, with and without statistics.

Each loop gives the mean norm of each step, for the check, and the seconds of its steps: those from
one batch to the next, as the loader is asked for them. Work before and after all steps is thus left
out.
"""

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pycoherence as pc


class Run(NamedTuple):
    """One run.

    Attributes:
        seconds: Of each step but the first ones.
        norms: The mean norm at each step, of the gradients of the examples' shares in the loss;
            empty if nothing is measured.
    """

    seconds: list[float]
    norms: list[float]


class Task(NamedTuple):
    """A language model, and how long it is trained.

    Attributes:
        model: With `transformers`' arguments and results.
        ids: Of all batches, `[steps * batch, T]`; they are their own labels.
        batch: Examples of a batch.
    """

    model: nn.Module
    ids: Tensor
    batch: int


WARM = 2
"""Steps at the beginning that do not count."""


class Clocked(Dataset):
    """Examples that note when a batch of them is asked for."""

    def __init__(self, task: Task) -> None:
        self._ids, self.times = task.ids, list[float]()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[i], "labels": self._ids[i]}

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.times.append(time.perf_counter())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def loader(self, batch: int) -> DataLoader:
        return DataLoader(self, batch, collate_fn=self.collate)

    @property
    def seconds(self) -> list[float]:
        pairs = zip(self.times[WARM:], self.times[WARM + 1 :], strict=False)
        return [after - before for before, after in pairs]


def bare(task: Task, measured: bool) -> Run:
    """A loop of one's own, with a block of `collect` whose numbers are read."""
    model, data, norms = copy.deepcopy(task.model), Clocked(task), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in data.loader(task.batch):
        optimizer.zero_grad()
        if measured:
            with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
                _loss(model, batch).backward()
            norms.append(record.scalars()["norm/mean"])
        else:
            _loss(model, batch).backward()
        optimizer.step()
    return Run(data.seconds, norms)


def transformers(task: Task, measured: bool) -> Run:
    """The Trainer, with the callback at every step."""
    from transformers import Trainer, TrainingArguments

    from pycoherence.integrations.transformers import PerExampleCallback

    callback, data = PerExampleCallback(pc.SqNorms()), Clocked(task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task.batch,
            num_train_epochs=1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            optim="sgd",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=copy.deepcopy(task.model),
            args=arguments,
            train_dataset=data,
            data_collator=data.collate,
            callbacks=[callback] if measured else [],
        )
        trainer._get_train_sampler = lambda *_: None  # in order, as in the other loops
        trainer.train()
    # The unit there is the sum over an example's tokens, whatever the Trainer divides by.
    return Run(data.seconds, _norms(callback.history, task.batch * (task.ids.shape[1] - 1)))


def lightning(task: Task, measured: bool) -> Run:
    """Lightning's Trainer, with the callback at every step."""
    import lightning.pytorch as L

    from pycoherence.integrations.lightning import PerExampleCallback

    class Module(L.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return _loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    callback, data = PerExampleCallback(pc.SqNorms(), loss_reduction="sum"), Clocked(task)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if measured else [],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on workers of the loader
        trainer.fit(Module(copy.deepcopy(task.model)), data.loader(task.batch))
    return Run(data.seconds, _norms(callback.history))


def accelerate(task: Task, measured: bool) -> Run:
    """A loop with an Accelerator."""
    from accelerate import Accelerator

    from pycoherence.integrations.accelerate import PerExampleMonitor

    data = Clocked(task)
    accelerator = Accelerator(cpu=True)
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data.loader(task.batch))
    monitor = PerExampleMonitor(accelerator, model, pc.SqNorms(), loss_reduction="sum")
    for batch in loader:
        if measured:
            with monitor.micro_batch():
                accelerator.backward(_loss(model, batch))
            monitor.step()
        else:
            accelerator.backward(_loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return Run(data.seconds, _norms(monitor.history))


LOOPS: dict[str, Callable[[Task, bool], Run]] = {
    "bare loop": bare,
    "transformers": transformers,
    "accelerate": accelerate,
    "lightning": lightning,
}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _norms(history: list[dict[str, float]], unit: float = 1.0) -> list[float]:
    return [at["norm/mean"] / unit for at in history]
