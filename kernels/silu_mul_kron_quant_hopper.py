"""``silu_mul_kron_quant`` for large tiles on Hopper: the same numbers, warp-specialized in Gluon.

The plain kernel is a chain for each token: load, SiLU, product, product, maximum, store; while it computes, it
loads nothing. Here one warp only loads (TMA, a ring of half tokens) and eight transform. Nothing moves between
registers but through the products: activations are read in the layout of the first product's register operand,
and the columns of R are permuted so that a thread's outputs are neighbours, 16 bytes of which it stores at once.

Without quantization (QMAX is 0, ``silu_mul_kron.py``) the outputs are those of the products, in x's dtype.
"""

from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_gluon import (
    barrier,
    descriptor,
    launch_dependents,
    load_async,
    reinterpret,
    wait_for_inputs,
)
from .jit import launch, multiprocessors, room

ROWS = 16  # of a TMA box: the largest that divides the 112 rows of a 14336-wide token
# Measured: docs/decisions.md. The ring takes 128 KB, factors and the product between them 96.
OPTIONS = {"STAGES": 4, "num_warps": 8, "maxnreg": 168}


@gluon.jit
def _silu_mul(gate, up):
    """``gate * sigmoid(gate) * up``, float32, with the approximate reciprocal (2 ulp)."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 e, e; mul.f32 e, $1, e; mul.f32 $0, e, $2; }",
        "=f,f,f",
        [gate.to(gl.float32), up.to(gl.float32)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _product_order(x, N: gl.constexpr):
    """Columns 4N c + N q + 2 g + e (of 4N c + 8 g + 2 q + e) at the place where lane q of a quad holds them."""
    A: gl.constexpr = x.shape[0]
    B: gl.constexpr = x.shape[1]
    return x.reshape([A, B // (4 * N), 4, N // 2, 2]).permute((0, 1, 3, 2, 4)).reshape([A, B])


@gluon.jit
def _output_order(x, N: gl.constexpr):
    """The inverse of ``_product_order``, with a thread's N neighbours in consecutive registers."""
    A: gl.constexpr = x.shape[0]
    B: gl.constexpr = x.shape[1]
    x = x.reshape([A, B // (4 * N), N // 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([A, B])
    return gl.convert_layout(x, _output_layout(A, B, gl.num_warps(), N))


@constexpr_function
def _output_layout(a, b, warps, n):
    columns = [[0, 1 << i] for i in range(n.bit_length() - 1)]
    columns += [[0, 4 * n << i] for i in range(b.bit_length() - (4 * n).bit_length())]
    rows = [[16 << i, 0] for i in range(a.bit_length() - 5)]
    count = warps.bit_length() - 1
    lanes = [[0, n], [0, 2 * n], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(columns + [[8, 0]] + rows[count:], lanes, rows[:count], [], [a, b])


@gluon.jit
def _load_factors(l_ptr, r_ptr, l_buf, r_buf, a: gl.constexpr, N: gl.constexpr):
    """L as it is, zero beyond a, and R with columns in product order into shared memory."""
    A: gl.constexpr = l_buf.shape[0]
    B: gl.constexpr = r_buf.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    i = gl.arange(0, B, gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, B, gl.SliceLayout(0, layout))[None, :]
    right = gl.load(r_ptr + i * B + j)
    i = gl.arange(0, A, gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, A, gl.SliceLayout(0, layout))[None, :]
    left = gl.load(l_ptr + i * a + j, mask=(i < a) & (j < a), other=0.0)
    l_buf.store(left)
    r_buf.store(_product_order(right, N))
    fence_async_shared()


@gluon.jit
def _quantize(z, clip, QMAX: gl.constexpr):
    """As ``quantize`` in kron_quant.py."""
    amax = gl.max(
        gl.max(gl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [z], gl.float32, True, 1), 1), 0
    )
    amax = amax * clip
    scale = gl.where(amax > 0, amax / QMAX, 1.0)
    span: gl.constexpr = 2.0 * QMAX + 1.0
    middle: gl.constexpr = (QMAX + 1.0) / span
    magic: gl.constexpr = 12582912.0 - QMAX - 1.0
    rounded = gl.inline_asm_elementwise(
        "{ .reg .f32 s; fma.rn.sat.f32 s, $1, $2, $3; fma.rn.f32 $0, s, $4, $5; }",
        "=f,f,f,f,f,f",
        [z, 1.0 / scale / span, middle, span, magic],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return rounded.to(gl.int32, bitcast=True).to(gl.int8), scale


@gluon.jit
def _load(x_desc, x_bufs, ready, free, t, shard, shards, a: gl.constexpr, HALVES: gl.constexpr,
          STAGES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Producer warp: a stage is the gate and the up of one token, 64 columns of each."""
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    ROOM: gl.constexpr = x_bufs.shape[0] // (2 * STAGES)
    BOXES: gl.constexpr = (a + ROWS - 1) // ROWS
    wait_for_inputs(PDL)
    step = 0
    for token in range(gl.program_id(0), t, gl.num_programs(0)):
        gate = (token * 2 * shards + shard) * a
        up = gate + shards * a
        for half in gl.static_range(HALVES):
            stage = step % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, x_desc.block_type.nbytes * (2 * BOXES))
            for box in range(BOXES):
                to = stage * 2 * ROOM + box
                load_async(x_desc, [gate + box * ROWS, half * 64], bar, x_bufs.index(to))
                load_async(x_desc, [up + box * ROWS, half * 64], bar, x_bufs.index(to + ROOM))
            step += 1


@gluon.jit
def _transform(
    tiles, l_buf, r_buf, y_buf, ready, free, clip_ptr, out_ptr, scale_ptr, t, shard, shards, a: gl.constexpr,
    N: gl.constexpr, MASK: gl.constexpr, QMAX: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Consumer warps: SiLU, both products, quantization, store."""
    STAGES: gl.constexpr = tiles.shape[0] // 2
    DTYPE: gl.constexpr = tiles.dtype
    A: gl.constexpr = l_buf.shape[0]
    B: gl.constexpr = r_buf.shape[0]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, B, 16])
    x_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    out_layout: gl.constexpr = _output_layout(A, B, gl.num_warps(), N)
    row = gl.arange(0, A, gl.SliceLayout(1, x_layout))[:, None]
    i = gl.arange(0, A, gl.SliceLayout(1, out_layout))[:, None]
    j = gl.arange(0, B, gl.SliceLayout(0, out_layout))[None, :]
    if QMAX:
        clip = gl.load(clip_ptr + shard)
    wait_for_inputs(PDL)
    step = 0
    for token in range(gl.program_id(0), t, gl.num_programs(0)):
        acc = gl.zeros([A, B], gl.float32, acc_layout)
        for half in gl.static_range(B // 64):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            gate = tiles.index(stage * 2).load(x_layout)
            up = tiles.index(stage * 2 + 1).load(x_layout)
            fence_async_shared()
            barrier()
            mbarrier.arrive(free.index(stage), count=1)
            x = _silu_mul(gate, up).to(DTYPE)
            if MASK:
                x = gl.where(row < a, x, 0.0)
            acc = warpgroup_mma(x, r_buf.slice(half * 64, 64, dim=0), acc, is_async=True)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        y_buf.store(acc.to(DTYPE))
        fence_async_shared()
        barrier()
        z = gl.zeros([A, B], gl.float32, acc_layout)
        z = warpgroup_mma(l_buf.permute((1, 0)), y_buf, z, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, deps=[z])
        block = gl.cast(token, gl.int64) * shards + shard
        out = out_ptr + block * (a * B) + i * B + j
        if QMAX:
            codes, scale = _quantize(z, clip, QMAX)
            gl.store(out, _output_order(codes, N), mask=(i < a) & (j < B))
            gl.store(scale_ptr + block, scale)
        else:
            gl.store(out, _output_order(z.to(DTYPE), N), mask=(i < a) & (j < B))


@gluon.jit(do_not_specialize=["t"])
def _silu_mul_kron_hopper_kernel(
    x_desc,  # [T * 2 * S * a, B] in boxes of ROWS x 64
    l_ptr,  # [S, a, a]
    r_ptr,  # [S, B, B]
    clip_ptr,  # float32 [S]; any pointer where QMAX is 0
    out_ptr,  # [T, K]: codes, int8; where QMAX is 0 in x's dtype
    scale_ptr,  # float32 [T, S]; any pointer where QMAX is 0
    t,
    a: gl.constexpr,  # 65 to 128
    B: gl.constexpr,  # 64 or 128
    QMAX: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    A: gl.constexpr = 128
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    MASK: gl.constexpr = a % ROWS != 0
    N: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    DTYPE: gl.constexpr = x_desc.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    shard, shards = gl.program_id(1), gl.num_programs(1)
    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * 2 * (A // ROWS), ROWS, 64], x_desc.layout)
    tiles = reinterpret(x_bufs, DTYPE, [STAGES * 2, A, 64], wide)
    l_buf = gl.allocate_shared_memory(DTYPE, [A, A], wide)
    r_buf = gl.allocate_shared_memory(DTYPE, [B, B], wide)
    y_buf = gl.allocate_shared_memory(DTYPE, [A, B], wide)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    launch_dependents(PDL)
    # Rows behind a must be zero, or the product could meet a NaN. The last box may bring rows of what follows, which
    # the consumer masks; where it does not, nothing is ever loaded there, and zeroing once is enough.
    if not MASK:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        for i in gl.static_range(STAGES * 2):
            tiles.index(i).store(gl.zeros([A, 64], DTYPE, layout))
    _load_factors(l_ptr + shard * a * a, r_ptr + shard * B * B, l_buf, r_buf, a, N)
    gl.warp_specialize(
        [
            (_transform, (tiles, l_buf, r_buf, y_buf, ready, free, clip_ptr, out_ptr, scale_ptr, t, shard, shards,
                          a, N, MASK, QMAX, PDL)),
            (_load, (x_desc, x_bufs, ready, free, t, shard, shards, a, B // 64, STAGES, PDL)),
        ],
        [1],
        [24],
    )  # fmt: skip


def silu_mul_kron_quant_hopper(
    x: Tensor, left: Tensor, right: Tensor, clip: Tensor, out: Tensor, scale: Tensor, qmax: int
) -> None:
    """Write codes [T, K] and scale [T, S]. Shapes as ``silu_mul_kron_quant``; what this takes, ``on_hopper`` says.

    qmax: 0 writes the transform to ``out``, in x's dtype, and neither reads ``clip`` nor writes ``scale``.
    """
    t, (shards, a, _), b = x.shape[0], left.shape, right.shape[1]
    there = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    rows = min(room(t), there // x.shape[1])  # those that memory holds
    launch(
        _silu_mul_kron_hopper_kernel, (min(room(t), max(1, multiprocessors(x.device) // shards)), shards),
        descriptor(x, rows * 2 * shards * a, b, ROWS, 64, 128), left.contiguous(), right.contiguous(), clip, out, scale,
        t, a=a, B=b, QMAX=qmax, PDL=True, launch_pdl=True, **OPTIONS,
    )  # fmt: skip
