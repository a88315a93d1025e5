"""Host time of one call of each operator: what a prefill, which runs without CUDA graphs, pays 32 times a layer kind.

    python benchmarks/host_time.py [--profile]

Microseconds of the host for a call on a stream that is never waited for, the best of a few runs: the operator as
a compiled model calls it; with Triton's own launch (which works out the compiled variant at every call); and a
PyTorch product for scale.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from importlib import import_module

import torch
from timing import need_gpu
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_flatquant.chaining import chain_operators
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant
from vllm_flatquant.kernels.w4_gemm import w4_gemm

MODULES = (
    "kron_quant",
    "rmsnorm_kron_quant",
    "silu_mul_kron_quant",
    "silu_mul_kron_quant_hopper",
    "w4_gemm",
    "w4_gemm_hopper",
)


def calls(t: int) -> dict[str, Callable[[], object]]:
    """Operator -> one call of it on ``t`` tokens, in the shapes of an 8B model."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    x, packed, norm, clip = (
        random(t, 4096),
        random(t, 28672),
        random(4096),
        random(1, dtype=torch.float32),
    )
    factors, heads = (random(1, 64, 64), random(1, 64, 64)), random(1, 32, 32)
    wide = random(1, 112, 112), random(1, 128, 128)
    codes, scale = kron_quant(x, *factors, clip, 4)
    weight = pack_device(torch.randint(-8, 8, (6144, 4096), device="cuda", dtype=torch.int8), 1)
    weight_scale, dense = random(6144, 1, dtype=torch.float32), random(4096, 4096)
    o, down = (
        pack_device(torch.randint(-8, 8, (4096, k), device="cuda", dtype=torch.int8), 1)
        for k in (4096, 14336)
    )
    gate_up = pack_device(torch.randint(-8, 8, (28672, 4096), device="cuda", dtype=torch.int8), 1)
    scales = random(28672, 1, dtype=torch.float32)

    def layer(x, residual, norm, a, b, heads, c, d, clip, qkv, o, gate_up, down, s_qkv, s_o, s_gate_up):
        y = w4_gemm(*kron_quant(x, heads, None, clip, 4), o, s_o, None, x.dtype)
        *quantized, total = rmsnorm_kron_quant(y, residual, norm, 1e-5, a, b, clip, 4)
        y = w4_gemm(*quantized, gate_up, s_gate_up, None, x.dtype)
        y = w4_gemm(*silu_mul_kron_quant(y, c, d, clip, 4), down, s_o, None, x.dtype)
        *quantized, total = rmsnorm_kron_quant(y, total, norm, 1e-5, a, b, clip, 4)
        return w4_gemm(*quantized, qkv, s_qkv, None, x.dtype), total

    residual = random(t, 4096)
    inputs = [x, residual, norm, *factors, heads, *wide, clip, weight, o, gate_up, down]
    inputs += [weight_scale, scales[:4096].clone(), scales]
    module = make_fx(layer, tracing_mode="fake")(*inputs)
    if chain_operators(module.graph) != 8:
        raise RuntimeError("a layer's operators did not become one call")
    module.recompile()
    return {
        "layer": lambda: layer(*inputs),
        "layer, one call": lambda: module(*inputs),
        "rmsnorm_kron_quant": lambda: rmsnorm_kron_quant(x, x, norm, 1e-5, *factors, clip, 4),
        "kron_quant (heads)": lambda: kron_quant(x, heads, None, clip, 4),
        "silu_mul_kron_quant": lambda: silu_mul_kron_quant(packed, *wide, clip, 4),
        "rmsnorm_kron": lambda: rmsnorm_kron(x, x, norm, 1e-5, *factors),
        "silu_mul_kron": lambda: silu_mul_kron(packed, *wide),
        "w4_gemm": lambda: w4_gemm(codes, scale, weight, weight_scale, None, torch.bfloat16),
        "torch.mm": lambda: torch.mm(x, dense),
    }


def host_us(call: Callable[[], object], repeats: int = 100, rounds: int = 5) -> float:
    """Microseconds of a call on the host, the best of some rounds."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        found.append((time.perf_counter() - start) / repeats * 1e6)
        torch.cuda.synchronize()
    return min(found)


def main() -> None:
    """Print the table, and with --profile where the time goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="few enough that the GPU keeps up")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    need_gpu()
    every = calls(args.tokens)
    for call in every.values():
        for _ in range(3):
            call()
    ours = {name: host_us(call) for name, call in every.items()}
    modules = [import_module(f"vllm_flatquant.kernels.{name}") for name in MODULES]
    for module in modules:
        module.launch = lambda kernel, grid, *a, **meta: kernel[grid](*a, **meta)
    print(
        f"host, us a call, {args.tokens} tokens, {torch.cuda.get_device_name()}: ours, with Triton's launch"
    )
    for name, call in every.items():
        print(f"{name:22} {ours[name]:8.1f} {host_us(call):8.1f}")
    if args.profile:
        from vllm_flatquant.kernels import jit

        for module in modules:
            module.launch = jit.launch
        for name, call in every.items():
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(300):
                call()
            profile.disable()
            torch.cuda.synchronize()
            print(f"\n{name}")
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
