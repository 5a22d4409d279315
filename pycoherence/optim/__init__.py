"""Optimizers that combine the gradients of three mini-batches; no per-example gradients needed."""

from pycoherence.optim.m3 import M3
from pycoherence.optim.ra3 import RA3
from pycoherence.optim.rm3 import RM3

__all__ = ["M3", "RA3", "RM3"]
