r"""
The gradient noise scale, and how large a batch should be
=========================================================

A larger batch makes the gradient less noisy; once the noise is smaller than the gradient there is
little left to gain. The *noise scale* says where that is: the variance of the examples' gradients
over the squared norm of their mean,

.. math:: \mathcal{B} = \operatorname{tr} \Sigma / \lVert G \rVert^2,

the batch size at which both are equal (McCandlish et al. 2018, arXiv:1812.06162). It is usually
estimated from gradients at two batch sizes. The norms of the single examples give it from batches
of one size, in the pass that trains. This example measures it in a plain loop, and tries what it
predicts.
"""

# %%
# A plain loop, and a monitor
# ---------------------------
# ``micro_batch`` is put around forward and backward pass; ``step`` ends a step, however many
# micro-batches it had. ``GradientMonitor(model, every=10, log=SummaryWriter())`` would measure each
# tenth step, and write to TensorBoard.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pycoherence as pc

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def draw(size):
    rows = torch.randint(len(images), (size,))
    return images[rows], labels[rows]


def train(size, micro_batches=1, steps=300):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = pc.GradientMonitor(model)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            x, y = draw(size // micro_batches)
            with monitor.micro_batch(loss_scale=1 / micro_batches):
                (F.cross_entropy(model(x), y) / micro_batches).backward()
        optimizer.step()
        monitor.step()
    return model, monitor


runs = {
    "batch of 128": train(128),
    "batch of 512": train(512),
    "batch of 512, as 4 of 128": train(512, micro_batches=4),
}
for name, (_, monitor) in runs.items():
    print(f"{name}: noise scale {monitor.noise_scale(last=50):.0f} over the last 50 steps")

# %%
# How a batch is split does not matter. Batches of 128 train to other weights, and a batch far
# smaller than the noise scale needs many steps for an answer. One step's estimate is a ratio of two
# noisy numbers, so that ``noise_scale(last=n)`` takes the means of both over n steps before it
# divides.
#
# Does a batch of that size have as much noise as gradient?
# ---------------------------------------------------------
# Let the network stay as it is after the last step, and compare the gradients of batches with that
# of all images. Their squared cosine should be :math:`1 / (1 + \mathcal{B} / B)`: one half where
# the batch size is the noise scale.

model = runs["batch of 128"][0]


def gradient(x, y):
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


monitor = pc.GradientMonitor(model)
for _ in range(100):
    x, y = draw(128)
    with monitor.micro_batch():
        F.cross_entropy(model(x), y).backward()
    monitor.step()
predicted = monitor.noise_scale()

whole = gradient(images, labels)
sizes = [2**i for i in range(2, 12)]
cosines = []
for size in sizes:
    found = [gradient(*draw(size)) for _ in range(100)]
    along = torch.stack([g @ whole for g in found]).mean() / whole.norm()
    cosines.append((along**2 / torch.stack([g @ g for g in found]).mean()).item())

# %%
# How many steps does training take?
# ----------------------------------
# For each batch size the learning rate counts, of four, with which the loss of all images is below
# 0.3 first.


def steps_needed(size, rate, most=400):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(most):
        x, y = draw(size)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 5 == 4:
            with torch.no_grad():
                if F.cross_entropy(model(images), labels) < 0.3:
                    return step + 1
    return most


tried = [4, 8, 16, 32, 64, 128, 256, 512]
needed = [min(steps_needed(size, rate) for rate in (0.2, 0.4, 0.8, 1.2)) for size in tried]
for size, steps in zip(tried, needed, strict=True):
    print(f"batch of {size:3}: {steps:3} steps, {size * steps:6} examples")

# %%
# The result
# ----------
# The noise scale grows as training goes on, since the gradient shrinks faster than its noise. In
# the middle is the share of the whole gradient in that of a batch, the squared cosine; the dashed
# line is the noise scale. On the right, larger batches save steps up to some 30 to 60 examples;
# beyond that, twice the examples save a tenth of the steps. The noise scale, from 80 at first to
# several hundred, is a bound here and no more: its authors assume the same curvature in all
# directions, and a few steep ones bound the learning rate first.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
colours = ["#0072b2", "#d55e00", "#009e73"]
for (name, (_, seen)), colour, style in zip(runs.items(), colours, ["-", "-", ":"], strict=True):
    ends = range(50, len(seen.history) + 1, 25)
    windows = [seen.history[end - 50 : end] for end in ends]
    noise = [sum(at["gradient/variance"] for at in window) for window in windows]
    signal = [sum(at["gradient/sq_norm"] for at in window) for window in windows]
    scale = [n / s for n, s in zip(noise, signal, strict=True)]
    axes[0].plot(ends, scale, style, color=colour, label=name)
axes[0].set(xlabel="training step", title="noise scale, over 50 steps", yscale="log")
axes[0].legend(frameon=False)

axes[1].plot(
    sizes, [1 / (1 + predicted / size) for size in sizes], color="black", label="predicted"
)
axes[1].plot(sizes, cosines, "o", color="#d55e00", label="found")
axes[1].axvline(predicted, color="#999999", linewidth=1, linestyle="--")
axes[1].set(xlabel="batch size", xscale="log", title="share of the whole gradient")
axes[1].legend(frameon=False)

axes[2].plot(tried, needed, "o-", color="black")
axes[2].set(xlabel="batch size", xscale="log", yscale="log", title="steps to a loss of 0.3")
axes[2].set_yticks([50, 100, 200], ["50", "100", "200"])
axes[2].minorticks_off()
for axis in axes:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
