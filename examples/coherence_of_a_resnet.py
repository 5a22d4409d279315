"""
Coherence of a ResNet, layer by layer, with true and with wrong labels
======================================================================

A network learns true labels and random ones alike, if it is large enough, and its training error
does not tell which. The gradients of the single examples do. This example trains a small ResNet
twice and watches the *m-coherence* of each block: how many training examples a step along the
gradient of one of them helps.
"""

# %%
# A ResNet with GroupNorm
# -----------------------
# BatchNorm mixes the examples of a batch in training, so that no example has a gradient of its own.
# GroupNorm does not.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pycoherence as pc


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


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.block1, self.block2 = Block(16, 16, 1), Block(16, 32, 2)
        self.block3 = Block(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.stem(x).relu())))
        return self.head(x.mean((2, 3)))


# %%
# True labels and random ones
# ---------------------------

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
order = torch.randperm(len(labels))
train, test = order[:512], order[512:1024]
kinds = {"true": labels[train], "random": labels[train][torch.randperm(512)]}

# %%
# Measure while training
# ----------------------
# ``CoherenceMeter`` streams over the whole training set at the present weights, and gives the
# coherence of each parameter and module. The training loop itself stays as it is.


def coherence(model, given):
    meter = pc.CoherenceMeter(model)
    for part in torch.arange(512).split(128):
        meter.update(lambda model, b: F.cross_entropy(model(images[train[b]]), given[b]), part)
    return meter.compute()


def fit(given, steps, every):
    torch.manual_seed(1)
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = []
    for step in range(steps + 1):
        if step in every:
            with torch.no_grad():
                fitted = (model(images[train]).argmax(1) == given).float().mean()
                right = (model(images[test]).argmax(1) == labels[test]).float().mean()
            history.append((step, coherence(model, given), float(fitted), float(right)))
        batch = torch.randint(512, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[train[batch]]), given[batch]).backward()
        optimizer.step()
    return history


every = [0, 2, 5, 10, 15, 20, 30, 40, 60, 80, 110, 150, 200, 250, 300, 350, 400]
runs = {kind: fit(given, 400, every) for kind, given in kinds.items()}
for kind, history in runs.items():
    step, found, fitted, right = history[-1]
    print(f"{kind} labels: {fitted:.0%} fitted, test accuracy {right:.0%}, m = {found.m:.1f}")

# %%
# The blocks, one by one
# ----------------------
# ``pc.plot.coherence`` draws the parts of the network over the steps. The lower panels tell how
# many training labels are fitted, and how many test images are right.

parts = ["stem", "block1", "block2", "block3", "head"]
figure, axes = plt.subplots(
    2, 2, figsize=(10, 6.5), sharex=True, sharey="row", height_ratios=[2, 1], layout="constrained"
)
for (kind, history), (above, below) in zip(runs.items(), axes.T, strict=True):
    steps, found, fitted, right = zip(*history, strict=True)
    pc.plot.coherence(list(zip(steps, found, strict=True)), parts=parts, axes=above)
    above.set_title(f"{kind} labels", loc="left", fontweight="bold")
    above.set_xlabel("")
    below.plot(steps, fitted, color="black", label="training labels fitted")
    below.plot(steps, right, color="#d55e00", label="test images right")
    below.set(xlabel="training step", xscale="symlog", ylim=(0, 1.03))
    below.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    below.grid(alpha=0.3)
    below.spines[["top", "right"]].set_visible(False)
axes[0, 0].get_legend().remove()  # that on the right is for both
axes[1, 0].set_ylabel("accuracy")
axes[1, 1].legend(frameon=False)
plt.show()

# %%
# With true labels a step for one example helps about ten examples until nine in ten labels are
# fitted. With random labels it helps one to six: the network fits these too, but slowly, and the
# test images gain nothing. Once the labels are fitted, what is left are a few odd examples that
# have little in common, so that late values do not compare. The fair moment is the same share of
# labels fitted:

for kind, history in runs.items():
    step, found, fitted, _ = next(at for at in history if at[2] >= 0.5)
    print(f"{kind} labels, {fitted:.0%} fitted at step {step}: m = {found.m:.1f}")

# %%
# ``found.by_module`` has every module by name, ``found.by_parameter`` every parameter. Where a
# ResNet of your own has BatchNorm, ``pc.replace_batch_norm(model)`` puts GroupNorm in its place.
