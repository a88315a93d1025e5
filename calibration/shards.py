"""Into how many blocks the transforms of o_proj and down_proj are split."""

import math

from .errors import UserError
from .factors import QUICK_TILE, quick_pairs
from .recipe import SHARDS, Recipe


def legal_shards(heads: int, kv_heads: int, intermediate: int) -> list[int]:
    """Those of ``SHARDS`` that divide the query heads and the intermediate size, and whose ranks can share the KV
    heads evenly (by splitting or by repeating them)."""
    common = math.gcd(heads, intermediate)
    return [s for s in SHARDS if common % s == 0 and (kv_heads % s == 0 or s % kv_heads == 0)]


def quick_shards(heads: int, kv_heads: int, intermediate: int) -> int:
    """The fewest for which down_proj's transform is one that the GPU kernels are quick with; 1 if none is."""
    for shards in legal_shards(heads, kv_heads, intermediate):
        width = intermediate // shards
        if width % 8 == 0 and quick_pairs(width):  # rows of 3 bits are packed in steps of 8
            return shards
    return 1


def choose_shards(recipe: Recipe, heads: int, kv_heads: int, intermediate: int) -> int:
    """The recipe's number of shards, or the one that suits the model where it leaves that open.

    16-bit activations and 8-bit weights have one: vLLM's kernels, which serve them, take one scale for a row, or for a
    token. So has a transform with factors that were asked to be wider than quick. Raises UserError if the recipe's
    number does not fit the model.
    """
    if recipe.shards is None:
        ours = recipe.activation_bits < 16 and recipe.weight_bits < 8
        narrow = "down" in recipe.transforms and (recipe.widest_factor or 0) <= QUICK_TILE
        return quick_shards(heads, kv_heads, intermediate) if ours and narrow else 1
    legal = legal_shards(heads, kv_heads, intermediate)
    if recipe.shards not in legal:
        raise UserError(
            f"shards={recipe.shards} does not fit {heads} query heads, {kv_heads} KV heads and intermediate size "
            f"{intermediate}; use one of {', '.join(map(str, legal))}"
        )
    return recipe.shards
