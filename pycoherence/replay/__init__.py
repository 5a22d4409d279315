"""Replay: one pass of the capture, forward and backward, as a graph that runs without it.

Read in this order: `passes` (what is traced, and what comes out of it), `trace` (how a graph is
made of it), `known` (which numbers may be read meanwhile), `state` (what a graph depends on beside
its inputs), `replay` (how it is carried out and compared).
"""

from pycoherence.replay.passes import Pass, Tree, choices_of, results_of
from pycoherence.replay.replay import Backend, Replay, differences
from pycoherence.replay.state import PythonState, ambient
from pycoherence.replay.trace import Inputs, Trace, like, tensors_in, trace

__all__ = [
    "Backend",
    "Inputs",
    "Pass",
    "PythonState",
    "Replay",
    "Trace",
    "Tree",
    "ambient",
    "choices_of",
    "differences",
    "like",
    "results_of",
    "tensors_in",
    "trace",
]
