"""Split a dimension into the two sizes of a Kronecker product."""

from .errors import UserError

MAX_FACTOR = 1024
"""A larger factor costs more than the linear layer it serves."""
KERNEL_TILE = (128, 256)
"""Largest left and right factor that the fused GPU kernels hold on chip."""


def factor_pair(n: int, name: str = "dimension", widest: int | None = None) -> tuple[int, int]:
    """(left, right) with ``left * right = n`` and ``left <= right``, as balanced as n allows.

    Pairs that fit the GPU kernels come first; among them a pair of multiples of 16 (the tensor cores'
    tile) wins if its sum is at most 1.3 times the smallest. widest: take the pair with the largest right factor
    up to it that fits the kernels instead, where there is one. Raises UserError naming ``name`` if no pair
    has both factors up to 1024.
    """
    pairs = [(a, n // a) for a in range(1, int(n**0.5) + 1) if n % a == 0]
    fitting = [p for p in pairs if p[0] <= KERNEL_TILE[0] and p[1] <= KERNEL_TILE[1]]
    wide = [p for p in fitting if widest and p[1] <= widest]
    if wide:
        return min(wide)
    best = min(fitting or pairs, key=sum)
    aligned = [
        p for p in fitting or pairs if p[0] % 16 == 0 and p[1] % 16 == 0 and sum(p) <= 1.3 * sum(best)
    ]
    left, right = min(aligned, key=sum) if aligned else best
    if right > MAX_FACTOR:
        raise UserError(
            f"{name} {n} has no factor pair with both factors up to {MAX_FACTOR} (the best is "
            f"{left} x {right}); pick a number of shards that gives a friendlier block, or another model"
        )
    return left, right
