"""
Robust training: digits with wrong labels
=========================================

A large network fits whatever labels it is given, the wrong ones as well. A step along the mean of
the gradients cannot tell them apart. A robust rule can: what only few examples of a batch want is
pulled in, or counts no more than others.

Four networks start from the same weights and see the same batches. Half of the training labels have
been permuted among each other. They differ in one line, the rule.
"""

# %%
# Half of the labels are permuted
# -------------------------------

from contextlib import nullcontext
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pycoherence as pc

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() - images.float().mean(0)
images = images / images.std()
order = torch.randperm(len(labels))
train, test = order[:600], order[600:]

given = labels.clone()
chosen = train[:300]
given[chosen] = labels[chosen[torch.randperm(300)]]
true_share = float((given[train] == labels[train]).float().mean())
print(f"{true_share:.0%} of the given labels are true")

# %%
# One line is different
# ---------------------
# ``aggregate`` fills ``.grad`` with the result of its rule, and any optimizer steps along it. A
# rule needs batches of one size: ``k`` of ``Winsorized(k)`` counts examples.


def accuracy(model, which, target):
    with torch.no_grad():
        return float((model(images[which]).argmax(1) == target[which]).float().mean())


def fit(rule, epochs=30):
    torch.manual_seed(1)
    widths = (64, 256, 256)
    hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    model = nn.Sequential(*hidden, nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(epochs):
        for batch in train[torch.randperm(600)].split(20):
            optimizer.zero_grad()
            with pc.aggregate(model, rule) if rule else nullcontext():
                F.cross_entropy(model(images[batch]), given[batch]).backward()
            optimizer.step()
        history.append((accuracy(model, train, given), accuracy(model, test, labels)))
    return history


rules = {
    "SGD": None,
    "NormClip(1.0)": pc.NormClip(1.0),
    "Winsorized(5)": pc.Winsorized(5),
    "TrimmedMean(5)": pc.TrimmedMean(5),
}
runs = {}
for name, rule in rules.items():
    runs[name] = fit(rule)
    fitted, right = runs[name][-1]
    print(f"{name:15} fits {fitted:.0%} of the given labels, test accuracy {right:.0%}")

# %%
# Who learns the wrong labels?
# ----------------------------
# SGD ends up with all labels by heart, and its test accuracy falls all the while. The three rules
# stop near the share of labels that are true, and their test accuracy stays, but for single epochs
# from which the next ones recover.

colours = dict(zip(rules, ("#d55e00", "#009e73", "#56b4e9", "#0072b2"), strict=True))
figure, (fits, tests) = plt.subplots(1, 2, figsize=(9, 4), sharex=True, layout="constrained")
for name, history in runs.items():
    fitted, right = zip(*history, strict=True)
    epochs = range(1, len(history) + 1)
    fits.plot(epochs, fitted, color=colours[name], linewidth=2, label=name)
    tests.plot(epochs, right, color=colours[name], linewidth=2)
fits.axhline(true_share, color="#999999", linewidth=1, linestyle="--")
fits.text(30, true_share + 0.01, "labels that are true", ha="right", color="#777777")
fits.set_title("training labels fitted, as given", loc="left")
tests.set_title("test images right", loc="left")
for axes in (fits, tests):
    axes.set(xlabel="epoch", ylim=(0.2, 1.02))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
fits.legend(frameon=False, loc="upper left")
plt.show()

# %%
# Limits
# ------
# SGD that is stopped in time does as well, but when to stop is known only with true labels at hand:

for name, history in runs.items():
    best = max(right for _, right in history)
    print(f"{name:15} best test accuracy {best:.0%}")

# %%
# ``NormClip`` also shortens the steps, so that a part of what it does is a smaller learning rate.
# Rules leave out what few examples want, which hits rare classes and odd but true examples too. The
# page on training with wrong labels has a longer study: more rules, batch sizes, and where they
# fail.
