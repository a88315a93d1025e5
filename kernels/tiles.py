"""Which tile ``w4_gemm`` uses: a table measured per GPU, and a rule for every shape that is not in it."""

from functools import cache
from math import log2
from typing import NamedTuple

from .tile_table import TABLE

BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Tile(NamedTuple):
    """One configuration of ``w4_gemm``: ``bm`` tokens by ``bn`` weight rows. With ``bm`` 1 the kernel for one token.

    kb: blocks of 128 columns a step. group: token tiles that share a weight tile while it is in L2.
    prefetch: blocks of weights that L2 is asked for before the activations are there (not Hopper's kernel).
    ctas: 0 for the plain Triton kernel and the one for one token; else the Hopper kernel, persistent, so many
    programs on an SM. split: programs that share a tile, each a part of K (Hopper kernel; 1 or a multiple of
    the shards).
    """

    bm: int
    bn: int
    warps: int
    stages: int
    kb: int = 1
    group: int = 8
    prefetch: int = 0
    ctas: int = 0
    split: int = 1

    def fits(self, n: int, k: int, shards: int) -> bool:
        """Whether this tile can compute [T, k] x [n, k].

        The plain kernel takes everything, the one for one token whole blocks of columns. The Hopper kernel
        loads rows of a multiple of 16 bytes, an even number of whole blocks in every part of K. A part lies in
        one shard; a program that has all of K keeps two accumulators where there are several shards.
        """
        if self.bm == 1:
            return k % (128 * shards) == 0
        if not self.ctas:
            return True
        if self.split > 1:
            return n % 8 == 0 and self.split % shards == 0 and k % (256 * self.split) == 0
        small = shards == 1 or self.bm * self.bn <= 2**14 * self.warps // 8
        return n % 8 == 0 and k % (256 * shards) == 0 and small


PLAIN = {
    16: Tile(16, 32, 2, 4, 2, 1),
    32: Tile(32, 64, 4, 4, 2, 1),
    64: Tile(64, 64, 4, 4, 2),
    128: Tile(64, 128, 4, 4),
    8192: Tile(128, 128, 8, 4),
}


def bucket(t: int, buckets: tuple[int, ...] = BUCKETS) -> int:
    """The smallest of ``buckets`` that holds ``t`` tokens, else the largest."""
    return next((b for b in buckets if t <= b), buckets[-1])


def w4_gemm_tile(gpu: str, hopper: bool, t: int, n: int, k: int, shards: int) -> Tile:
    """The tile for ``t`` tokens and a weight [n, k] on the card named ``gpu``.

    A shape in the table gets its own tile. Another one on a Hopper card (``hopper``) gets that of the most
    similar shape it fits. What was not measured on a Hopper card is taken from another one; any other card gets
    the plain kernel's.
    """
    return _tile(gpu, hopper, bucket(t), n, k, shards)


@cache
def _tile(gpu: str, hopper: bool, tokens: int, n: int, k: int, shards: int) -> Tile:
    if hopper:
        table: dict[tuple[int, int, int], dict[int, tuple[int, ...]]] = {}
        # What comes later counts: this card's own rows, then those of the first card in the table.
        for card in (*reversed(TABLE), gpu):
            for measured, tiles in TABLE.get(card, {}).items():
                table[measured] = table.get(measured, {}) | tiles

        def distance(shape: tuple[int, int, int]) -> float:
            size = abs(log2(shape[0] / n)) + abs(log2(shape[1] / k))
            unlike = (shape[2] > 1) != (shards > 1)  # one accumulator or two: other tiles
            return size + 0.1 * abs(log2(shape[2] / shards)) + 8 * unlike

        nearest = sorted(table, key=distance)
        # A tile for many more tokens would be half empty: rather another shape's, if any has a closer row.
        for most in (2 * tokens, max(BUCKETS)):
            for shape in nearest:
                row = bucket(tokens, tuple(sorted(table[shape])))
                tile = Tile(*table[shape][row])
                if row <= most and tile.fits(n, k, shards) and (tile.bm > 1 or tokens == 1):
                    return tile
    return PLAIN[bucket(tokens, tuple(PLAIN))]


def warmup_tokens(most: int) -> list[int]:
    """Numbers of tokens that between them run every kernel variant that up to ``most`` tokens can need.

    Call each op once with each of them at load time; nothing then compiles while serving.
    """
    return sorted({min(b, most) for b in BUCKETS} | {most})
