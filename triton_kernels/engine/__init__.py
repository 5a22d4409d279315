"""The tile engine: gradients of examples are made tile by tile of the parameter, and reduced.

Read in this order: `factors` (what goes in), `kernel`, `tiles` (their sizes), `outputs` (what comes
out), `cost` (when another way is cheaper), `tune` (sizes measured on the GPU at hand).
"""
