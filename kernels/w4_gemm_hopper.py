"""``w4_gemm`` for many tokens on Hopper: the same numbers as ``w4_gemm.py``, warp-specialized in Gluon.

    y[t, n] = w_scale[n] * sum_s x_scale[t, s] * (sum_{k in block s} q[t, k] w[n, k]) + bias[n]

Plain Triton waits for every matrix product whose register operand was computed in the loop, so the tensor
cores stand still while weights are unpacked. Here one warp only loads (TMA) and the others keep two
products in flight while they unpack the next weights. Programs are persistent, so the loads of the next
tile run under the epilogue of this one.
"""

import torch
from torch import Tensor

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import Tile


@gluon.jit
def _unpack(packed):
    """int8 bytes of two nibbles -> (16 * low, 16 * high) as int8, four bytes an instruction."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;",
        "=r,=r,r",
        [packed],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _tile(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Tile coordinates in an order that reuses a weight tile for GROUP token tiles while it is in L2."""
    first = index // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    inner = index % (GROUP * tiles_n)
    return first + inner % group, inner // group


@gluon.jit
def _load(w_desc, x_desc, w_bufs, x_bufs, ready, free, tiles_m, tiles_n, n, blocks, GROUP: gl.constexpr):
    """Producer warp: keep every stage full."""
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BYTES: gl.constexpr = w_desc.block_type.nbytes + x_desc.block_type.nbytes
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    step = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP)
        for block in range(0, blocks):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                w_desc, [block * n + tile_n * BN, 0], ready.index(stage), w_bufs.index(stage)
            )
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * BM, block * 128], ready.index(stage), x_bufs.index(stage)
            )
            step += 1


@gluon.jit
def _multiply(
    w_bufs, x_bufs, ready, free, y_buf, y_desc, x_scale_ptr, w_scale_ptr, bias_ptr, tiles_m, tiles_n, t, n,
    shard_blocks, S: gl.constexpr, HAS_BIAS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Consumer warps: unpack into registers, multiply, rescale, write."""
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BN: gl.constexpr = w_bufs.type.shape[1]
    BM: gl.constexpr = x_bufs.type.shape[1]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 32])
    w_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    step = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP)
        tokens = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(0, acc_layout))
        rows = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(1, acc_layout))
        total = gl.zeros([BN, BM], gl.float32, acc_layout)
        for s in gl.static_range(S):
            acc = gl.zeros([BN, BM], gl.int32, acc_layout)
            for pair in range(0, shard_blocks // 2):
                for half in gl.static_range(2):  # two steps a trip, so that their registers differ
                    stage = step % STAGES
                    mbarrier.wait(ready.index(stage), step // STAGES & 1)
                    packed = w_bufs.index(stage).load(w_layout)
                    low, high = _unpack(packed)
                    x = x_bufs.index(stage)
                    acc = warpgroup_mma(low, x.slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma(high, x.slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
                    # The products of the step before are done: its stage may be filled again.
                    acc = warpgroup_mma_wait(2, deps=[acc])
                    last = (step + STAGES - 1) % STAGES
                    if half == 1:
                        mbarrier.arrive(free.index(last), count=1)
                    else:
                        mbarrier.arrive(free.index(last), count=1, pred=pair > 0)
                    step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            x_scale = gl.load(x_scale_ptr + tokens * S + s, mask=tokens < t, other=0.0) * 0.0625
            total += acc.to(gl.float32) * x_scale[None, :]
        y = total * gl.load(w_scale_ptr + rows, mask=rows < n, other=0.0)[:, None]
        if HAS_BIAS:
            y += gl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
        tma.store_wait(0)
        y_buf.permute((1, 0)).store(y.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [tile_m * BM, tile_n * BN], y_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["t", "shard_blocks"])
def _w4_gemm_hopper_kernel(
    x_desc,  # int8 [T, K]
    w_desc,  # int8 [blocks * N, 64]
    y_desc,  # [T, N]
    x_scale_ptr,  # float32 [T, S]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N], or any pointer where HAS_BIAS is false
    t,
    n,
    shard_blocks,  # blocks of one shard, an even number
    S: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    w_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, BN, 64], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, BM, 128], x_desc.layout)
    y_buf = gl.allocate_shared_memory(y_desc.dtype, [BM, BN], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    tiles_m = gl.cdiv(t, BM)
    tiles_n = gl.cdiv(n, BN)
    gl.warp_specialize(
        [
            (_multiply, (w_bufs, x_bufs, ready, free, y_buf, y_desc, x_scale_ptr, w_scale_ptr,
                         bias_ptr, tiles_m, tiles_n, t, n, shard_blocks, S, HAS_BIAS, GROUP)),
            (_load, (w_desc, x_desc, w_bufs, x_bufs, ready, free, tiles_m, tiles_n, n,
                     S * shard_blocks, GROUP)),
        ],
        [1],
        [24],
    )  # fmt: skip


def w4_gemm_hopper(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Write the product into ``out`` [T, N]. Shapes as ``w4_gemm``; what it can take, ``fits_hopper`` says."""
    t, k = codes.shape
    blocks, n, _ = weight.shape
    shards = scale.shape[1]
    rows_w = weight.view(torch.int8).view(blocks * n, 64)
    x_desc = TensorDescriptor(codes, [t, k], [k, 1], [tile.bm, 128], _layout(128, 8))
    w_desc = TensorDescriptor(rows_w, [blocks * n, 64], [64, 1], [tile.bn, 64], _layout(64, 8))
    y_desc = TensorDescriptor(out, [t, n], [n, 1], [tile.bm, tile.bn], _layout(128, 16))
    programs = torch.cuda.get_device_properties(codes.device).multi_processor_count * tile.ctas
    tiles = -(-t // tile.bm) * -(-n // tile.bn)
    _w4_gemm_hopper_kernel[(min(programs, tiles),)](
        x_desc, w_desc, y_desc, scale, weight_scale, weight_scale if bias is None else bias,
        t, n, blocks // shards, S=shards, HAS_BIAS=bias is not None, GROUP=tile.group, STAGES=tile.stages,
        num_warps=tile.warps, maxnreg=65536 // (tile.ctas * 32 * (tile.warps + 4)) // 8 * 8,
    )  # fmt: skip


def _layout(swizzle: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)


def fits_hopper(n: int, k: int, shards: int) -> bool:
    """TMA needs rows of a multiple of 16 bytes; a shard must be an even number of whole blocks."""
    return n % 8 == 0 and k % (256 * shards) == 0
