"""The custom ops on the CPU: their schema, fakes and references; errors name what does not fit."""

import subprocess
import sys

import pytest
import torch

from vllm_flatquant.kernels.kron import kron, kron_ref
from vllm_flatquant.kernels.kron_quant import kron_quant, kron_quant_ref
from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron, rmsnorm_kron_ref
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant, rmsnorm_kron_quant_ref
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron, silu_mul_kron_ref
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant, silu_mul_kron_quant_ref
from vllm_flatquant.kernels.w4_gemm import w4_gemm, w4_gemm_ref


def factors(shards: int, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shards, a, a).bfloat16(), torch.randn(shards, b, b).bfloat16()


def equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_every_op_equals_its_reference_on_the_cpu() -> None:
    torch.manual_seed(0)
    x, residual, norm = (
        torch.randn(5, 96).bfloat16(),
        torch.randn(5, 96).bfloat16(),
        torch.randn(96).bfloat16(),
    )
    left, right = factors(2, 6, 8)
    clip = torch.tensor([0.9, 0.8])
    equal(kron_quant(x, left, right, clip, 4), kron_quant_ref(x, left, right, clip, 4))
    equal(kron_quant(x, None, None, clip, 8), kron_quant_ref(x, None, None, clip, 8))
    equal((kron(x, left, None),), (kron_ref(x, left, None),))
    assert kron(x, None, None) is x
    gate_up = torch.randn(5, 192).bfloat16()
    equal(
        silu_mul_kron_quant(gate_up, left, right, clip, 4),
        silu_mul_kron_quant_ref(gate_up, left, right, clip, 4),
    )
    equal((silu_mul_kron(gate_up, left, right),), (silu_mul_kron_ref(gate_up, left, right),))
    left, right = factors(1, 8, 12)
    args = (norm, 1e-5, left, right, clip[:1], 4)
    equal(rmsnorm_kron_quant(x, residual, *args), rmsnorm_kron_quant_ref(x, residual, *args))
    assert rmsnorm_kron_quant(x, None, *args)[2] is x
    equal(rmsnorm_kron(x, residual, *args[:4]), rmsnorm_kron_ref(x, residual, *args[:4]))
    assert rmsnorm_kron(x, None, *args[:4])[1] is x
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    weight, scale, weight_scale = (
        torch.randint(-8, 8, (7, 96), dtype=torch.int8),
        torch.rand(5, 2),
        torch.rand(7, 1),
    )
    got = w4_gemm(codes, scale, pack_device(weight, 2), weight_scale, None, torch.bfloat16)
    equal((got,), (w4_gemm_ref(codes, scale, weight, weight_scale, None, torch.bfloat16),))


@pytest.mark.parametrize("device", ["cpu"])
def test_opcheck(device: str) -> None:
    """Schema, fakes (also with a dynamic number of tokens) and dispatch of all ops."""
    check_all_ops(device)


def check_all_ops(device: str) -> None:
    torch.manual_seed(0)
    ops = torch.ops.flatquant
    x, residual = (torch.randn(5, 192, device=device).bfloat16() for _ in range(2))
    left, right = (f.to(device) for f in factors(2, 6, 16))
    clip = torch.ones(2, device=device)
    gate_up = torch.randn(5, 384, device=device).bfloat16()
    torch.library.opcheck(ops.kron.default, (x, left, right))
    torch.library.opcheck(ops.kron.default, (x, left, None))
    torch.library.opcheck(ops.kron_quant.default, (x, left, right, clip, 4))
    torch.library.opcheck(ops.kron_quant.default, (x, None, None, clip, 8))
    torch.library.opcheck(ops.silu_mul_kron_quant.default, (gate_up, left, right, clip, 4))
    torch.library.opcheck(ops.silu_mul_kron.default, (gate_up, left, right))
    torch.library.opcheck(ops.silu_mul_kron.default, (gate_up, None, None))
    left, right = (f.to(device) for f in factors(1, 12, 16))
    norm = torch.randn(192, device=device).bfloat16()
    for added in (residual, None):
        args = (x, added, norm, 1e-5, left, right, clip[:1], 4)
        torch.library.opcheck(ops.rmsnorm_kron_quant.default, args)
        torch.library.opcheck(ops.rmsnorm_kron.default, args[:6])
        torch.library.opcheck(ops.rmsnorm_kron.default, (*args[:4], None, None))
    codes = torch.randint(-8, 8, (5, 256), dtype=torch.int8, device=device)
    weight = pack_device(torch.randint(-8, 8, (40, 256), dtype=torch.int8), 2).to(device)
    scale, weight_scale = torch.rand(5, 2, device=device), torch.rand(40, 1, device=device)
    bias = torch.randn(40, device=device).bfloat16()
    for b in (bias, None):
        torch.library.opcheck(
            ops.w4_gemm.default, (codes, scale, weight, weight_scale, b, torch.bfloat16)
        )


def test_errors_name_the_shapes() -> None:
    x = torch.randn(2, 96)
    left, right = factors(2, 6, 8)
    with pytest.raises(ValueError, match="of width 95"):
        kron_quant(x[:, :95], left, right, torch.ones(2), 4)
    with pytest.raises(ValueError, match="of width 48"):
        silu_mul_kron(x, left, right)
    with pytest.raises(ValueError, match="of width 95"):
        rmsnorm_kron(x[:, :95], None, torch.ones(95), 1e-5, left, right)
    codes = torch.zeros(2, 256, dtype=torch.int8)
    weight = pack_device(torch.zeros(8, 256, dtype=torch.int8))
    with pytest.raises(ValueError, match="pack_device"):
        w4_gemm(codes[:, :128], torch.ones(2, 1), weight, torch.ones(8, 1), None, torch.float32)
    with pytest.raises(ValueError, match="8 elements"):
        w4_gemm(codes, torch.ones(2, 1), weight, torch.ones(4, 1), None, torch.float32)


def test_without_triton_the_references_run() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from vllm_flatquant.kernels.jit import HAS_TRITON
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron
from vllm_flatquant.kernels.w4_gemm import w4_gemm
assert not HAS_TRITON
codes, scale = kron_quant(torch.randn(3, 8), None, None, torch.ones(1), 4)
assert codes.shape == (3, 8) and scale.shape == (3, 1)
assert rmsnorm_kron(torch.randn(3, 8), None, torch.ones(8), 1e-5, None, torch.eye(8)[None])[0].shape == (3, 8)
assert silu_mul_kron(torch.randn(3, 8), None, torch.eye(4)[None]).shape == (3, 4)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_rows() -> None:
    left, right = factors(1, 8, 12)
    codes, scale = kron_quant(torch.empty(0, 96).bfloat16(), left, right, torch.ones(1), 4)
    assert codes.shape == (0, 96) and scale.shape == (0, 1)
    weight = pack_device(torch.zeros(8, 96, dtype=torch.int8))
    assert w4_gemm(codes, scale, weight, torch.ones(8, 1), None, torch.float32).shape == (0, 8)
