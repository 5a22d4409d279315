"""Which way each output of `linear_reduce` comes from, by what the ways would cost."""

import functools
from itertools import combinations

from pycoherence.triton_kernels.launch.host import cdiv

# The cost of an operation of an epilogue, in multiply-adds of the products beside it. The epilogue
# of norms and a sum is 280 instructions of a warp for a tile of 128x128 (SASS of sm_90), the time
# of the tensor cores for 94 positions of half precision. Predicted, not measured.
_EPILOGUE = {"half": 47.0, "tf32": 24.0, "float32": 2.0, "float64": 2.0}

# For tiles of 128x256 the L2 cache has to give three quarters as much as for those of 128x128, and
# the epilogue of twice the numbers takes less than twice as long.
_WIDE, _WIDE_EPILOGUE = 0.76, 28.0

# Positions that the engine multiplies at a time; those past the last are zeros.
_STEP = {"half": 64, "tf32": 32, "float32": 32, "float64": 16}

# Operations that the engine does with each number of an example's gradient.
_OPERATIONS = {
    "sq_norms": 1.0,
    "dots": 1.0,
    "weighted_sum": 1.0,
    "second_moment": 1.0,
    "sign_sum": 3.0,
}

# Products of numbers with the digits of float32, three of TensorFloat-32 each, beside half ones.
_CONVERTED = {"half": 6.0, "tf32": 1.0, "float32": 1.0, "float64": 1.0}

# Products of Grams cancel, so that they are never taken of TensorFloat-32 once alone.
_EXACT = {"half": 1.0, "tf32": 3.0, "float32": 1.0, "float64": 1.0}
_GHOST_BLOCK = 64


@functools.lru_cache(maxsize=4096)
def from_engine(
    b: int,
    t: int,
    i: int,
    o: int,
    kind: str,
    wanted: frozenset[str],
    scaled: bool,
    wide: bool = False,
) -> frozenset[str]:
    """Those of the wanted outputs that the tile engine gives for less than the other ways do.

    The others are, by output: squared norms from products of Grams, or of norms if `T = 1`; dots
    from the products of the direction with the rows of x; sums from one product of matrices, and
    so second moments and signs if `T = 1`, of squares and signs.

    Args:
        b: Number of examples.
        t: Positions.
        i: Inputs.
        o: Outputs.
        kind: `"half"`, `"tf32"`, `"float32"` or `"float64"`.
        wanted: Outputs, those of `_OPERATIONS` alone.
        scaled: Whether the sum has coefficients.
        wide: Whether the engine has tiles of 128x256 for them.
    """
    epilogue, speed = (_WIDE_EPILOGUE, _WIDE) if wide else (_EPILOGUE[kind], 1.0)
    products, convert = float(b * t * i * o), _CONVERTED[kind]
    ghost = b * t * (t + _GHOST_BLOCK) / 2 * (i + o) * _EXACT[kind]
    ways = {
        "sq_norms": 0.0 if t == 1 else ghost,
        "dots": products * convert,
        "weighted_sum": products * (convert if scaled else 1.0),
    }
    if t == 1:
        ways |= {"second_moment": products * convert, "sign_sum": products}
    must = wanted - ways.keys()
    free = sorted(wanted - must)

    def cost(chosen: frozenset[str]) -> float:
        operations = sum(_OPERATIONS[name] for name in chosen)
        each = speed * (cdiv(t, _STEP[kind]) * _STEP[kind] + epilogue * operations)
        return bool(chosen) * b * i * o * each + sum(ways[name] for name in wanted - chosen)

    choices = (must.union(some) for n in range(len(free) + 1) for some in combinations(free, n))
    return min(choices, key=cost)
