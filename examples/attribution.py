"""
Attribution: which training examples speak for an answer?
=========================================================

A small step along the gradient of a training example lowers the loss of a test example by their dot
product. So the dot products tell which training examples teach the network an answer, and which
ones hinder it.

A joint batch of training and test examples has all dot products between the two in one backward
pass, and no gradient is stored. Here they show what speaks for and against an answer, and they find
wrong labels.
"""

# %%
# Some wrong labels
# -----------------
# The data are the digits of scikit-learn, 8 x 8 pixels. One training label in ten is replaced by
# another one.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import pycoherence as pc

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(labels))
train, test = order[:1000], order[1000:1400]

given = labels.clone()
wrong = torch.zeros(len(labels), dtype=torch.bool)
wrong[train[torch.randperm(1000)[:100]]] = True
given[wrong] = (labels[wrong] + torch.randint(1, 10, (100,))) % 10

# %%
# Training stops before the wrong labels are learned by heart, since an example that is fitted has
# no gradient left.

layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(5):
    for batch in train[torch.randperm(1000)].split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), given[batch]).backward()
        optimizer.step()

answers = model(images).argmax(1)
print(f"test accuracy {(answers[test] == labels[test]).float().mean():.1%}")

# %%
# One pass over a joint batch
# ---------------------------
# ``record.gram`` has the dot products of all pairs. A block of it is what we want: training
# examples by test examples. Cosines leave the norms out, so that a few large gradients do not
# decide everything.

joint = torch.cat([train, test])
with pc.collect(model, pc.Gram()) as record:
    F.cross_entropy(model(images[joint]), given[joint]).backward()
model.zero_grad()

influence = record.gram[:1000, 1000:]
cosines = pc.metrics.cosines(record.gram)[:1000, 1000:]
print(influence.shape)

# %%
# For an answer and against it
# ----------------------------
# The test example of which the network is least sure is a 7 that it takes for an 8. The training
# examples above have the largest cosines with it: they ask for the same change of the weights.
# Those below ask for the opposite, and two of them carry wrong labels (orange).

losses = F.cross_entropy(model(images[test]), labels[test], reduction="none")
asked = int(losses.argmax())
nearest = cosines[:, asked].argsort(descending=True)


def show(axes, which, title):
    axes.imshow(images[which].view(8, 8), cmap="gray_r")
    axes.set_title(title, fontsize=9, color="#d55e00" if wrong[which] else "black")
    axes.set_axis_off()


figure, axes = plt.subplots(2, 7, figsize=(9, 3.2), layout="constrained")
example = test[asked]
show(axes[0, 0], example, f"test: a {labels[example]},\ntaken for a {answers[example]}")
axes[1, 0].set_axis_off()
for row, chosen in zip(axes[:, 1:], (nearest[:6], nearest.flip(0)[:6]), strict=True):
    for place, i in zip(row, chosen, strict=True):
        show(place, train[i], f"given as {given[train[i]]}\ncosine {cosines[i, asked]:+.2f}")

# %%
# Wrong labels do not pull as their class does
# --------------------------------------------
# An example that is given as a 7 should pull the weights where true 7s pull them. The mean of its
# cosines with the test examples of its label, which are trusted, says whether it does. The norm of
# the gradient needs no trusted examples; it asks how much an example wants, not whether others want
# it too.

same = labels[test] == given[train].unsqueeze(1)
agreement = (cosines * same).sum(1) / same.sum(1)
scores = {
    "little agreement with its label's test examples": -agreement,
    "a large norm": record.gram.diagonal()[:1000],
    "harm to the whole test set": -influence.sum(1),
}
colours = ("#0072b2", "#009e73", "#999999")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, score), colour in zip(scores.items(), colours, strict=True):
    found = wrong[train[score.argsort(descending=True)]].cumsum(0)
    axes.plot(range(1, 1001), found, label=name, color=colour, linewidth=2)
    print(f"{name}: {found[99]} of the first 100 are wrong")
axes.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle=":", label="at best")
axes.set(xlim=(0, 400), ylim=(0, 102))
axes.set(xlabel="training examples looked at", ylabel="wrong labels found, of 100")
axes.grid(alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, title="looked at first", alignment="left")

# %%
# Agreement and norms find nearly nine in ten. The harm to the whole test set finds half: it mixes
# what a step does to its own digit with what it does to the nine others. On another data set the
# order may be another one.
#
# A test set that does not fit beside the training batch goes through in parts: keep the test
# examples and exchange the training examples. For the *mean* of a validation set one direction is
# enough, and ``pc.collect(model, pc.Dots(direction))`` needs no joint batch.
