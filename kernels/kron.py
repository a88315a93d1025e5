"""Kronecker transform of a linear layer's input: ``Z = L^T X R`` with ``X = x.view(a, b)``.

In row-vector form ``z = x (L kron R)`` (FlatQuant, arXiv 2410.09426, equation 5). With S shards the
transform is block-diagonal: block s of the input, ``a*b`` wide, has factors ``L[s]`` and ``R[s]``.
``R = None`` is the head-axis form used before o_proj: ``Z = L^T X``, heads by head_dim.

Rounding points (docs/format.md): the factors are bf16 values; ``Y = X R`` is rounded to x's dtype if
that has 16 bits; products accumulate in float32. A float32 or float64 input is not rounded on the way.
"""

import torch
from torch import Tensor


def kron_wide_ref(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``kron_ref`` before the last rounding: float32, or float64 for a float64 input.

    Differentiable in x, left and right, so calibration trains through the same numbers.

    x: [..., S*a*b]. left: [S, a, a] or None. right: [S, b, b] or None (then b is what a leaves over).
    Returns [..., S*a*b]. Raises ValueError if the factors do not fit x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if left is None and right is None:
        return x.to(wide)
    shards, a, b = factor_sizes(x.shape[-1], left, right)
    y = x.reshape(-1, shards, a, b).to(wide)
    if right is not None:
        y = y @ right.to(wide)
        if x.dtype in (torch.bfloat16, torch.float16):
            y = y.to(x.dtype).to(wide)
    if left is not None:
        y = left.to(wide).mT @ y
    return y.reshape(x.shape)


def factor_sizes(k: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int, int]:
    """(S, a, b) of factors applied to an input of width ``k``; ValueError if they do not fit."""
    some = left if left is not None else right
    if some is None:
        return 1, 1, k
    shards = some.shape[0]
    a = left.shape[1] if left is not None else k // (shards * some.shape[1])
    b = right.shape[1] if right is not None else k // (shards * a)
    if shards * a * b != k or (left is not None and right is not None and right.shape[0] != shards):
        shapes = [tuple(f.shape) for f in (left, right) if f is not None]
        raise ValueError(
            f"transform factors {shapes} do not fit an input of width {k}; "
            "the width must equal shards * left * right"
        )
    return shards, a, b


def kron_ref(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The transform alone, as W4A16 uses it. Shapes as ``kron_wide_ref``; result in x's dtype."""
    return kron_wide_ref(x, left, right).to(x.dtype)
