"""The kernels compile for every card they promise, without one: sm_80, sm_89 and sm_90.

What is checked in the machine code: integer tensor-core instructions are used, unpacked weights go straight
from registers to them, and nothing spills.
"""

import re

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_flatquant.kernels.fake_quantize import _fake_quantize_backward_kernel, _fake_quantize_kernel
from vllm_flatquant.kernels.jit import INTERPRET
from vllm_flatquant.kernels.kron import _kron_kernel
from vllm_flatquant.kernels.kron_quant import _kron_quant_kernel
from vllm_flatquant.kernels.rmsnorm_kron_quant import _rmsnorm_kron_kernel
from vllm_flatquant.kernels.silu_mul_kron_quant import _silu_mul_kron_kernel
from vllm_flatquant.kernels.w4_gemm import _w4_gemm_kernel
from vllm_flatquant.kernels.w4_gemv import _w4_gemv_kernel
from vllm_flatquant.kernels.w8_linear import _w8_linear_kernel

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")

POINTERS = {
    "x_ptr": "bf16", "residual_ptr": "bf16", "weight_ptr": "bf16", "total_ptr": "bf16", "l_ptr": "bf16",
    "r_ptr": "bf16", "y_ptr": "bf16", "z_ptr": "bf16", "bias_ptr": "bf16", "codes_ptr": "i8", "w_ptr": "i8",
    "out_ptr": "i8", "clip_ptr": "fp32", "scale_ptr": "fp32", "x_scale_ptr": "fp32", "w_scale_ptr": "fp32",
}  # fmt: skip


def compiled(kernel, arch: int, warps: int, stages: int, types: dict | None = None, **meta):
    """The compiled kernel, for bf16 inputs whose sizes are multiples of 16."""
    pointers = {name: "*" + kind for name, kind in (POINTERS | (types or {})).items()}
    scalars = {"eps": "fp32", "clip_value": "fp32"}
    signature = {
        name: "constexpr" if name in meta else pointers.get(name, scalars.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr" and name not in ("t", "shard_blocks", *scalars)
    }
    source = ASTSource(kernel, signature, meta, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )


def starts_the_next_first(ptx: str) -> bool:
    """Whether a kernel lets the next one start before it waits for its own input, and waits once."""
    start, wait = (ptx.find(f"griddepcontrol.{what}") for what in ("launch_dependents", "wait"))
    return 0 < start < wait and ptx.count("griddepcontrol.wait") == 1


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(
    "bm,bn,warps,kb,shards", [(16, 32, 2, 2, 1), (64, 64, 4, 2, 1), (64, 64, 4, 1, 4)]
)
def test_w4_gemm(arch: int, bm: int, bn: int, warps: int, kb: int, shards: int) -> None:
    hopper = arch == 90
    kernel = compiled(
        _w4_gemm_kernel, arch, warps, 3, {"x_ptr": "i8"}, S=shards, HAS_BIAS=True, EVEN=True, BM=bm, BN=bn, KB=kb,
        GROUP=8, PREFETCH=8 if hopper else 0, PDL=hopper, ASM=True, THREADS=32 * warps,
    )  # fmt: skip
    ptx = kernel.asm["ptx"]
    product = (
        r"wgmma\.mma_async\S*\.s32\.s8\.s8" if hopper and bn >= 64 else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    )
    assert re.search(product, ptx)
    assert "cp.async" in ptx
    assert (".local" in ptx) is False
    assert ("griddepcontrol" in ptx) == hopper
    assert not hopper or starts_the_next_first(ptx)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("bn,warps,kb", [(8, 4, 32), (16, 4, 16)])
def test_w4_gemv(arch: int, bn: int, warps: int, kb: int) -> None:
    """Weights are asked for, 16 bytes at a time, before the kernel waits for its input; they stay in registers."""
    hopper = arch == 90
    asm = compiled(
        _w4_gemv_kernel, arch, warps, 1, {"x_ptr": "i32", "w_ptr": "i32", "x_scale_ptr": "fp32", "w_scale_ptr": "fp32"},
        S=1, SHARD_BLOCKS=32, HAS_BIAS=True, BN=bn, KB=kb, PREFETCH=0, PDL=hopper, ASM=True, THREADS=32 * warps,
    ).asm  # fmt: skip
    loads = kb * bn * 64 // (16 * 32 * warps)  # of weights, for a thread and step
    sass = asm["sass"]
    assert len(re.findall("IDP", sass)) == 8 * loads * 32 // kb
    assert sass.count("LDG.E.128") >= 2 * loads and not re.search(r"\b(STL|LDL)", sass)
    if hopper:
        assert sass[: sass.index("ACQBULK")].count("LDG.E.128") >= loads
        assert "PREEXIT" in sass[: sass.index("ACQBULK")]


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(
    "bm,bn,warps,stages", [(16, 64, 4, 4), (32, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3)]
)
def test_w8_linear(arch: int, bm: int, bn: int, warps: int, stages: int) -> None:
    ptx = compiled(
        _w8_linear_kernel, arch, warps, stages, HAS_BIAS=True, WIDE=False, BM=bm, BN=bn, BK=128
    ).asm["ptx"]
    assert re.search(r"wgmma\.mma_async\S*bf16" if arch == 90 else r"mma\.sync\S*bf16", ptx)
    assert "cp.async" in ptx
    assert ".local" not in ptx


TRANSFORMS = [
    (_kron_kernel, {}),
    (_kron_quant_kernel, {"QMAX": 7}),
    (_rmsnorm_kron_kernel, {"QMAX": 7, "RESIDUAL": True}),
    (_silu_mul_kron_kernel, {"QMAX": 7}),
    (_rmsnorm_kron_kernel, {"QMAX": 0, "RESIDUAL": True}),
    (_silu_mul_kron_kernel, {"QMAX": 0}),
]
WHOLE = {"out_ptr": "bf16", "clip_ptr": "bf16", "scale_ptr": "bf16"}
"""Types where a transform is not quantized; its launch gives any pointer for clip and scale."""


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("kernel,meta", TRANSFORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_transforms(arch: int, kernel, meta: dict) -> None:
    hopper = arch == 90
    ptx = compiled(
        kernel, arch, 4, 2, None if meta.get("QMAX") else WHOLE, A=64, B=64, L=True, R=True, WIDE=False,
        PDL=hopper, AHEAD=hopper, THREADS=128, ASM=True, **meta,
    ).asm["ptx"]  # fmt: skip
    assert re.search(r"wgmma\.mma_async\S*bf16" if hopper else r"mma\.sync\S*bf16", ptx)
    assert ".local" not in ptx
    assert not hopper or starts_the_next_first(ptx)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("r,k,warps", [(8, 128, 4), (1, 4096, 16)])
@pytest.mark.parametrize("kernel", [_fake_quantize_kernel, _fake_quantize_backward_kernel])
def test_fake_quantize(arch: int, r: int, k: int, warps: int, kernel) -> None:
    """16 bytes at a time, divisions as IEEE 754 rounds them, and nothing spills."""
    types = dict.fromkeys(("z_ptr", "out_ptr", "grad_ptr", "dz_ptr", "dclip_ptr"), "fp32")
    asm = compiled(kernel, arch, warps, 2, types, QMAX=7, HAS_CLIP=True, R=r, K=k).asm
    assert "div.rn.f32" in asm["ptx"] and "div.full" not in asm["ptx"]
    assert "LDG.E.128" in asm["sass"] and "STG.E.128" in asm["sass"]
    assert not re.search(r"\b(STL|LDL)", asm["sass"])


@pytest.mark.parametrize(
    "bm,bn,warps,stages,kb,shards,split",
    [
        (128, 256, 8, 5, 1, 1, 1),
        (128, 128, 8, 7, 1, 2, 1),
        (64, 64, 4, 8, 2, 1, 2),
        (64, 64, 4, 8, 2, 2, 4),
    ],
)
def test_w4_gemm_hopper(
    bm: int, bn: int, warps: int, stages: int, kb: int, shards: int, split: int
) -> None:
    """The products stay asynchronous: ptxas does not serialize them, and two remain in flight."""
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from vllm_flatquant.kernels.w4_gemm_hopper import _w4_gemm_hopper_kernel as kernel

    def box(kind: str, rows: int, columns: int, swizzle: int, bits: int) -> str:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)
        return f"tensordesc<{kind}[{rows},{columns}],{layout!r}>"

    meta = {
        "S": shards, "HAS_BIAS": False, "SPLIT": split, "GROUP": 8, "STAGES": stages, "KB": kb, "PDL": True,
    }  # fmt: skip
    types = {
        "x_desc": box("i8", bm, 128, 128, 8), "w_desc": box("u8", bn, 64, 64, 8),
        "y_desc": box("bf16", bm, bn, 128, 16), "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
        "bias_ptr": "*bf16", "partial_ptr": "*i32", "count_ptr": "*i32", "t": "i32", "n": "i32", "blocks": "i32",
    }  # fmt: skip
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name == "n"
    }
    compiled = triton.compile(
        GluonASTSource(kernel, signature, meta, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    assert re.search(r"wgmma\.mma_async\S*\.s32\.s8\.s8", compiled.asm["ptx"])
    assert compiled.metadata.shared <= 232448
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", compiled.asm["sass"])
    passes = shards if split == 1 else 1  # a part of a split lies in one shard
    assert waits.count("0x2") == 2 * passes and waits.count("0x0") == passes


@pytest.mark.parametrize("most", [7, 0], ids=["codes", "16 bits"])
@pytest.mark.parametrize("a,b,kind", [(112, 128, "bf16"), (100, 128, "bf16"), (80, 64, "fp16")])
def test_silu_mul_kron_quant_hopper(a: int, b: int, kind: str, most: int) -> None:
    """Both products take wgmma, results leave 16 bytes at a time, and next to nothing spills."""
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from vllm_flatquant.kernels import silu_mul_kron_quant_hopper as module

    kernel = module._silu_mul_kron_hopper_kernel
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    options = dict(module.OPTIONS)
    meta = {"a": a, "B": b, "QMAX": most, "STAGES": options.pop("STAGES"), "PDL": True}
    types = {
        "x_desc": f"tensordesc<{kind}[{module.ROWS},64],{layout!r}>", "l_ptr": "*" + kind, "r_ptr": "*" + kind,
        "clip_ptr": "*fp32", "out_ptr": "*i8", "scale_ptr": "*fp32", "t": "i32",
    }  # fmt: skip
    if not most:
        types |= dict.fromkeys(WHOLE, "*" + kind)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr")
    }
    compiled = triton.compile(
        GluonASTSource(kernel, signature, meta, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    assert compiled.metadata.shared <= 232448
    ptx, sass = compiled.asm["ptx"], compiled.asm["sass"]
    products = re.findall(
        rf"wgmma\.mma_async\.sync\.aligned\.m64n{b}k16\.f32\.{kind.replace('p', '')}", ptx
    )
    assert len(products) == b // 16 + 8  # a step is 16 columns of x, then 16 rows of 128
    assert "griddepcontrol.wait" in ptx and "griddepcontrol.launch_dependents" in ptx
    assert "STG.E.128" in sass and not re.search(r"STG\.E\.(U8|U16|64)", sass)
    assert len(re.findall(r"\b(STL|LDL)", sass)) <= 4  # Triton 3.6: none, 3.9: one value
