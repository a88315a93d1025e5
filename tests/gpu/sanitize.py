"""One small run of each kernel, for compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
"""

import torch

from vllm_flatquant.kernels.fake_quantize import fake_quantize, fake_quantize_backward
from vllm_flatquant.kernels.jit import hopper
from vllm_flatquant.kernels.kron import kron
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant
from vllm_flatquant.kernels.tiles import PLAIN, Tile
from vllm_flatquant.kernels.w4_gemm import run_tile

HOPPER_TILES = [
    Tile(64, 64, 4, 3, 2, ctas=2, split=2),
    Tile(128, 256, 8, 3, ctas=1),
    Tile(16, 128, 4, 4, ctas=1),
    Tile(256, 128, 8, 4, ctas=1),
]


def main() -> None:
    device = torch.device("cuda")
    for t in (1, 300):
        for a, b in ((12, 20), (64, 64)):
            x = torch.randn(t, a * b, device=device).bfloat16()
            left, right = torch.randn(1, a, a, device=device), torch.randn(1, b, b, device=device)
            one, norm = torch.ones(1, device=device), torch.ones(a * b, device=device)
            kron(x, left, right)
            kron_quant(x, left, None, one, 4)
            kron_quant(x, left, right, one, 8)
            rmsnorm_kron_quant(x, x, norm, 1e-5, left, right, one, 4)
            rmsnorm_kron(x, x, norm, 1e-5, left, right)
            silu_mul_kron_quant(torch.cat([x, x], 1), left, right, one, 4)
            silu_mul_kron(torch.cat([x, x], 1), left, right)
            z = x.float()
            fake_quantize(z, 4, one)
            fake_quantize_backward(z, z, 4, one)
    left, right = torch.randn(1, 100, 100, device=device), torch.randn(1, 128, 128, device=device)
    x, one = torch.randn(300, 25600, device=device).bfloat16(), torch.ones(1, device=device)
    left, right = left.bfloat16(), right.bfloat16()
    silu_mul_kron_quant(x, left, right, one, 4)  # on Hopper another kernel
    silu_mul_kron(x, left, right)
    tiles = [*PLAIN.values(), Tile(1, 8, 4, 1, 8), *(HOPPER_TILES if hopper(device) else [])]
    for t, n, k, shards in [
        (3, 264, 1024, 1),
        (130, 40, 704, 2),
        (130, 520, 1024, 1),
        (9, 264, 2048, 2),
        (1, 266, 1152, 1),
    ]:
        codes = torch.randint(-8, 8, (t, k), dtype=torch.int8, device=device)
        weight = pack_device(torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device), shards)
        scale, weight_scale = torch.rand(t, shards, device=device), torch.rand(n, 1, device=device)
        for tile in tiles:
            if tile.fits(n, k, shards) and (tile.bm > 1 or t == 1):
                out = torch.empty(t, n, dtype=torch.bfloat16, device=device)
                run_tile(codes, scale, weight, weight_scale, None, out, tile)
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
