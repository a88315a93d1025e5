"""Split a dimension into the two sizes of a Kronecker product."""

from .errors import UserError

MAX_FACTOR = 1024
"""A larger factor costs more than the linear layer it serves."""
KERNEL_TILE = (128, 256)
"""Largest left and right factor that the fused GPU kernels hold on chip."""
QUICK_TILE = 128
"""Largest factor of a quick transform: padded beyond, a tile's products and registers cost several times as much."""


def quick_pairs(n: int) -> list[tuple[int, int]]:
    """All (left, right) with ``left * right = n`` and ``left <= right`` that the GPU kernels are quick with."""
    return [(a, b) for a, b in _pairs(n) if b <= QUICK_TILE]


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(a, n // a) for a in range(1, int(n**0.5) + 1) if n % a == 0]


def _products(pair: tuple[int, int]) -> int:
    left, right = (max(16, 1 << (n - 1).bit_length()) for n in pair)
    return left * right * (left + right)


def factor_pair(n: int, name: str = "dimension", widest: int | None = None) -> tuple[int, int]:
    """(left, right) with ``left * right = n`` and ``left <= right``, as balanced as n allows.

    Pairs that the GPU kernels are quick with come first, then those that fit them, and among these the pairs of the
    smallest tile, which is what a kernel multiplies: each factor is padded to a power of two. If there are several,
    one that Hopper's kernel takes wins, then one of multiples of 16 if its sum is at most 1.3 times the smallest.
    widest: take the pair with the largest right factor up to it that fits the kernels instead, where there is one.
    Raises UserError naming ``name`` if no pair has both factors up to 1024.
    """
    pairs = _pairs(n)
    fitting = [p for p in pairs if p[0] <= KERNEL_TILE[0] and p[1] <= KERNEL_TILE[1]]
    wide = [p for p in fitting if widest and p[1] <= widest]
    if wide:
        return min(wide)
    if fitting:
        quick = quick_pairs(n) or fitting
        least = min(map(_products, quick))
        pairs = [p for p in quick if _products(p) == least]
    pairs = [p for p in pairs if 64 < p[0] and p[1] in (64, 128)] or pairs
    best = min(pairs, key=sum)
    aligned = [p for p in pairs if p[0] % 16 == 0 and p[1] % 16 == 0 and sum(p) <= 1.3 * sum(best)]
    left, right = min(aligned, key=sum) if aligned else best
    if right > MAX_FACTOR:
        raise UserError(
            f"{name} {n} has no factor pair with both factors up to {MAX_FACTOR} (the best is "
            f"{left} x {right}); pick a number of shards that gives a friendlier block, or another model"
        )
    return left, right
