"""MagR: weights of a smaller range that compute the same on the calibration text (arXiv 2406.00800).

    min over W:  1/2 ||X (W - W0)^T||^2 + alpha * sum over rows (or groups) of max|w|

by proximal gradient steps, with X^T X divided by its largest eigenvalue.
"""

import torch
from torch import Tensor

from .rounding import largest_eigenvalue
from .weights import grouped

NEWTON_STEPS = 50


def shrink_range(
    weight: Tensor, hessian: Tensor, alpha: float, steps: int, group_size: int | None
) -> Tensor:
    """The weight [out, in] with a smaller range, in its dtype.

    hessian: sum of z^T z over the layer's inputs [in, in]. alpha: 1e-3 for a scale for each row, 1e-4 for
    groups in the paper. steps: proximal gradient steps (paper: 150 to 200).
    """
    top = largest_eigenvalue(hessian)
    if top == 0:  # nothing to keep
        return weight
    start, unit = weight.float(), (hessian / top).float()
    w = start
    for _ in range(steps):
        w = clip_to_prox(grouped(w - (w - start) @ unit, group_size), alpha).flatten(-2)
    return w.to(weight.dtype)


def clip_to_prox(v: Tensor, alpha: float) -> Tensor:
    """Proximal map of ``alpha * max|.|`` over the last dimension of v [..., K].

    It clips to the level above which the excess of |v| adds up to alpha (Moreau: v minus alpha times the
    projection of v / alpha on the unit l1 ball); 0 if all of v is less than that. The level is found by Newton
    steps from below, which end in it after finitely many, because the excess is convex and piecewise linear.
    """
    size = v.abs()
    level = (size.amax(dim=-1, keepdim=True) - alpha).clamp(min=0)
    for _ in range(NEWTON_STEPS):
        above = size > level
        excess = ((size - level) * above).sum(dim=-1, keepdim=True) - alpha
        step = excess / above.sum(dim=-1, keepdim=True).clamp(min=1)
        level = (level + step).clamp(min=0)
        if not (step > 1e-6 * level).any():
            break
    return torch.minimum(torch.maximum(v, -level), level)
