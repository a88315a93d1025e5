"""Integer GEMM with 4-bit weights: int8-container activations times int4 weights, rescaled once.

    y[t, n] = w_scale[n] * sum_s x_scale[t, s] * (sum_{k in block s} q[t, k] w[n, k]) + bias[n]

The inner sums are exact int32; the outer sum runs over s in ascending order in float32.

The kernel computes W X^T, so that the unpacked weights are the operand that tensor cores read from
registers and never return to shared memory. A packed byte holds two weights (see ``pack_device``);
``b << 4`` and ``b & 0xF0`` are those weights times 16, sign included, which the scale takes back.
"""

from functools import cache

import torch
from torch import Tensor

from .jit import (
    INTERPRET,
    Unaligned,
    empty,
    has_gluon,
    hopper,
    launch,
    leading,
    register,
    room,
    tl,
    triton,
)
from .pack import KBLOCK, unpack_device
from .tiles import Tile, w4_gemm_tile
from .w4_gemv import prefetch_rows, w4_gemv


@triton.jit
def _unpack(packed, ASM: tl.constexpr):
    """int8 bytes of two nibbles -> (16 * low, 16 * high) as int8; four bytes an instruction on the GPU."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed << 4).to(tl.int8)
        high = (packed & -16).to(tl.int8)
    return low, high


@triton.jit(do_not_specialize=["t", "shard_blocks"])
def _w4_gemm_kernel(
    x_ptr,  # int8 [T, K]
    x_scale_ptr,  # float32 [T, S]
    w_ptr,  # int8 view of [blocks, N, 64]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N], or any pointer where HAS_BIAS is false
    y_ptr,  # [T, N]
    t,
    n,
    k,
    shard_blocks,  # blocks of one shard
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # every shard is a whole number of steps: no mask along K
    BM: tl.constexpr,  # tokens of a tile
    BN: tl.constexpr,  # weight rows of a tile
    KB: tl.constexpr,  # blocks of 128 columns a step
    GROUP: tl.constexpr,  # token tiles that share a weight tile while it is in L2
    PREFETCH: tl.constexpr,  # blocks of weights to prefetch while the activations are still being made
    PDL: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(t, BM)
    tiles_n = tl.cdiv(n, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    pid_m = first + pid % (GROUP * tiles_n) % group
    pid_n = pid % (GROUP * tiles_n) // group
    if PREFETCH > 0:
        prefetch_rows(w_ptr, pid_n, n, S * shard_blocks, 0, BN, PREFETCH, THREADS)
    rows = pid_n * BN + tl.arange(0, BN)
    row_in = tl.minimum(rows, n - 1)
    # Scales are loaded before the products, or their latency would follow them.
    w_scale = tl.load(w_scale_ptr + row_in)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tokens = pid_m * BM + tl.arange(0, BM)
    token_in = tl.minimum(tokens, t - 1).to(tl.int64)
    step = tl.arange(0, KB * 64)
    block, byte = step // 64, step % 64
    w_ptrs = w_ptr + row_in[:, None].to(tl.int64) * 64 + (block.to(tl.int64) * n * 64 + byte)[None, :]
    x_ptrs = x_ptr + token_in[:, None] * k + (block * 128 + byte)[None, :]
    x_scale = tl.zeros((BM,), dtype=tl.float32)
    if S == 1:
        x_scale = tl.load(x_scale_ptr + token_in)
    width = k // S
    steps = tl.cdiv(shard_blocks, KB)

    acc = tl.zeros((BN, BM), dtype=tl.int32)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for i in range(S * steps):
        if EVEN:
            w = tl.load(w_ptrs)
            if BM <= 64:  # a masked row costs no traffic, and few tokens mean many of them
                x_low = tl.load(x_ptrs, mask=(tokens < t)[:, None], other=0)
                x_high = tl.load(x_ptrs + 64, mask=(tokens < t)[:, None], other=0)
            else:
                x_low = tl.load(x_ptrs)
                x_high = tl.load(x_ptrs + 64)
            w_ptrs += KB * 64 * n.to(tl.int64)
            x_ptrs += KB * 128
        else:
            shard = i // steps
            local = i % steps * KB  # first block of this step within the shard
            column = (local + block) * 128 + byte
            w_at = w_ptrs + (shard * shard_blocks + local) * 64 * n.to(tl.int64)
            x_at = x_ptrs + (shard * width + local * 128)
            w = tl.load(w_at, mask=((local + block) < shard_blocks)[None, :], other=0)
            x_low = tl.load(x_at, mask=(column < width)[None, :], other=0)
            x_high = tl.load(x_at + 64, mask=(column + 64 < width)[None, :], other=0)
        low, high = _unpack(w, ASM)
        acc = tl.dot(low, x_low.T, acc, out_dtype=tl.int32)
        acc = tl.dot(high, x_high.T, acc, out_dtype=tl.int32)
        if S > 1:  # noqa: SIM102 (known when compiling; the next condition is not)
            if i % steps == steps - 1:
                x_scale = tl.load(x_scale_ptr + token_in * S + i // steps)
                total += acc.to(tl.float32) * (x_scale * 0.0625)[None, :]
                acc = tl.zeros((BN, BM), dtype=tl.int32)
    if S == 1:
        total = acc.to(tl.float32) * (x_scale * 0.0625)[None, :]
    y = total * w_scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row_in).to(tl.float32)[:, None]
    y_ptrs = y_ptr + tokens[:, None].to(tl.int64) * n + rows[None, :]
    tl.store(
        y_ptrs, tl.trans(y.to(y_ptr.dtype.element_ty)), mask=(tokens < t)[:, None] & (rows < n)[None, :]
    )


def w4_gemm_triton(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Write the product into ``out`` [T or more, N] with the given tile. Shapes as ``w4_gemm``."""
    t, k = codes.shape
    blocks, n, _ = weight.shape
    shards = scale.shape[1]
    shard_blocks = blocks // shards
    on_hopper = hopper(codes.device)
    extra = {"launch_pdl": True} if on_hopper else {}
    launch(
        _w4_gemm_kernel, (triton.cdiv(t, tile.bm) * triton.cdiv(n, tile.bn),),
        codes, scale, weight.view(torch.int8), weight_scale, weight_scale if bias is None else bias, out,
        t, n, k, shard_blocks, S=shards, HAS_BIAS=bias is not None,
        EVEN=shard_blocks % tile.kb == 0 and k == blocks * KBLOCK,
        BM=tile.bm, BN=tile.bn, KB=tile.kb, GROUP=tile.group,
        PREFETCH=tile.prefetch if tile.prefetch and on_hopper and weight.data_ptr() % 16 == 0 else 0,
        PDL=on_hopper, ASM=not INTERPRET, THREADS=32 * tile.warps,
        num_warps=tile.warps, num_stages=tile.stages, **extra,
    )  # fmt: skip


def _check(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """ValueError, naming the shapes, where the arguments of ``w4_gemm`` do not belong together."""
    k, shards, (blocks, n, _) = codes.shape[1], scale.shape[1], weight.shape
    if k % shards or blocks != shards * -(-(k // shards) // KBLOCK):
        raise ValueError(
            f"flatquant: weight {tuple(weight.shape)} does not hold {k} columns in {shards} shards; "
            "pack it with pack_device(codes, shards)"
        )
    if weight_scale.numel() != n or (bias is not None and bias.numel() != n):
        raise ValueError(f"flatquant: weight_scale and bias must have {n} elements, one per weight row")


def _w4_gemm_cuda(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias)
    t, k = codes.shape
    n = weight.shape[1]
    out = empty((room(t), n), out_dtype, codes.device)
    if t:
        codes, scale = codes.contiguous(), scale.contiguous()
        tile = _tile(codes.device, room(t), n, k, scale.shape[1])
        try:
            run_tile(codes, scale, weight, weight_scale, bias, out, tile)
        except Unaligned:  # of codes or a weight that are part of other memory
            plain = w4_gemm_tile("", False, room(t), n, k, scale.shape[1])
            run_tile(codes, scale, weight, weight_scale, bias, out, plain)
    return leading(out, t)


def _tile(device: torch.device, t: int, n: int, k: int, shards: int) -> Tile:
    return w4_gemm_tile(_name(device), hopper(device) and has_gluon("w4_gemm_hopper"), t, n, k, shards)


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def run_tile(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Run the kernel that ``tile`` names; Unaligned if it cannot load what it is given."""
    if tile.ctas:
        from .w4_gemm_hopper import w4_gemm_hopper  # Gluon, so imported only where it is used

        w4_gemm_hopper(codes, scale, weight, weight_scale, bias, out, tile)
    elif tile.bm == 1:
        w4_gemv(codes, scale, weight, weight_scale, bias, out, tile)
    else:
        w4_gemm_triton(codes, scale, weight, weight_scale, bias, out, tile)


def _w4_gemm_cpu(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias)
    rows = unpack_device(weight, codes.shape[1], scale.shape[1])
    return w4_gemm_ref(codes, scale, rows, weight_scale, bias, out_dtype)


def _w4_gemm_fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[1]), dtype=out_dtype)


register("w4_gemm", _w4_gemm_cuda, _w4_gemm_cpu, _w4_gemm_fake)


def w4_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantized linear layer: the Triton kernels on CUDA, the reference on the CPU.

    codes: int8 [T, K]. scale: float32 [T, S]. weight: uint8, ``pack_device(codes of [N, K], S)``.
    weight_scale: float32, N elements. bias: N elements or None. Returns [T, N] in ``out_dtype``
    (bfloat16 or float16; float32 too on the CPU). Raises ValueError if the shapes do not fit each other,
    RuntimeError if the codes are on another GPU than the current one.
    """
    return torch.ops.flatquant.w4_gemm(codes, scale, weight, weight_scale, bias, out_dtype)


def int_matmul_ref(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product ``a @ b.T`` of int8 ``a`` [T, K] and int8 ``b`` [N, K]: int32 [T, N].

    The CPU has an exact int8 product for any shape; elsewhere float64 is exact far beyond int32.
    """
    if a.device.type == "cpu":
        return torch._int_mm(a.contiguous(), b.T)
    return (a.double() @ b.double().T).to(torch.int32)


def w4_gemm_ref(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantized linear layer.

    codes: int8 [T, K]. scale: float32 [T, S]. weight: int8 codes [N, K] (unpacked).
    weight_scale: float32 [N, 1]. bias: [N] or None. Returns [T, N] in ``out_dtype``.
    """
    shards = scale.shape[1]
    width = codes.shape[1] // shards
    out = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float32, device=codes.device)
    for s in range(shards):
        block = slice(s * width, (s + 1) * width)
        acc = int_matmul_ref(codes[:, block], weight[:, block])
        out += acc.float() * scale[:, s : s + 1]
    out *= weight_scale.reshape(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)
