"""
Wrong labels in Lightning's Trainer
===================================

The gradients of the single examples tell, while a network trains, how much the batch agrees and who
does not. This example trains a small ResNet in Lightning's ``Trainer`` on digits, a fifth of whose
labels are wrong. One callback measures every step; the ``LightningModule`` knows nothing of it.
"""

# %%
# Data, and labels that are wrong
# -------------------------------
# Each batch has images, labels, and whether a label is wrong. Training ignores the last.

import logging
import warnings

import lightning.pytorch as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycoherence.integrations.lightning import PerExampleCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
wrong = torch.rand(len(labels)) < 0.2
given = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)
train, test = TensorDataset(images[:1280], given[:1280], wrong[:1280]), slice(1280, None)

# %%
# The network, as anyone would write it
# -------------------------------------
# It has GroupNorm: with BatchNorm in training mode no example has a gradient of its own.


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch, index):
        x, y, _ = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


# %%
# The callback
# ------------
# ``PerExampleCallback`` alone would do for the coherence. It is derived from here, to take down the
# norms of each step beside what only the batch knows. ``records`` has the record of each
# micro-batch of the last step; the examples are in the order of the batch.


class Watch(PerExampleCallback):
    def __init__(self):
        super().__init__()
        self.norms = {True: [], False: []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        norms, is_wrong = self.records[-1].sq_norms.sqrt(), batch[2]
        for kind, found in self.norms.items():
            found.append(norms[is_wrong == kind].median().item())


watch = Watch()
trainer = L.Trainer(
    max_epochs=8,
    accelerator="cpu",
    callbacks=[watch],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Digits()
trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))

with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"{len(watch.history)} steps, test accuracy {accuracy:.0%}")

# %%
# The result
# ----------
# ``history`` has a row for each step, the same that a logger of the Trainer gets.

steps = [row["step"] for row in watch.history]
smooth = [
    sum(row["coherence/m"] for row in watch.history[max(0, i - 9) : i + 1]) / min(10, i + 1)
    for i in range(len(steps))
]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(steps, [row["coherence/m"] for row in watch.history], color="#bbbbbb", linewidth=0.8)
left.plot(steps, smooth, color="black", label="mean of 10 steps")
left.axhline(1, color="#999999", linewidth=1, linestyle="--")
left.set(xlabel="training step", yscale="log", title="m-coherence of a batch of 64")
left.legend(frameon=False)
for kind, colour, name in ((False, "#0072b2", "right labels"), (True, "#d55e00", "wrong labels")):
    right.plot(steps, watch.norms[kind], color=colour, label=name)
right.set(xlabel="training step", title="median norm of an example's gradient", ylim=(0, None))
right.legend(frameon=False)
for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# While the digits are being learned, a step for one example helps several others. Then the
# gradients of the right labels fade, those of the wrong ones stay large, and what is left of the
# batch agrees little. The largest norms are the labels to look at: one batch with all examples
# lists them.

listing = PerExampleCallback()
trainer = L.Trainer(
    max_epochs=1,
    accelerator="cpu",
    callbacks=[listing],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(train, batch_size=len(train)))
order = listing.records[0].sq_norms.argsort(descending=True)
listed = wrong[order[:100]].float().mean()
print(f"wrong labels: {listed:.0%} of the 100 largest norms, {wrong.float().mean():.0%} of all")
