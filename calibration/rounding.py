"""From folded weights to integer codes: round to nearest, GPTQ, or Qronos.

All take a weight [out, in] with rows of any number of layers that share an input, and fixed scales.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.quantize import codes_ref
from .capture import Repeated

Rule = Literal["mean", "spectral", "column"]

LADDER = 10.0
"""Factor between two rungs of the damping ladder."""
LAST_RUNG = 1e3
POWER_STEPS = 50


def rtn(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round weight [out, in] to nearest on scale float32 [out, groups]. Returns codes int8 [out, in]."""
    groups = weight.unflatten(-1, (scale.shape[1], -1))
    return codes_ref(groups, scale.to(weight.dtype), bits).flatten(-2).to(torch.int8)


@dataclass(frozen=True)
class Sweep:
    """One site's inputs, made ready for rounding columns one after another.

    order: int64 [K], which column comes when. hessian: H in that order, float64 [K, K], without damping but
    with the mean diagonal in place of dead inputs' zeros. dead: bool [K], in that order. amount: lambda of
    each column [K]. upper: U with ``(H + diag(lambda))^-1 = U^T U``, upper triangular. tried: the fractions
    of the damping ladder, of which the last held.
    """

    order: Tensor
    hessian: Tensor
    dead: Tensor
    amount: Tensor
    upper: Tensor
    tried: list[float]

    @property
    def bound(self) -> float:
        """``sum_j 1/U_jj^2 / tr H``: how much of the round-to-nearest error is left at worst.

        If no code saturates, GPTQ's error is ``||X(w-q)||^2 + sum_j lambda_j (w_j-q_j)^2 <= scale^2/4 sum_j 1/U_jj^2``
        for each row (the kind of deterministic bound that arXiv 2508.04853 gives). Independent roundings to
        nearest would have tr H in place of the sum.
        """
        return float((self.upper.diagonal() ** -2).sum() / self.hessian.diagonal().sum())


def prepare(hessian: Tensor, fraction: float, rule: Rule = "mean", by_norm: bool = False) -> Sweep:
    """Order, damp and factor a site's Hessian.

    hessian: sum of z^T z over the site's quantized inputs, float64 [K, K]; changed, and kept in the result unless
    columns move. by_norm: columns of the largest norm first (GPTQ's act-order; the order that the error bounds of
    arXiv 2508.04853 favour), else as they come. rule: lambda is ``fraction`` of the mean diagonal (GPTQ), of the
    largest eigenvalue (Qronos: the condition number stays below 1 + 1/fraction), or of each column's own diagonal
    entry (rounding then does not depend on the scale of any input; one huge outlier makes the other two rules round
    to nearest everywhere else). It is raised tenfold until the factorization holds.
    Raises ArithmeticError if the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ArithmeticError("the Hessian is not finite; the calibration activations hold NaN or inf")
    diagonal = hessian.diagonal()
    order = torch.arange(len(hessian), device=hessian.device)
    if by_norm:
        order = diagonal.argsort(descending=True, stable=True)
    hessian = in_order(hessian, order)
    dead = hessian.diagonal() <= 0
    live = diagonal[diagonal > 0]
    hessian.diagonal()[dead] = live.mean() if len(live) else 1.0
    base = hessian.diagonal().clone()
    if rule != "column":
        base[:] = base.mean() if rule == "mean" else largest_eigenvalue(hessian)
    tried = [fraction]
    while (upper := inverse_upper(damped(hessian, tried[-1] * base))) is None:
        if tried[-1] > LAST_RUNG:
            raise ArithmeticError("the Hessian cannot be factored at any damping; it is not symmetric")
        tried.append(tried[-1] * LADDER)
    return Sweep(order, hessian, dead, tried[-1] * base, upper, tried)


def in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``matrix`` [K, K] in ``order`` [K]: itself where none moves (it may have gigabytes), else
    a copy."""
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return matrix
    return matrix[order][:, order]


def damped(hessian: Tensor, amount: Tensor) -> Tensor:
    """``hessian + diag(amount)``, a new matrix [K, K]."""
    out = hessian.clone()
    out.diagonal().add_(amount)
    return out


def inverse_upper(matrix: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of ``matrix`` [K, K], None if that is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    del matrix  # a wide layer's is gigabytes
    if failed:
        return None
    inverse = torch.cholesky_inverse(factor)
    del factor
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    del inverse
    return None if failed or not torch.isfinite(upper).all() else upper


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Of a positive semidefinite matrix, by power iteration from a vector of ones."""
    vector = matrix.new_ones(len(matrix))
    for _ in range(POWER_STEPS):
        vector = matrix @ (vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny))
    return vector.norm()


def gptq(weight: Tensor, scale: Tensor, sweep: Sweep, bits: int, block: int = 128) -> Tensor:
    """GPTQ, also called OPTQ (arXiv 2210.17323, algorithm 1), with scales fixed beforehand.

    weight: [out, in] float64. scale: float32 [out, groups]. Columns are rounded in the sweep's order; each
    one's error moves to those after it, in blocks of ``block``. Returns codes int8 [out, in].
    """
    steps = column_scale(scale, weight)[:, sweep.order]
    codes = torch.empty_like(weight)
    round_columns(weight[:, sweep.order], steps, sweep.upper, bits, block, codes)
    return back_in_order(codes, sweep.order)


def qronos(
    weight: Tensor, scale: Tensor, sweep: Sweep, cross: Tensor, bits: int, block: int = 128
) -> Tensor:
    """Qronos: round so that the rounded layer on the rounded prefix's inputs X~ gives what the exact layer
    gives on the exact inputs X (Zhang et al. 2025; bounds in arXiv 2508.04853).

    weight, scale: as ``gptq``. sweep: of ``H = X~^T X~``. cross: ``G = X~^T X``, float64 [in, in], changed. With w
    the exact row and 1 the first column of the sweep:

        q_1    = Q((G_1 w - H_1,2: w_2:) / H_11)
        w_2:  <- (H_2:,2: + lambda I)^-1 ((G + lambda I)_2: w - H_2:,1 q_1)

    and the columns after the first as in GPTQ. Returns as ``gptq``.
    """
    steps = column_scale(scale, weight)[:, sweep.order]
    w = weight[:, sweep.order]
    codes = torch.empty_like(w)
    h, g = sweep.hessian, in_order(cross, sweep.order)
    g.diagonal()[sweep.dead] = h.diagonal()[
        sweep.dead
    ]  # of inputs that are always 0, w stays what it is
    first = (w @ g[0] - w[:, 1:] @ h[0, 1:]) / h[0, 0]
    codes[:, :1] = codes_ref(first[:, None], steps[:, 0], bits)
    goal = w @ g[1:].T + sweep.amount[1:] * w[:, 1:] - (codes[:, 0] * steps[:, 0])[:, None] * h[0, 1:]
    rest = sweep.upper[1:, 1:]  # a trailing block of U belongs to the trailing block of H
    round_columns((goal @ rest.T) @ rest, steps[:, 1:], rest, bits, block, codes[:, 1:])
    return back_in_order(codes, sweep.order)


def column_scale(scale: Tensor, weight: Tensor) -> Tensor:
    """Each weight's own scale [out, in] in weight's dtype, of scale [out, groups]."""
    return scale.to(weight.dtype).repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def back_in_order(codes: Tensor, order: Tensor) -> Tensor:
    """Columns that were taken in ``order`` [K] back in their places, int8 [out, K]."""
    out = torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
    out[:, order] = codes.to(torch.int8)
    return out


def round_columns(w: Tensor, steps: Tensor, upper: Tensor, bits: int, block: int, codes: Tensor) -> None:
    """Round the columns of ``w`` [out, K] from the first to the last, spreading each one's error.

    steps: each weight's scale [out, K]. upper: U [K, K]. codes: [out, K], written. w is changed.
    """
    # A column is ten small operations, which a GPU does sooner than Python can ask for them.
    round_some = Repeated(partial(sweep_block, bits=bits), w.device, "rounding of columns")
    for start in range(0, w.shape[1], block):
        some, rest = slice(start, start + block), slice(start + block, None)
        codes[:, some], errors = round_some(w[:, some], steps[:, some], upper[some, some])
        w[:, rest] -= errors @ upper[some, rest]


def sweep_block(w: Tensor, steps: Tensor, upper: Tensor, bits: int) -> Tensor:
    """As ``round_columns`` for the columns of one block. Returns codes, and errors in units of U_jj [2, out, block]."""
    w, out = w.clone(), w.new_empty(2, *w.shape)
    for i in range(w.shape[1]):
        codes = codes_ref(w[:, i : i + 1], steps[:, i], bits)[:, 0]
        errors = (w[:, i] - codes * steps[:, i]) / upper[i, i]
        w[:, i:] -= errors[:, None] * upper[i, i:]
        out[0, :, i], out[1, :, i] = codes, errors
    return out
