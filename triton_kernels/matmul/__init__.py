"""Reductions that are one product of matrices: sums of outer products, and dot products."""
