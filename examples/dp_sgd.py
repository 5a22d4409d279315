"""
DP-SGD: private training with an epsilon
========================================

Differential privacy bounds what a trained model tells about any one example. DP-SGD reaches it in
three steps: draw each example into a batch by chance, clip its gradient to a norm, and add noise of
that size to the sum. An accountant then says how much has been told, as a number epsilon.

This trains a network on digits, first with ``pc.NormClip`` and a loop of one's own, then with the
privacy engine of Opacus, whose gradients come from the same pass.
"""

# %%
# Batches by Poisson sampling
# ---------------------------
# Each example is in a batch with the same probability, whatever the others do. That is what the
# accountant assumes. Batches then have different sizes, and a small one may be empty.

import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import pycoherence as pc
from pycoherence.integrations.opacus import PrivacyEngine

warnings.filterwarnings("ignore", message="Secure RNG turned off")
warnings.filterwarnings("ignore", message="Optimal order is the")

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(labels))
train, test = order[:1500], order[1500:]
rate, epochs, delta = 0.2, 12, 1e-4
expected = rate * len(train)


def batches():
    """The examples of each batch of one epoch."""
    for _ in range(round(1 / rate)):
        yield train[torch.rand(len(train)) < rate]


sizes = [len(batch) for batch in batches()]
print(f"expected {expected:.0f} examples in a batch, drew {min(sizes)} to {max(sizes)}")

# %%
# The noise for an epsilon
# ------------------------
# How much noise a given epsilon needs depends on the sampling rate and the number of steps.

target = 4.0
sigma = get_noise_multiplier(
    target_epsilon=target, target_delta=delta, sample_rate=rate, epochs=epochs, accountant="rdp"
)
print(f"noise multiplier {sigma:.2f} for epsilon {target} at delta {delta}")

# %%
# The loop
# --------
# ``NormClip`` clips and adds the noise. The sum is divided by the size that is expected, which says
# nothing about the examples, and not by the one that was drawn. The accountant counts each step.


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def accuracy(model):
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


def fit(rule):
    model, accountant = network(), RDPAccountant()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    history = []
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            with pc.aggregate(model, rule):
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            accountant.step(noise_multiplier=rule.noise_multiplier, sample_rate=rate)
        history.append(
            (accountant.get_epsilon(delta) if rule.noise_multiplier else 0, accuracy(model))
        )
    return history


private = fit(pc.NormClip(1.0, sigma, expected_batch_size=expected))
plain = fit(pc.NormClip(1e6, expected_batch_size=expected))
print(f"private: {private[-1][1]:.1%} at epsilon {private[-1][0]:.2f}; plain: {plain[-1][1]:.1%}")

# %%
# Without a threshold to tune
# ---------------------------
# ``AutoClip`` divides each gradient by its norm. ``AdaptiveClip`` moves the threshold to a quantile
# of the norms, which it counts with noise of its own.

others = {
    "NormClip": private,
    "AutoClip": fit(pc.AutoClip(1.0, sigma, expected_batch_size=expected)),
    "AdaptiveClip": fit(pc.AdaptiveClip(1.0, sigma, expected_batch_size=expected)),
}

fig, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, history in others.items():
    axes.plot(*zip(*history, strict=True), marker=".", label=name)
axes.axhline(plain[-1][1], color="gray", linestyle=":", label="without noise")
axes.set(xlabel=f"epsilon spent, at delta {delta}", ylabel="test accuracy")
axes.legend()
plt.show()

# %%
# With Opacus
# -----------
# The engine takes the same arguments as Opacus' own and gives the same updates, to rounding. It
# draws the batches, adds the noise and counts, and the loop is an ordinary one.

model, engine = network(), PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5),
    data_loader=DataLoader(TensorDataset(images[train], labels[train]), batch_size=round(expected)),
    target_epsilon=target,
    target_delta=delta,
    epochs=epochs,
    max_grad_norm=1.0,
)
for _ in range(epochs):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
print(f"Opacus' loop: {accuracy(model):.1%} at epsilon {engine.get_epsilon(delta):.2f}")
