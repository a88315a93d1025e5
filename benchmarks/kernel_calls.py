"""What ``kernels.py`` times: calls on random data of the right layout, and the time below which none can be.

A maker prepares one kernel's rotating weights, once, and returns a function from the number of tokens to a call;
``call(i)`` runs on buffer set ``i``. The speed of none of these kernels depends on the values.
"""

from collections.abc import Callable

import torch
from timing import copies

from vllm_flatquant.kernels.kron import empty_codes, kron
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant
from vllm_flatquant.kernels.w4_gemm import w4_gemm
from vllm_flatquant.kernels.w8_linear import w8_linear

Call = Callable[[int], object]
At = Callable[[int], Call]
Shape = tuple[int, int]

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
# Bytes a microsecond of a device-to-device copy, read and written: measured on each card.
BYTES_PER_US = {"NVIDIA H100 80GB HBM3": 3.0e6, "NVIDIA H200": 4.3e6}
INT8_PER_US, BF16_PER_US = 1979e6, 989e6


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device=DEVICE)


def random_packed(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 256, (k // 128, n, 64), dtype=torch.uint8, device=DEVICE)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE)


def codes_at(t: int, k: int) -> torch.Tensor:
    """As a transform leaves them: with memory behind them up to a whole token tile."""
    return empty_codes(t, k, DEVICE).copy_(random_codes(t, k))


def bytes_us(moved: float) -> float:
    """Microseconds that so many bytes take at least."""
    return moved / BYTES_PER_US.get(torch.cuda.get_device_name(), 3.0e6)


def gemm_floor(kernel: str, t: int, n: int, k: int) -> float:
    """Microseconds below which no kernel of this kind can be."""
    weight = {"bf16": 2.0, "w4_g": 0.5, "w8_l": 1.0}.get(
        kernel[:4], 1.0 if "int8" in kernel or kernel.endswith(" fp8") else 0.5
    )
    act = 2.0 if "bf16" in kernel or "A16" in kernel or "w8_l" in kernel else 1.0
    rate = BF16_PER_US if act == 2.0 else INT8_PER_US
    return max(bytes_us(n * k * weight + t * k * act + t * n * 2), 2 * t * n * k / rate)


def gemm_makers(n: int, k: int) -> dict[str, Callable[[], At]]:
    """Kernel -> maker, for one weight: bf16, ours, and vLLM's where it is importable."""
    count = copies(n * k // 2)

    def cublas() -> At:
        weights = [normal(n, k) for _ in range(max(2, count // 3))]

        def at(t: int) -> Call:
            x = normal(t, k)
            return lambda i: torch.mm(x, weights[i % len(weights)].t())

        return at

    return {"bf16 cuBLAS": cublas, "w4_gemm": lambda: ours(n, k, 1)} | vllm_makers(n, k, count)


def ours(n: int, k: int, shards: int) -> At:
    weights = [random_packed(n, k) for _ in range(copies(n * k // 2))]
    weight_scale = positive(n, 1)

    def at(t: int) -> Call:
        x, scale = codes_at(t, k), positive(t, shards)
        return lambda i: w4_gemm(x, scale, weights[i], weight_scale, None, BF16)

    return at


def vllm_makers(n: int, k: int, count: int) -> dict[str, Callable[[], At]]:
    """vLLM's kernels for quantized weights."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
        from vllm.scalar_type import scalar_types
    except ImportError:
        return {}
    kind = scalar_types.uint4b8

    def packed(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device=DEVICE)

    def cutlass(dtype: torch.dtype) -> At:
        weights = [random_codes(n, k).to(dtype).t() for _ in range(max(2, count // 2))]
        w_scale = positive(n, 1)

        def at(t: int) -> Call:
            x, scale = random_codes(t, k).to(dtype), positive(t, 1)
            return lambda i: ops.cutlass_scaled_mm(x, weights[i % len(weights)], scale, w_scale, BF16)

        return at

    def machete() -> At:
        weights = [
            ops.machete_prepack_B(packed(k // 8, n).t().contiguous().t(), BF16, kind, BF16)
            for _ in range(count)
        ]
        scales = positive(k // 128, n).to(BF16)

        def at(t: int) -> Call:
            x = normal(t, k)
            return lambda i: ops.machete_mm(
                a=x, b_q=weights[i], b_type=kind, b_group_scales=scales, b_group_size=128
            )

        return at

    def marlin() -> At:
        weights = [packed(k // 16, n * 2) for _ in range(count)]
        scales = positive(k // 128, n).to(BF16)
        workspace = marlin_make_workspace_new(DEVICE)

        def at(t: int) -> Call:
            x = normal(t, k)
            return lambda i: ops.marlin_gemm(
                a=x, c=None, b_q_weight=weights[i], b_bias=None, b_scales=scales, a_scales=None,
                global_scale=None, b_zeros=None, g_idx=None, perm=None, workspace=workspace, b_q_type=kind,
                size_m=t, size_n=n, size_k=k, use_fp32_reduce=True,
            )  # fmt: skip

        return at

    def w4a8() -> At:
        weights = [
            ops.cutlass_encode_and_reorder_int4b(packed(k // 8, n).t().contiguous().t())
            for _ in range(count)
        ]
        scales = ops.cutlass_pack_scale_fp8(positive(k // 128, n).to(torch.float8_e4m3fn))
        w_scale = positive(n, 1)

        def at(t: int) -> Call:
            x, scale = random_codes(t, k).to(torch.float8_e4m3fn), positive(t, 1)
            return lambda i: ops.cutlass_w4a8_mm(x, weights[i], scales, 128, w_scale, scale)

        return at

    return {
        "vLLM cutlass int8": lambda: cutlass(torch.int8),
        "vLLM cutlass fp8": lambda: cutlass(torch.float8_e4m3fn),
        "vLLM Machete W4A16": machete,
        "vLLM Marlin W4A16": marlin,
        "vLLM cutlass W4A8-fp8": w4a8,
    }


def head_makers(n: int, k: int) -> dict[str, Callable[[], At]]:
    """An output head in bf16 and in 8 bits."""

    def wide() -> At:
        weights = [normal(n, k) for _ in range(2)]

        def at(t: int) -> Call:
            x = normal(t, k)
            return lambda i: torch.mm(x, weights[i].t())

        return at

    def narrow() -> At:
        codes = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE) for _ in range(2)]
        scale = positive(n, 1)

        def at(t: int) -> Call:
            x = normal(t, k)
            return lambda i: w8_linear(x, codes[i], scale)

        return at

    return {"bf16 cuBLAS": wide, "w8_linear": narrow}


def factors(a: int, b: int, shards: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(normal(shards, size, size).div(size**0.5) for size in (a, b))


def has_vllm() -> bool:
    """Whether vLLM's own operators are there; loads them."""
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError:
        return False
    return True


def transform_rotation(t: int, k: int) -> int:
    """How many inputs take turns. Those of few tokens stay in the L2, where a layer finds them too."""
    return copies(t * k * 2, limit=32)


def transform_makers(
    a: int, b: int, peers: bool, shards: int = 1
) -> dict[str, tuple[Callable[[], At], float]]:
    """Each transform and what it is compared with: a maker, and the bytes it must move for a token."""
    k = shards * a * b
    (left, right), clip = factors(a, b, shards), torch.ones(shards, device=DEVICE)
    norm = torch.ones(k, device=DEVICE, dtype=BF16)

    def on_inputs(run: Callable[..., object], *widths: int) -> Callable[[], At]:
        def at(t: int) -> Call:
            sets = [[normal(t, width) for width in widths] for _ in range(transform_rotation(t, k))]
            return lambda i: run(*sets[i])

        return lambda: at

    def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        out = torch.empty(gate_up.shape[0], k, device=DEVICE, dtype=BF16)
        torch.ops._C.silu_and_mul(out, gate_up)
        return out

    def add_norm(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        torch.ops._C.fused_add_rms_norm(x, residual, norm, 1e-5)
        return x

    makers = {
        "clone": (on_inputs(torch.clone, k), 4.0 * k),
        "kron_quant": (on_inputs(lambda x: kron_quant(x, left, right, clip, 4), k), 3.0 * k),
        "kron_quant head": (on_inputs(lambda x: kron_quant(x, left, None, clip, 4), k), 3.0 * k),
        "rmsnorm_kron_quant": (
            on_inputs(lambda x, r: rmsnorm_kron_quant(x, r, norm, 1e-5, left, right, clip, 4), k, k), 7.0 * k,
        ),
        "silu_mul_kron_quant": (
            on_inputs(lambda x: silu_mul_kron_quant(x, left, right, clip, 4), 2 * k), 5.0 * k,
        ),
        "kron": (on_inputs(lambda x: kron(x, left, right), k), 4.0 * k),
        "rmsnorm_kron": (
            on_inputs(lambda x, r: rmsnorm_kron(x, r, norm, 1e-5, left, right), k, k), 8.0 * k,
        ),
        "silu_mul_kron": (on_inputs(lambda x: silu_mul_kron(x, left, right), 2 * k), 6.0 * k),
    }  # fmt: skip
    if peers and has_vllm():
        makers["vLLM fused_add_rms_norm"] = on_inputs(add_norm, k, k), 8.0 * k
        makers["vLLM silu_and_mul"] = on_inputs(silu_and_mul, 2 * k), 6.0 * k
        makers["vLLM fused_add_rms_norm, then kron"] = (
            on_inputs(lambda x, r: kron(add_norm(x, r), left, right), k, k), 8.0 * k,
        )  # fmt: skip
        makers["vLLM silu_and_mul, then kron"] = (
            on_inputs(lambda x: kron(silu_and_mul(x), left, right), 2 * k), 6.0 * k,
        )  # fmt: skip
    return makers


def layer_makers(shapes: list[Shape], count: int) -> dict[str, Callable[[], At]]:
    """The four linears of a layer one after the other: bf16 and ours, alone and with what lies between them."""
    hidden, wide = shapes[0][1], shapes[3][1]
    norm, one = torch.ones(hidden, device=DEVICE, dtype=BF16), torch.ones(1, device=DEVICE)

    def inputs(t: int) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
        return {k: normal(t, k) for k in (hidden, wide)}, normal(t, hidden), normal(t, 2 * wide)

    def cublas(between: bool) -> At:
        weights = [[normal(n, k) for n, k in shapes] for _ in range(2)]

        def at(t: int) -> Call:
            x, residual, gate_up = inputs(t)

            def call(i: int) -> None:
                qkv, o, up, down = weights[i % 2]
                for first, second in ((qkv, o), (up, down)):
                    if between:
                        torch.ops._C.fused_add_rms_norm(x[hidden], residual, norm, 1e-5)
                    torch.mm(x[hidden], first.t())
                    if between and second is down:
                        torch.ops._C.silu_and_mul(x[wide], gate_up)
                    torch.mm(x[second.shape[1]], second.t())

            return call

        return at

    def integers(between: bool) -> At:
        weights = [[random_packed(n, k) for n, k in shapes] for _ in range(count)]
        scales = [positive(n, 1) for n, _ in shapes]
        square, tall, (head, _) = factors(64, 64), factors(112, 128), factors(32, 16)

        def at(t: int) -> Call:
            x, residual, gate_up = inputs(t)
            codes, token_scale = {k: codes_at(t, k) for k in (hidden, wide)}, positive(t, 1)

            def plain(i: int) -> None:
                for weight, scale, (_, k) in zip(weights[i], scales, shapes, strict=True):
                    w4_gemm(codes[k], token_scale, weight, scale, None, BF16)

            def everything(i: int) -> None:
                qkv, o, up, down = weights[i]
                normed = rmsnorm_kron_quant(x[hidden], residual, norm, 1e-5, *square, one, 4)
                w4_gemm(*normed[:2], qkv, scales[0], None, BF16)
                w4_gemm(*kron_quant(x[hidden], head, None, one, 4), o, scales[1], None, BF16)
                normed = rmsnorm_kron_quant(x[hidden], residual, norm, 1e-5, *square, one, 4)
                w4_gemm(*normed[:2], up, scales[2], None, BF16)
                w4_gemm(*silu_mul_kron_quant(gate_up, *tall, one, 4), down, scales[3], None, BF16)

            return everything if between else plain

        return at

    makers = {"bf16 cuBLAS": lambda: cublas(False), "w4_gemm": lambda: integers(False)}
    makers["w4_gemm with norm, SiLU*mul and transforms"] = lambda: integers(True)
    if has_vllm():
        makers["bf16 cuBLAS with vLLM's norm and SiLU*mul"] = lambda: cublas(True)
    return makers
