"""Kronecker transform and per-token quantization in one step.

    Z = L^T X R,   scale[t, s] = clip[s] * max|Z[t, block s]| / qmax,   code = round(Z / scale)

One scale per token and shard block, so that codes and scales are the same at every tensor-parallel size.
"""

import torch
from torch import Tensor

from .jit import empty, launch, leading, register, room, tl, triton
from .kron import empty_codes, fused, kron_wide_ref, load_factors, plan, prefetch, rows, transform
from .quantize import qmax, quantize_ref


@triton.jit
def quantize(z, clip, QMAX: tl.constexpr, ASM: tl.constexpr):
    """Codes (int8) and scale of one tile ``z``, float32. Ties round to even, as in the reference.

    1.5 * 2**23 leaves no fraction bits: adding it rounds, and the low byte of the sum is the code. (A
    conversion instruction would run at a quarter of the rate, and a clamp at half: the GPU clamps by
    saturating to [0, 1], which is free, at a relative error of 2**-24.)
    """
    amax = tl.max(tl.max(tl.abs(z), axis=1), axis=0) * clip
    scale = tl.where(amax > 0, amax / QMAX, 1.0)
    inverse = 1.0 / scale
    if ASM:
        span: tl.constexpr = 2.0 * QMAX + 1.0
        rounded = tl.inline_asm_elementwise(
            "{ .reg .f32 s; fma.rn.sat.f32 s, $1, $2, $3; fma.rn.f32 $0, s, $4, $5; }",
            "=f,f,f,f,f,f",
            [z, inverse / span, (QMAX + 1.0) / span, span, 12582912.0 - QMAX - 1.0],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        rounded = tl.minimum(tl.maximum(z * inverse, -QMAX - 1.0), QMAX * 1.0) + 12582912.0
    return rounded.to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit(do_not_specialize=["t"])
def _kron_quant_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    l_ptr,  # [S, a, a]
    r_ptr,  # [S, b, b]
    clip_ptr,  # float32 [S]
    codes_ptr,  # int8 [T, K]
    scale_ptr,  # float32 [T, S]
    t,
    stride_x,
    a,
    b,
    QMAX: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    ASM: tl.constexpr,
):
    shard, shards = tl.program_id(1), tl.num_programs(1)
    left_t, right = load_factors(l_ptr, r_ptr, shard, a, b, A, B, L, R, x_ptr.dtype.element_ty)
    clip = tl.load(clip_ptr + shard)
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    inside = (i < a) & (j < b)
    at = shard * a * b + i * b + j
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for token in range(tl.program_id(0), t, tl.num_programs(0)):
        later = token + tl.num_programs(0)
        prefetch(x_ptr + shard * a * b, later, t, stride_x, a * b, AHEAD, THREADS)
        x = tl.load(x_ptr + token * tl.cast(stride_x, tl.int64) + at, mask=inside, other=0.0)
        codes, scale = quantize(transform(x, left_t, right, L, R, WIDE), clip, QMAX, ASM)
        tl.store(codes_ptr + token * tl.cast(shards * a * b, tl.int64) + at, codes, mask=inside)
        tl.store(scale_ptr + token * shards + shard, scale)


def kron_quant_triton(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The kernel's launch. Shapes as ``kron_quant``."""
    x = rows(x)
    t, k = x.shape
    shards = clip.shape[0]
    if not fused(x, k, left, right, shards):
        return kron_quant_ref(x, left, right, clip, bits)
    p = plan(x, k, left, right, shards)
    codes = empty_codes(t, k, x.device)
    scale = leading(empty((room(t), shards), torch.float32, x.device), t)
    if t:
        launch(
            _kron_quant_kernel, p.grid, x, x if left is None else left.contiguous(), x if right is None else right.contiguous(),
            clip, codes, scale, t, x.stride(0), p.a, p.b, QMAX=qmax(bits), **p.meta,
        )  # fmt: skip
    return codes, scale


def _kron_quant_cpu(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    return kron_quant_ref(x, left, right, clip, bits)


def _kron_quant_fake(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((x.shape[0], clip.shape[0]), dtype=torch.float32)


register("kron_quant", kron_quant_triton, _kron_quant_cpu, _kron_quant_fake)


def kron_quant(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Transform and quantize ``x``: the Triton kernel on CUDA, the reference on the CPU.

    x: [T, K] bf16, fp16 or float32. left: [S, a, a] or None. right: [S, b, b] or None (head form); both
    None: plain quantization. clip: float32 [S]. bits: 4 or 8. Factors are best in x's dtype.
    Returns codes int8 [T, K] (4-bit values stay one per byte) and scale float32 [T, S].
    Raises ValueError if the factors do not fit x, RuntimeError if x is on another GPU than the current one.
    """
    return torch.ops.flatquant.kron_quant(x, left, right, clip, bits)


def kron_quant_ref(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Transform and quantize ``x``.

    x: [T, K] float32, bf16 or fp16. left: [S, a, a] or None. right: [S, b, b] or None.
    clip: [S] float32. bits: 4 or 8.
    Returns codes int8 [T, K] (4-bit values stay one per byte) and scale float32 [T, S].
    """
    shards = clip.shape[0]
    z = kron_wide_ref(x, left, right).reshape(x.shape[0], shards, x.shape[1] // shards)
    codes, scale = quantize_ref(z, bits, clip)
    return codes.reshape(x.shape), scale
