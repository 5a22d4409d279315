"""Triton kernels, installed as `pycoherence.triton_kernels`; one module per op, named after it.

Reading order: `affine_reduce` and `_finish` (sums of rows, and the last launch of all reductions);
`_device` (launches); `_engine`, `_factors`, `_tiles` (the tile engine), `_outputs` (its results);
`_plan` and `linear_reduce` (which way is taken); `_outer_sums`, `_dots`, `_rows` (plain products,
one position); `_hadamard`, `_cancelled` (norms from products of Grams), `_products`,
`_product_tiles` (Gram matrices), `_materialised`, `_depthwise` (gradients as rows), `_order`;
`_tape` and `_together` (what the host does again, and for several ops at once); `_tune`.
docs/kernels.md says why.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this is pycoherence's source folder, not the package of that name: import "
        "pycoherence.triton_kernels, or run outside the repository root (python -P)"
    )
