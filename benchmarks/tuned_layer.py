"""What `tune_w4_gemm.py` times: the linear layers of a block with their transforms, each product with a tile to choose.

A product is timed where it stands in a model. With dependent launch its first weights load while the kernels before
it still run, if they leave room on chip, so the tile that is quickest alone need not be quickest there.
"""

from typing import NamedTuple

import torch
from kernel_calls import BF16, DEVICE, Call, codes_at, factors, normal, positive, random_packed

from vllm_flatquant.calibration.factors import factor_pair
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant
from vllm_flatquant.kernels.tiles import Tile
from vllm_flatquant.kernels.w4_gemm import run_tile

Product = tuple[int, int, int]
"""N, K, shards."""


class Layer(NamedTuple):
    """Sizes of a transformer block."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    shards: int

    def products(self) -> dict[str, Product]:
        """Of each linear layer; the largest weight first."""
        wide, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "gate_up": (2 * self.intermediate, self.hidden, 1),
            "down": (self.hidden, self.intermediate, self.shards),
            "qkv": (wide + 2 * keys, self.hidden, 1),
            "o": (self.hidden, wide, self.shards),
        }


LAYERS = {
    "llama-8b": Layer(4096, 32, 8, 128, 14336, 1),
    "llama-8b-2": Layer(4096, 32, 8, 128, 14336, 2),
    "llama-8b-4": Layer(4096, 32, 8, 128, 14336, 4),
    "llama-8b-8": Layer(4096, 32, 8, 128, 14336, 8),
    "llama-70b": Layer(8192, 64, 8, 128, 28672, 2),
    "llama-70b-tp2": Layer(8192, 32, 4, 128, 14336, 1),
    "qwen3-32b": Layer(5120, 64, 8, 128, 25600, 2),
}
"""With more shards than one: a number behind the name, or what suits the model. tp2: one of two ranks."""


class Weights:
    """``count`` sets of a layer's random weights, which take turns, and its factors."""

    def __init__(self, layer: Layer, count: int) -> None:
        self.layer, products = layer, layer.products()
        self.sets = [
            {site: random_packed(n, k) for site, (n, k, _) in products.items()} for _ in range(count)
        ]
        self.scales = {site: positive(n, 1) for site, (n, _, _) in products.items()}
        self.norm = torch.ones(layer.hidden, device=DEVICE, dtype=BF16)
        self.clip, self.clips = positive(1), positive(layer.shards)
        self.hidden = factors(*factor_pair(layer.hidden))
        self.down = factors(*factor_pair(layer.intermediate // layer.shards), layer.shards)
        self.head = factors(layer.heads // layer.shards, 16, layer.shards)[0]


class Tokens:
    """Activations of ``t`` tokens for a layer."""

    def __init__(self, weights: Weights, t: int) -> None:
        self.weights, layer = weights, weights.layer
        self.x, self.residual = normal(t, layer.hidden), normal(t, layer.hidden)
        self.rotated, self.attended = (normal(t, layer.heads * layer.head_dim) for _ in range(2))
        self.gate_up = normal(t, 2 * layer.intermediate)
        self.out = {
            site: torch.empty(t, n, device=DEVICE, dtype=BF16)
            for site, (n, _, _) in layer.products().items()
        }

    def layer_with(self, tiles: dict[str, Tile]) -> Call:
        """A call of the whole layer on weights ``i``. A copy stands for attention: nothing is launched ahead of it."""
        w = self.weights

        def call(i: int) -> None:
            def product(site: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
                run_tile(
                    codes, scale, w.sets[i][site], w.scales[site], None, self.out[site], tiles[site]
                )

            def normed() -> tuple[torch.Tensor, ...]:
                return rmsnorm_kron_quant(self.x, self.residual, w.norm, 1e-5, *w.hidden, w.clip, 4)[:2]

            product("qkv", *normed())
            self.attended.copy_(self.rotated)
            product("o", *kron_quant(self.attended, w.head, None, w.clips, 4))
            product("gate_up", *normed())
            product("down", *silu_mul_kron_quant(self.gate_up, *w.down, w.clips, 4))

        return call

    def product_of(self, site: str, tile: Tile) -> torch.Tensor:
        """One product alone, on random codes that are the same in every call; the output was poisoned before."""
        _, k, shards = self.weights.layer.products()[site]
        torch.manual_seed(0)
        codes, scale = codes_at(len(self.x), k), positive(len(self.x), shards)
        out = self.out[site].fill_(float("nan"))
        weight, weight_scale = self.weights.sets[0][site], self.weights.scales[site]
        run_tile(codes, scale, weight, weight_scale, None, out, tile)
        return out.clone()
