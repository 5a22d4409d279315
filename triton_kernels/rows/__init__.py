"""Gradients as the rows of a matrix: products of two rows, depthwise ones, materialised ones."""
