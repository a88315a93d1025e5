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

from .hopper_gluon import (
    barrier,
    descriptor,
    launch_dependents,
    load_async,
    store_async,
    wait_for_inputs,
)
from .jit import empty, launch, multiprocessors, persistent
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
def _load(
    w_desc, x_desc, w_bufs, x_bufs, ready, free, tiles_m, tiles_n, n, blocks,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, KB: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Producer warp: keep every stage full. The first weights are asked for before the activations exist."""
    STAGES: gl.constexpr = w_bufs.type.shape[0] // KB
    BYTES: gl.constexpr = (w_desc.block_type.nbytes + x_desc.block_type.nbytes) * KB
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    steps = blocks // (SPLIT * KB)
    early = min(steps, STAGES)
    if PDL:
        tile_m, tile_n = _tile(gl.program_id(0) // SPLIT, tiles_m, tiles_n, GROUP)
        row = gl.program_id(0) % SPLIT * (steps * KB) * n + tile_n * BN
        for stage in range(early):
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(KB):
                at = stage * KB + i
                load_async(w_desc, [row + at * n, 0], bar, w_bufs.index(at))
    wait_for_inputs(PDL)
    step = 0
    for item in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        tile_m, tile_n = _tile(item // SPLIT, tiles_m, tiles_n, GROUP)
        first = item % SPLIT * steps
        for block in range(first, first + steps):
            stage = step % STAGES
            bar = ready.index(stage)
            late = step >= early if PDL else True
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, BYTES, pred=late)
            for i in gl.static_range(KB):
                at = block * KB + i
                w_to, x_to = w_bufs.index(stage * KB + i), x_bufs.index(stage * KB + i)
                load_async(w_desc, [at * n + tile_n * BN, 0], bar, w_to, pred=late)
                load_async(x_desc, [tile_m * BM, at * 128], bar, x_to)
            step += 1


@gluon.jit
def _multiply(
    w_bufs, x_bufs, ready, free, y_buf, y_desc, x_scale_ptr, w_scale_ptr, bias_ptr, partial_ptr, count_ptr,
    tiles_m, tiles_n, t, n, blocks, S: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    GROUP: gl.constexpr, KB: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Consumer warps: unpack into registers, multiply, rescale, write."""
    STAGES: gl.constexpr = w_bufs.type.shape[0] // KB
    BN: gl.constexpr = w_bufs.type.shape[1]
    BM: gl.constexpr = x_bufs.type.shape[1]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, min(BM, 128), 32]
    )
    w_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    m = gl.arange(0, BM, gl.SliceLayout(0, acc_layout))
    r = gl.arange(0, BN, gl.SliceLayout(1, acc_layout))
    wait_for_inputs(PDL)
    step = 0
    for item in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        tile = item // SPLIT
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP)
        tokens = tile_m * BM + m
        rows = tile_n * BN + r
        # Scales that fit in registers are loaded before the products, or their latency would follow them.
        w_scale = gl.load(w_scale_ptr + rows, mask=rows < n, other=0.0)
        early_scale = gl.zeros([BM], gl.float32, gl.SliceLayout(0, acc_layout))
        if S == 1 and BM <= 64:
            early_scale = gl.load(x_scale_ptr + tokens, mask=tokens < t, other=0.0)
        acc = gl.zeros([BN, BM], gl.int32, acc_layout)
        total = gl.zeros([BN, BM], gl.float32, acc_layout)
        # A part of a split lies in one shard; a program that has all of K goes through the shards.
        for s in gl.static_range(S if SPLIT == 1 else 1):
            if s > 0:
                acc = gl.zeros([BN, BM], gl.int32, acc_layout)
            for pair in range(blocks // (2 * S if SPLIT == 1 else 2 * SPLIT)):
                for half in gl.static_range(2):  # two blocks a trip, so that their registers differ
                    stage = step % STAGES
                    buffer = stage * KB + half % KB
                    if half % KB == 0:
                        mbarrier.wait(ready.index(stage), step // STAGES & 1)
                    packed = w_bufs.index(buffer).load(w_layout)
                    low, high = _unpack(packed)
                    x = x_bufs.index(buffer)
                    acc = warpgroup_mma(low, x.slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma(high, x.slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
                    # The products of the block before are done: if it ended a stage, that may be filled again.
                    acc = warpgroup_mma_wait(2, deps=[acc])
                    if half % KB == 0:
                        last = free.index((step + STAGES - 1) % STAGES)
                        if half == 1:
                            mbarrier.arrive(last, count=1)
                        else:
                            mbarrier.arrive(last, count=1, pred=pair > 0)
                    if half % KB == KB - 1:
                        step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            if SPLIT == 1:
                x_scale = early_scale
                if S > 1 or BM > 64:
                    x_scale = gl.load(x_scale_ptr + tokens * S + s, mask=tokens < t, other=0.0)
                total += acc.to(gl.float32) * (x_scale * 0.0625)[None, :]
        finish = True
        # Every program leaves its part; the last to arrive adds those of a shard, exact in any order.
        if SPLIT > 1:
            place = (r * BM)[:, None] + m[None, :]
            gl.store(partial_ptr + item * (BN * BM) + place, acc)
            barrier()
            finish = gl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
            if finish:
                for s in gl.static_range(S):
                    acc = gl.zeros([BN, BM], gl.int32, acc_layout)
                    for part in range(s * SPLIT // S, (s + 1) * SPLIT // S):
                        acc += gl.load(partial_ptr + (tile * SPLIT + part) * (BN * BM) + place)
                    x_scale = early_scale
                    if S > 1 or BM > 64:
                        x_scale = gl.load(x_scale_ptr + tokens * S + s, mask=tokens < t, other=0.0)
                    total += acc.to(gl.float32) * (x_scale * 0.0625)[None, :]
                gl.store(count_ptr + tile, 0)
        if finish:
            y = total * w_scale[:, None]
            if HAS_BIAS:
                y += gl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
            tma.store_wait(0)
            y_buf.permute((1, 0)).store(y.to(y_desc.dtype))
            fence_async_shared()
            store_async(y_desc, [tile_m * BM, tile_n * BN], y_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["t", "blocks"])
def _w4_gemm_hopper_kernel(
    x_desc,  # int8 [T, K]
    w_desc,  # int8 [blocks * N, 64]
    y_desc,  # [T, N]
    x_scale_ptr,  # float32 [T, S]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N], or any pointer where HAS_BIAS is false
    partial_ptr,  # int32 [tiles, SPLIT, BN, BM], uninitialised; any pointer where SPLIT is 1
    count_ptr,  # int32 [tiles], zero before and after; likewise
    t,
    n,
    blocks,  # a multiple of 2 * max(S, SPLIT)
    S: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr,  # programs that share a tile, each a part of K; 1 or a multiple of S
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    KB: gl.constexpr,  # blocks of 128 columns a stage: 1 or 2
    PDL: gl.constexpr,
):
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    w_bufs = gl.allocate_shared_memory(gl.int8, [STAGES * KB, BN, 64], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(gl.int8, [STAGES * KB, BM, 128], x_desc.layout)
    y_buf = gl.allocate_shared_memory(y_desc.dtype, [BM, BN], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    launch_dependents(PDL)
    tiles_m = gl.cdiv(t, BM)
    tiles_n = gl.cdiv(n, BN)
    gl.warp_specialize(
        [
            (_multiply, (w_bufs, x_bufs, ready, free, y_buf, y_desc, x_scale_ptr, w_scale_ptr, bias_ptr,
                         partial_ptr, count_ptr, tiles_m, tiles_n, t, n, blocks, S, HAS_BIAS, SPLIT, GROUP,
                         KB, PDL)),
            (_load, (w_desc, x_desc, w_bufs, x_bufs, ready, free, tiles_m, tiles_n, n, blocks, SPLIT, GROUP,
                     KB, PDL)),
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
    """Write the product into ``out``, [T or more, N]. Shapes as ``w4_gemm``; what it can take, ``Tile.fits`` says.

    Rows of ``out`` beyond T get undefined values.
    """
    t, k = codes.shape
    blocks, n, _ = weight.shape
    shards = scale.shape[1]
    there = (codes.untyped_storage().nbytes() - codes.storage_offset()) // k  # rows that memory holds
    x_rows = t if tile.bm < 64 else min(-(-t // tile.bm) * tile.bm, there)
    x_desc = descriptor(codes, x_rows, k, tile.bm, 128, 128)
    w_desc = descriptor(weight, blocks * n, 64, tile.bn, 64, 64)
    y_desc = descriptor(out, out.shape[0], n, tile.bm, tile.bn, 128)
    tiles = -(-t // tile.bm) * -(-n // tile.bn)
    partial = count = weight_scale
    if tile.split > 1:
        size = tiles * tile.split * tile.bm * tile.bn
        partial = empty((size,), torch.int32, codes.device)
        count = _counters(codes.device, tiles)
    programs = multiprocessors(codes.device) * tile.ctas
    launch(
        _w4_gemm_hopper_kernel, (min(programs, tiles * tile.split),),
        x_desc, w_desc, y_desc, scale, weight_scale, weight_scale if bias is None else bias, partial, count,
        t, n, blocks, S=shards, HAS_BIAS=bias is not None, SPLIT=tile.split, GROUP=tile.group,
        STAGES=tile.stages, KB=tile.kb, PDL=True, num_warps=tile.warps, launch_pdl=True,
        maxnreg=65536 // (tile.ctas * 32 * (tile.warps + 4)) // 8 * 8,
    )  # fmt: skip


_SETS, _TILES = 64, 2**14
_COUNTERS: dict[torch.device, Tensor] = {}
_turn = 0


def _counters(device: torch.device, tiles: int) -> Tensor:
    """Zeroed arrival counters for ``tiles`` tiles; every kernel leaves them zero.

    Launches take turns in 64 sets, so that two streams would have to be 64 launches apart to share one. A CUDA graph and
    a recording (``replay.py``) keep the set they were made with: neither may run on two streams at once.
    """
    global _turn
    if tiles > _TILES:
        raise ValueError(f"flatquant: {tiles} tiles are too many to split along K (at most {_TILES})")
    if device not in _COUNTERS:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("flatquant: run w4_gemm once before capturing it in a CUDA graph")
        _COUNTERS[device] = persistent(torch.zeros(_SETS, _TILES, dtype=torch.int32, device=device))
    _turn = (_turn + 1) % _SETS
    return _COUNTERS[device][_turn]
