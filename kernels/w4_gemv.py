"""``w4_gemm`` for one token: the same numbers as ``w4_gemm.py``, without tensor cores.

    y[n] = w_scale[n] * sum_s x_scale[s] * (sum_{k in block s} q[k] w[n, k]) + bias[n]

One token is a matter of bytes in flight. A tile of tensor cores walks through K one block after the other; here the
threads of a program hold a part of K each, whose weights they all ask for before the activations exist, so that with
dependent launch weights come while the transform before still runs. ``dp4a`` multiplies four pairs of bytes and adds.
"""

import torch
from torch import Tensor

from .jit import INTERPRET, Unaligned, hopper, launch, tl, triton
from .tiles import Tile


@triton.jit
def _add_products(acc, packed, low, high, ASM: tl.constexpr):
    """acc + 16 * (the four low nibbles of ``packed`` times the bytes of ``low``, and the high ones times ``high``)."""
    if ASM:
        acc = tl.inline_asm_elementwise(
            "{ .reg .b32 l, h, a; shl.b32 l, $1, 4; and.b32 l, l, 0xF0F0F0F0; and.b32 h, $1, 0xF0F0F0F0;"
            " dp4a.s32.s32 a, l, $2, $4; dp4a.s32.s32 $0, h, $3, a; }",
            "=r,r,r,r,r",
            [packed, low, high, acc],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            acc += ((packed << (28 - 8 * byte)) >> 28) * ((low << (24 - 8 * byte)) >> 24) * 16
            acc += ((packed << (24 - 8 * byte)) >> 28) * ((high << (24 - 8 * byte)) >> 24) * 16
    return acc


@triton.jit
def prefetch_rows(
    w_ptr, pid_n, n, blocks, FIRST: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """Ask L2 for pieces FIRST to BLOCKS of this program's weights, one instruction and one thread each."""
    block = FIRST + tl.arange(0, THREADS)
    rows = tl.minimum(n - pid_n * BN, BN)
    size = tl.where(block < tl.minimum(blocks, BLOCKS), rows * 64, 0)
    start = w_ptr + (block.to(tl.int64) * n + pid_n * BN) * 64
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [start, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _w4_gemv_kernel(
    x_ptr,  # int32 view of int8 [1, K]
    x_scale_ptr,  # float32 [1, S]
    w_ptr,  # int32 view of [blocks, N, 64]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N], or any pointer where HAS_BIAS is false
    y_ptr,  # [1, N]
    n,
    S: tl.constexpr,
    SHARD_BLOCKS: tl.constexpr,  # blocks of 128 columns of one shard
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,  # weight rows of a program
    KB: tl.constexpr,  # blocks of a step
    PREFETCH: tl.constexpr,  # blocks of weights to ask L2 for behind the first step's
    PDL: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_in = tl.minimum(rows, n - 1)
    block, word = tl.arange(0, KB)[:, None, None], tl.arange(0, 16)[None, None, :]
    w_at = w_ptr + (block * tl.cast(n, tl.int64) + row_in[None, :, None]) * 16 + word
    # Loaded in the layout of the weights, so that nothing moves between threads.
    x_at = tl.broadcast_to(x_ptr + block * 32 + word, (KB, BN, 16))
    STEPS: tl.constexpr = (SHARD_BLOCKS + KB - 1) // KB
    EVEN: tl.constexpr = SHARD_BLOCKS % KB == 0
    inside = block < SHARD_BLOCKS
    packed = tl.load(w_at) if EVEN else tl.load(w_at, mask=inside, other=0)
    if PREFETCH > KB:
        bytes_ptr = w_ptr.to(tl.pointer_type(tl.int8))
        prefetch_rows(bytes_ptr, tl.program_id(0), n, S * SHARD_BLOCKS, KB, BN, PREFETCH, THREADS)
    w_scale = tl.load(w_scale_ptr + row_in)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BN,), tl.float32)
    for s in tl.static_range(S):
        x_scale = tl.load(x_scale_ptr + s)
        acc = tl.zeros((KB, BN, 16), tl.int32)
        for step in tl.static_range(STEPS):
            first = s * SHARD_BLOCKS + step * KB
            later = packed
            if step + 1 < STEPS or s + 1 < S:  # asked for before this step's products
                after = (s + (step + 1) // STEPS) * SHARD_BLOCKS + (step + 1) % STEPS * KB
                at = w_at + after * 16 * tl.cast(n, tl.int64)
                if EVEN:
                    later = tl.load(at)
                else:
                    later = tl.load(at, mask=(step + 1) % STEPS * KB + block < SHARD_BLOCKS, other=0)
            if EVEN:
                low, high = tl.load(x_at + first * 32), tl.load(x_at + first * 32 + 16)
            else:  # weights of zero make these products zero, but x must be inside its memory
                known = step * KB + block < SHARD_BLOCKS
                low = tl.load(x_at + first * 32, mask=known, other=0)
                high = tl.load(x_at + first * 32 + 16, mask=known, other=0)
            acc = _add_products(acc, packed, low, high, ASM)
            packed = later
        sums = tl.sum(tl.sum(acc, axis=0), axis=1)
        total += sums.to(tl.float32) * (x_scale * 0.0625)
    y = total * w_scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + row_in).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < n)


def w4_gemv(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Write the product of one token into ``out`` [1, N]. Shapes as ``w4_gemm``; what it can take, ``Tile.fits`` says.

    Raises Unaligned where codes or weight do not start at a multiple of 16 bytes, ValueError for more tokens.
    """
    if codes.shape[0] != 1:
        raise ValueError(f"flatquant: {tile} is for one token, and these are {codes.shape[0]}")
    if codes.data_ptr() % 16 or weight.data_ptr() % 16:
        raise Unaligned
    blocks, n, _ = weight.shape
    shards = scale.shape[1]
    pdl = hopper(codes.device)
    extra = {"launch_pdl": True} if pdl else {}
    launch(
        _w4_gemv_kernel, (triton.cdiv(n, tile.bn),),
        codes.reshape(-1).view(torch.int32), scale, weight.view(torch.int32), weight_scale,
        weight_scale if bias is None else bias, out, n, S=shards, SHARD_BLOCKS=blocks // shards,
        HAS_BIAS=bias is not None, BN=tile.bn, KB=tile.kb, PREFETCH=tile.prefetch if pdl else 0, PDL=pdl,
        ASM=not INTERPRET, THREADS=32 * tile.warps, num_warps=tile.warps, num_stages=1, **extra,
    )  # fmt: skip
