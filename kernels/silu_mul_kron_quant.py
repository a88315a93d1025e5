"""SiLU(gate) * up, Kronecker transform and quantization in one step, from the packed gate_up output.

Z = L^T (silu(gate) * up) R,   scale[t, s] = clip[s] * max|Z[t, block s]| / qmax

The kernels have a second form, without quantization: ``silu_mul_kron.py``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import empty, has_gluon, hopper, launch, leading, multiprocessors, register, room, tl, triton
from .kron import empty_codes, fused, load_factors, plan, rows, transform
from .kron_quant import kron_quant_ref, quantize
from .quantize import qmax

HOPPER_FROM = 0.0
"""Above so many tokens * shards an SM ``silu_mul_kron_quant_hopper.py`` takes what it can; ``math.inf``: never.

At 0 one kernel takes every number of tokens, so that a row's bits do not depend on how many others there are.
"""


@triton.jit
def _silu(x, ASM: tl.constexpr):
    """``x * sigmoid(x)`` in float32; five instructions where the compiler's division alone takes eight."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _load(x_ptr, token, t, stride_x, k, inside):
    """Gate and up of one token, zero past the last."""
    row = x_ptr + token * tl.cast(stride_x, tl.int64)
    mask = inside & (tl.full(inside.shape, token, tl.int32) < t)
    return tl.load(row, mask=mask, other=0.0), tl.load(row + k, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["t"])
def _silu_mul_kron_kernel(
    x_ptr,  # [T, 2*K]: gate, then up; rows stride_x apart
    l_ptr,  # [S, a, a]
    r_ptr,  # [S, b, b]
    clip_ptr,  # float32 [S]; any pointer where QMAX is 0
    out_ptr,  # [T, K]: codes, int8; where QMAX is 0 what would be quantized, in x's dtype
    scale_ptr,  # float32 [T, S]; any pointer where QMAX is 0
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
    AHEAD: tl.constexpr,  # the next token is loaded into registers while this one is transformed
    THREADS: tl.constexpr,
    ASM: tl.constexpr,
):
    shard, shards = tl.program_id(1), tl.num_programs(1)
    left_t, right = load_factors(l_ptr, r_ptr, shard, a, b, A, B, L, R, x_ptr.dtype.element_ty)
    if QMAX:
        clip = tl.load(clip_ptr + shard)
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    inside = (i < a) & (j < b)
    at = shard * a * b + i * b + j
    k = shards * a * b
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_ptr += at
    next_gate, next_up = _load(x_ptr, tl.program_id(0), t, stride_x, k, inside)
    for token in range(tl.program_id(0), t, tl.num_programs(0)):
        if AHEAD:
            gate, up = next_gate, next_up
            next_gate, next_up = _load(x_ptr, token + tl.num_programs(0), t, stride_x, k, inside)
        else:
            gate, up = _load(x_ptr, token, t, stride_x, k, inside)
        x = (_silu(gate.to(tl.float32), ASM) * up.to(tl.float32)).to(gate.dtype)
        if not WIDE:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
        z = transform(x, left_t, right, L, R, WIDE)
        if QMAX:
            codes, scale = quantize(z, clip, QMAX, ASM)
            tl.store(out_ptr + token * tl.cast(k, tl.int64) + at, codes, mask=inside)
            tl.store(scale_ptr + token * shards + shard, scale)
        else:
            tl.store(out_ptr + token * tl.cast(k, tl.int64) + at, z.to(gate.dtype), mask=inside)


def on_hopper(x: Tensor, left: Tensor | None, right: Tensor | None, shards: int) -> bool:
    """Whether ``x`` [T, 2*K] goes to the Hopper form: tokens and factors ``suits`` takes, contiguous aligned rows."""
    return (
        left is not None
        and right is not None
        and hopper(x.device)
        and suits(room(x.shape[0]), shards, left.shape, right.shape, multiprocessors(x.device))
        and x.dtype in (torch.bfloat16, torch.float16)
        and left.dtype == right.dtype == x.dtype
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
        and has_gluon("silu_mul_kron_quant_hopper")
    )


def suits(t: int, shards: int, left: Sequence[int], right: Sequence[int], sms: int) -> bool:
    """Whether the Hopper form is made, and faster, for ``t`` tokens and factors of these shapes on ``sms`` SMs."""
    enough = t * shards > HOPPER_FROM * sms
    return enough and left[0] == shards and 64 < left[1] <= 128 and right[1] in (64, 128)


def start(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    shards: int,
    out: Tensor,
    quantizer: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Launch the kernel for these sizes, which fills ``out``.

    x: gate_up as ``rows`` gives it, with factors that are ``fused``. out: codes int8 [T, K]; in x's dtype
    without a ``quantizer``: clip, scale (to be filled) and the largest code.
    """
    t, k = x.shape[0], x.shape[1] // 2
    clip, scale, most = quantizer or (x, x, 0)
    if on_hopper(x, left, right, shards):
        assert left is not None and right is not None
        # Gluon, so imported only where it is used
        from .silu_mul_kron_quant_hopper import silu_mul_kron_quant_hopper

        silu_mul_kron_quant_hopper(x, left, right, clip, out, scale, most)
        return
    p = plan(x, k, left, right, shards, "silu")
    if t:
        launch(
            _silu_mul_kron_kernel, p.grid, x, x if left is None else left.contiguous(), x if right is None else right.contiguous(),
            clip, out, scale, t, x.stride(0), p.a, p.b, QMAX=most, **p.meta,
        )  # fmt: skip


def silu_mul_kron_quant_triton(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The kernels' launch. Shapes as ``silu_mul_kron_quant``."""
    x = rows(gate_up)
    t, k, shards = x.shape[0], x.shape[1] // 2, clip.shape[0]
    if not fused(x, k, left, right, shards):
        return silu_mul_kron_quant_ref(x, left, right, clip, bits)
    codes = empty_codes(t, k, x.device)
    scale = leading(empty((room(t), shards), torch.float32, x.device), t)
    start(x, left, right, shards, codes, (clip, scale, qmax(bits)))
    return codes, scale


def _silu_mul_kron_quant_cpu(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    return silu_mul_kron_quant_ref(gate_up, left, right, clip, bits)


def _silu_mul_kron_quant_fake(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    t, k = gate_up.shape[0], gate_up.shape[1] // 2
    codes = gate_up.new_empty((t, k), dtype=torch.int8)
    return codes, gate_up.new_empty((t, clip.shape[0]), dtype=torch.float32)


register(
    "silu_mul_kron_quant",
    silu_mul_kron_quant_triton,
    _silu_mul_kron_quant_cpu,
    _silu_mul_kron_quant_fake,
)


def silu_mul_kron_quant(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2*K]. Factors, clip, bits, results and errors as ``kron_quant`` for width K."""
    return torch.ops.flatquant.silu_mul_kron_quant(gate_up, left, right, clip, bits)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """[T, 2*K] (gate, then up) -> ``silu(gate) * up`` [T, K], float32 inside, result in its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_kron_quant_ref(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2*K]. Factors, clip, bits and results as in ``kron_quant_ref`` for width K."""
    return kron_quant_ref(silu_mul_ref(gate_up), left, right, clip, bits)
