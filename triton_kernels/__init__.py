"""Triton kernels, installed as `pycoherence.triton_kernels`; one module per op, named after it.

A file beside this one is an op; what several ops share lies in a folder. Read in this order:

1. `affine_reduce` and `launch/finish`: sums of rows, and the last launch of all reductions.
2. `launch/device`: how a kernel is launched; `launch/tape`, `launch/together`: what the host does
   again, and for several ops at once.
3. `engine/`: the tile engine, and `linear_reduce`, which takes it or a cheaper way.
4. `matmul/`, `rows/`: plain products, one position, gradients that are materialised.
5. `ghost/`: norms and Gram matrices from products of Grams.

docs/kernels.md says why.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this is pycoherence's source folder, not the package of that name: import "
        "pycoherence.triton_kernels, or run outside the repository root (python -P)"
    )
