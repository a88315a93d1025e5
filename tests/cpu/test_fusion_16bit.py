"""The fusion pass where activations keep 16 bits: norms and SiLU*mul in front of a transform alone."""

from types import SimpleNamespace

import pytest
import torch

from vllm_flatquant import fusion
from vllm_flatquant.fusion import Fused, fuse
from vllm_flatquant.kernels import jit, kron, rmsnorm_kron_quant, silu_mul_kron_quant
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron_ref
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron_ref
from vllm_flatquant.kernels.tiles import warmup_tokens

from . import test_fusion as quantized
from .test_fusion import (
    NORMS,
    OPS,
    WIDTH,
    activations,
    factors,
    fuse_and_run,
    silu_mul,
    times_sigmoid,
    trace,
    weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def unquantized(monkeypatch):
    """The functions of ``test_fusion`` with a transform alone in place of the one that quantizes."""
    alone = SimpleNamespace(kron_quant=lambda x, left, right, clip, bits: (OPS.kron(x, left, right),))
    monkeypatch.setattr(quantized, "OPS", alone)


def operators(graph):
    return [node.target.name() for node in graph.nodes if hasattr(node.target, "name")]


@pytest.mark.parametrize("form", ["both", "left"])
@pytest.mark.parametrize("eps", [1e-5, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_residual(dtype, eps, form):
    """The fused numbers are those of vLLM's norm and the transform, bit for bit."""
    x, _ = activations(dtype)
    left, right, _ = factors(dtype, form)

    def function(x, w, left, right):
        return (OPS.kron(NORMS.rms_norm(x, w, eps).reshape(-1, WIDTH), left, right),)

    found, before, after = fuse_and_run(function, x, weight(dtype), left, right)
    assert found == Fused(norms=1)
    assert torch.equal(after[0], rmsnorm_kron_ref(x, None, weight(dtype), eps, left, right)[0])
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("kept", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_residual(dtype, kept):
    """vLLM's definition norms the sum before it is rounded, its kernels (and Transformers) after, as ours."""
    x, residual = activations(dtype)
    left, right, _ = factors(dtype)

    def function(x, residual, w, left, right):
        normed, total = NORMS.fused_add_rms_norm(x, residual, w, 1e-5)
        z = OPS.kron(normed, left, right)
        return z, total * 2 if kept else z

    found, before, after = fuse_and_run(function, x, residual, weight(dtype), left, right)
    assert found == Fused(norms=1)
    expected, total = rmsnorm_kron_ref(x, residual, weight(dtype), 1e-5, left, right)
    assert torch.equal(after[0], expected)
    assert torch.equal(after[1], total * 2 if kept else expected)
    assert not kept or torch.equal(after[1], before[1])
    step = torch.finfo(dtype).eps
    error = (after[0].double() - before[0].double()).norm() / before[0].double().norm()
    assert error <= step


def test_large_norms_in_fp16_are_fused():
    """1/rms comes first here, so an input that overflows in the quantizing kernel does not."""
    x, _ = activations(torch.float16)
    x[:, 7] = 4e4
    w = weight(torch.float16)
    w[7] = 3.0
    left, right, _ = factors(torch.float16)
    function = lambda x, w, left, right: (OPS.kron(NORMS.rms_norm(x, w, 1e-5), left, right),)
    found, before, after = fuse_and_run(function, x, w, left, right)
    assert found == Fused(norms=1)
    assert after[0].isfinite().all() and torch.equal(after[0], before[0])


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("activation", [silu_mul, times_sigmoid, quantized.undecomposed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype, activation, shards):
    x, _ = activations(dtype, 2 * WIDTH)
    left, right, _ = factors(dtype, shards=shards)
    function = lambda x, left, right: (OPS.kron(activation(x), left, right) * 2,)
    found, before, after = fuse_and_run(function, x, left, right)
    assert found == Fused(activations=1)
    assert torch.equal(after[0], silu_mul_kron_ref(x, left, right) * 2)
    error = (after[0].double() - before[0].double()).norm() / before[0].double().norm()
    assert error <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "function, transforms",
    [
        (quantized.norm_read_twice, 1),
        (quantized.norm_for_two_transforms, 2),
        (quantized.norm_with_residual_read_twice, 1),
        (quantized.norm_of_a_part, 1),
        (quantized.norm_without_weight, 1),
        (quantized.norm_with_wider_weight, 1),
        (quantized.norm_of_heads, 1),
        (quantized.norm_then_something, 1),
        (quantized.residual_transformed, 1),
        (quantized.factors_made_later, 1),
        (quantized.norm_before_blocks, 1),
    ],
)
def test_norms_that_stay(unquantized, function, transforms):
    x, _ = activations(torch.bfloat16)
    inputs = x, weight(torch.bfloat16), *factors(torch.bfloat16)
    found, before, after = fuse_and_run(function, *inputs)
    assert found == Fused(alone=transforms)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "activation",
    [
        quantized.gelu_mul,
        quantized.halves_swapped,
        quantized.other_part,
        quantized.same_half,
        quantized.silu_alone,
        quantized.almost_silu,
        quantized.wrong_sign,
    ],
)
def test_activations_that_stay(activation):
    x, _ = activations(torch.bfloat16, 2 * WIDTH)
    left, right, _ = factors(torch.bfloat16)
    function = lambda x, left, right: (OPS.kron(activation(x), left, right),)
    found, before, after = fuse_and_run(function, x, left, right)
    assert found == Fused(alone=1)
    assert torch.equal(after[0], before[0])


def test_a_block_whose_linears_are_others():
    """As between two attentions: another's product stands between ours, so nothing is chained."""
    x, residual = activations(torch.bfloat16)
    heads, _, _ = factors(torch.bfloat16, "left")
    left, right, _ = factors(torch.bfloat16)
    torch.manual_seed(4)
    products = [torch.randn(n, WIDTH).bfloat16() / 8 for n in (WIDTH, 2 * WIDTH, WIDTH)]

    def block(x, residual, w, heads, left, right, o, gate_up, down):
        y = OPS.kron(x, heads, None) @ o.t()
        y, total = NORMS.fused_add_rms_norm(y, residual, w, 1e-5)
        y = silu_mul(OPS.kron(y, left, right) @ gate_up.t())
        y = OPS.kron(y, left, right) @ down.t()
        y, total = NORMS.fused_add_rms_norm(y, total, w, 1e-5)
        return OPS.kron(y, left, right), total

    module = trace(block, x, residual, weight(torch.bfloat16), heads, left, right, *products)
    before = module(x, residual, weight(torch.bfloat16), heads, left, right, *products)
    assert fuse(module.graph) == Fused(2, 1, 1)
    assert fusion.chain_operators(module.graph) == 0
    module.graph.lint()
    module.recompile()
    ours = [name for name in operators(module.graph) if name.startswith("flatquant::")]
    assert ours == [
        f"flatquant::{name}" for name in ("kron", "rmsnorm_kron", "silu_mul_kron", "rmsnorm_kron")
    ]
    after = module(x, residual, weight(torch.bfloat16), heads, left, right, *products)
    for got, want in zip(after, before, strict=True):
        assert (got.double() - want.double()).norm() <= 2**-7 * want.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "site, alone", [("qkv", [True, False]), ("gate_up", [False]), ("down", [False]), ("o", [])]
)
def test_warm_up_runs_every_variant_once(monkeypatch, site, alone, dtype):
    """alone: whether the norm has no residual: the model's first one is before q, k and v."""
    calls = []
    for name in ("rmsnorm_kron", "silu_mul_kron"):
        original = getattr(fusion, name)
        monkeypatch.setattr(
            fusion,
            name,
            lambda x, other, *rest, f=original: (
                calls.append((*x.shape, other is None)) or f(x, other, *rest)
            ),
        )
    left, right, _ = factors(dtype)
    layer = SimpleNamespace(
        transform_left=left, transform_right=right, transform_clip=None, input_size_per_partition=WIDTH
    )
    fusion.WarmUp(site, 16, dtype, 300).run(layer)
    width = 2 * WIDTH if site == "down" else WIDTH
    assert calls == [(count, width, each) for count in warmup_tokens(300) for each in alone]


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("most", [33, 300, 5000])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    "site, shards, a, b", [("qkv", 1, 64, 64), ("gate_up", 1, 16, 24), ("down", 1, 112, 128), ("down", 4, 16, 22)]
)  # fmt: skip
@pytest.mark.parametrize("sms, is_hopper", [(132, True), (108, False)])
def test_nothing_compiles_while_serving(monkeypatch, sms, is_hopper, site, shards, a, b, bits, most):
    """The warm-up runs each variant that a batch of up to ``most`` tokens can need, as Triton tells variants apart."""
    pytest.importorskip("triton.experimental.gluon")
    from vllm_flatquant.kernels import silu_mul_kron_quant_hopper

    found = set()

    def launch(kernel, grid, *args, **meta):
        told = [
            jit._specialization(arg)
            for arg, parameter in zip(args, kernel.params, strict=False)
            if not parameter.do_not_specialize and not hasattr(arg, "block_shape")
        ]
        found.add((kernel.fn.__name__, *told, *meta.items()))

    for module in (rmsnorm_kron_quant, silu_mul_kron_quant, silu_mul_kron_quant_hopper):
        monkeypatch.setattr(module, "launch", launch)
    for module in (kron, silu_mul_kron_quant, silu_mul_kron_quant_hopper):
        monkeypatch.setattr(module, "multiprocessors", lambda device: sms)
    for module in (kron, silu_mul_kron_quant):
        monkeypatch.setattr(module, "hopper", lambda device: is_hopper)
    monkeypatch.setattr(kron, "_on_chip", lambda device: 230_400)
    for name in ("rmsnorm_kron", "rmsnorm_kron_quant", "silu_mul_kron", "silu_mul_kron_quant"):
        monkeypatch.setattr(fusion, name, jit.OPERATORS[name]["cuda"])
    kron._plan.cache_clear()
    left, right = torch.zeros(shards, a, a).bfloat16(), torch.zeros(shards, b, b).bfloat16()
    clip, width = (torch.ones(shards) if bits < 16 else None), shards * a * b
    layer = SimpleNamespace(
        transform_left=left, transform_right=right, transform_clip=clip, input_size_per_partition=width
    )
    with monkeypatch.context() as patch:
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *rest, **more: zeros(*rest, **more).as_subclass(OnGPU))
        fusion.WarmUp(site, bits, torch.bfloat16, most).run(layer)
    warm = found.copy()
    rest, weight = (
        ((left, right) if bits == 16 else (left, right, clip, bits)),
        torch.ones(width).bfloat16(),
    )
    some = [
        1,
        2,
        17,
        27,
        28,
        33,
        67,
        108,
        109,
        132,
        133,
        257,
        300,
        3456,
        3457,
        4160,
        4161,
        4224,
        4225,
        5000,
    ]
    for t in (t for t in some if t <= most):
        x = torch.empty(t, width * (2 if site == "down" else 1)).bfloat16().as_subclass(OnGPU)
        if site == "down":
            (fusion.silu_mul_kron if bits == 16 else fusion.silu_mul_kron_quant)(x, *rest)
            continue
        for residual in (None, x) if site == "qkv" else (x,):
            norm = fusion.rmsnorm_kron if bits == 16 else fusion.rmsnorm_kron_quant
            norm(x, residual, weight, 1e-5, *rest)
    kron._plan.cache_clear()
    assert warm and found == warm
