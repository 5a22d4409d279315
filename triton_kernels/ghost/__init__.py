"""Ghost norms and dot products: from products of the Grams of the factors, without a gradient.

Read in this order: `norms`, `recompute` (norms whose digits cancelled), `gram`, `gram_kernels`.
"""
