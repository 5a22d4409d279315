"""
Distributed: one coherence for two processes
============================================

Two processes train one network with ``DistributedDataParallel``, each on its half of every batch.
With ``group=`` their records hold the statistics of the whole batch, the same numbers on both and
the same as in one process.

This file runs as it is: without ``torchrun`` it starts itself again in two processes over gloo,
which needs no GPU, and draws what they have found. With ``torchrun --nproc-per-node 2`` and data of
your own the upper part is all you need.
"""

# %%
# The training of one process
# ---------------------------
# Only ``group=`` is new. Reading a record sends nothing, so that one rank may do it alone.

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import pycoherence as pc

torch.set_num_threads(1)


def data():
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() - images.float().mean(0)
    return images / images.std(), labels


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(*layers)


def train(steps=60, batch_size=64):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = data()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.Generator().manual_seed(0)  # the same on all ranks
    found = []
    for _ in range(steps):
        batch = torch.randint(len(labels), (batch_size,), generator=batches)
        mine = batch.tensor_split(ranks)[rank]
        optimizer.zero_grad()
        with pc.collect(model, pc.SqNorms(), group=dist.group.WORLD) as record:
            F.cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
        whole, local = record.coherence(), record.local.coherence()
        found.append(
            {
                "whole": whole.m,
                "local": local.m,
                "whole_alpha": whole.unbiased_alpha,
                "local_alpha": local.unbiased_alpha,
                "noise_scale": whole.noise_scale,
            }
        )
    return found


# %%
# Two processes
# -------------
# ``torchrun`` sets ``RANK`` for the processes that it starts. These train, and leave what they have
# found in a file.

if "RANK" in os.environ:
    dist.init_process_group("gloo")
    found = train()
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    sys.exit()

launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([*launch, inspect.getsourcefile(train), folder], check=True)
    first, second = (json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1))

assert [step["whole"] for step in first] == [step["whole"] for step in second]
print(f"step 0, rank 0 alone: m = {first[0]['local']:.3f} of 32 examples")
print(f"step 0, rank 1 alone: m = {second[0]['local']:.3f} of 32 examples")
print(f"step 0, both: m = {first[0]['whole']:.3f} of 64 examples")

# %%
# One process with the whole batch gives the same.

images, labels = data()
batch = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(0))
model = network()
with pc.collect(model, pc.SqNorms()) as record:
    F.cross_entropy(model(images[batch]), labels[batch]).backward()
print(f"one process: m = {record.coherence().m:.3f}")
assert abs(record.coherence().m - first[0]["whole"]) < 1e-4

# %%
# The view of each rank
# ---------------------
# The m of 32 examples and that of 64 are not of one scale, since m counts examples.
# ``unbiased_alpha`` estimates the same number from any of them: the mean dot product of two
# examples, over their mean squared norm. Estimates from the whole batch scatter less.

import matplotlib.pyplot as plt

figure, (coherence, noise) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, steps, key, colour in (
    ("rank 0", first, "local_alpha", "#9ecae1"),
    ("rank 1", second, "local_alpha", "#c7b8e0"),
    ("both", first, "whole_alpha", "#0072b2"),
):
    width = 2.5 if name == "both" else 1.5
    coherence.plot([step[key] for step in steps], color=colour, linewidth=width, label=name)
coherence.set(xlabel="training step", title="unbiased alpha")
coherence.legend(frameon=False)
noise.plot([step["noise_scale"] for step in first], color="#0072b2", linewidth=2)
noise.set(xlabel="training step", title="noise scale, in examples", yscale="log")
noise.yaxis.set_major_formatter("{x:g}")
for axes in (coherence, noise):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# Robust rules take ``group=`` too: ``pc.aggregate(model, pc.Winsorized(4),
# group=dist.group.WORLD)`` trims the examples of all ranks together. Sharded models and several
# meters work the same way.
