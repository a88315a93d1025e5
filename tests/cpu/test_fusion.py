"""The fusion pass on graphs of the compiler's operators, run on the operators' CPU implementations."""

import pytest
import torch
import torch.nn.functional as F
import vllm.ir.ops  # noqa: F401 (defines vLLM's norms as operators)
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_flatquant import fusion
from vllm_flatquant.fusion import Fused, fuse
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant_ref
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant_ref
from vllm_flatquant.kernels.tiles import warmup_tokens

from .tiny_checkpoint import random_factor

OPS, NORMS = torch.ops.flatquant, torch.ops.vllm_ir
TOKENS, WIDTH = 6, 64
FORMS = {"both": (8, 8), "left": (8, None), "none": (None, None)}


def factors(dtype, form="both", shards=1):
    """Left, right and clip of a transform of WIDTH columns."""
    torch.manual_seed(3)
    sizes = FORMS[form]
    left = None if sizes[0] is None else random_factor(shards, sizes[0] // shards).to(dtype)
    right = None if sizes[1] is None else random_factor(shards, sizes[1]).to(dtype)
    return left, right, 0.9 + 0.1 * torch.rand(shards)


def trace(function, *inputs):
    """The functional graph that the compiler makes of ``function``, with its decompositions."""
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def fuse_and_run(function, *inputs):
    """What the pass says, and the results of the graph before and after it."""
    module = trace(function, *inputs)
    before = module(*inputs)
    found = fuse(module.graph)
    module.graph.lint()
    module.recompile()
    return found, before, module(*inputs)


def activations(dtype, width=WIDTH):
    torch.manual_seed(1)
    return torch.randn(TOKENS, width).to(dtype), torch.randn(TOKENS, width).to(dtype)


def weight(dtype):
    return (1 + 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))).to(dtype)


def close(actual, expected, bits):
    """Codes and scales as the norm's place in the sum can move them: almost none, and by one."""
    difference = (actual[0].int() - expected[0].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < {4: 0.005, 8: 0.06}[bits]
    torch.testing.assert_close(actual[1], expected[1], rtol=4e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_without_residual(dtype, eps, bits, form):
    x, _ = activations(dtype)

    def function(x, w, left, right, clip):
        return OPS.kron_quant(NORMS.rms_norm(x, w, eps).reshape(-1, WIDTH), left, right, clip, bits)

    arguments = factors(dtype, form)
    found, before, after = fuse_and_run(function, x, weight(dtype), *arguments)
    assert found == Fused(norms=1)
    expected = rmsnorm_kron_quant_ref(x, None, weight(dtype), eps, *arguments, bits)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])
    if dtype == torch.float32:
        close(after, before, bits)


@pytest.mark.parametrize("kept", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_with_residual(dtype, kept):
    x, residual = activations(dtype)

    def function(x, residual, w, left, right, clip):
        normed, total = NORMS.fused_add_rms_norm(x, residual, w, 1e-5)
        codes, scale = OPS.kron_quant(normed, left, right, clip, 4)
        return codes, scale, total * 2 if kept else scale

    arguments = factors(dtype)
    found, before, after = fuse_and_run(function, x, residual, weight(dtype), *arguments)
    assert found == Fused(norms=1)
    expected = rmsnorm_kron_quant_ref(x, residual, weight(dtype), 1e-5, *arguments, 4)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])
    assert not kept or torch.equal(after[2], before[2])
    if dtype == torch.float32:
        close(after, before, 4)


def silu_mul(x):
    """As vLLM's SiluAndMul."""
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def times_sigmoid(x):
    gate, up = x[..., :WIDTH].float(), x[..., WIDTH:]
    return up * (torch.sigmoid(gate) * gate).to(x.dtype)


def undecomposed(x):
    return torch.ops.aten.silu.default(x[..., :WIDTH]) * x[..., WIDTH:]


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("activation", [silu_mul, times_sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_mul(dtype, activation, shards):
    x, _ = activations(dtype, 2 * WIDTH)

    def function(x, left, right, clip):
        return OPS.kron_quant(activation(x), left, right, clip, 8)

    arguments = factors(dtype, shards=shards)
    found, before, after = fuse_and_run(function, x, *arguments)
    assert found == Fused(activations=1)
    expected = silu_mul_kron_quant_ref(x, *arguments, 8)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])
    if dtype == torch.float32:
        close(after, before, 8)


def test_silu_that_the_compiler_keeps_whole():
    x, _ = activations(torch.bfloat16, 2 * WIDTH)
    function = lambda x, *rest: OPS.kron_quant(undecomposed(x), *rest, 4)
    inputs = (x, *factors(torch.bfloat16))
    module = make_fx(function, tracing_mode="fake")(*inputs)
    assert fuse(module.graph) == Fused(activations=1)
    module.recompile()
    assert torch.equal(module(*inputs)[0], silu_mul_kron_quant_ref(*inputs, 4)[0])


def norm_read_twice(x, w, *rest):
    normed = NORMS.rms_norm(x, w, 1e-5)
    return *OPS.kron_quant(normed, *rest, 4), normed.sum()


def norm_for_two_transforms(x, w, *rest):
    normed = NORMS.rms_norm(x, w, 1e-5)
    return *OPS.kron_quant(normed, *rest, 4), *OPS.kron_quant(normed, *rest, 8)


def norm_with_residual_read_twice(x, w, *rest):
    normed, total = NORMS.fused_add_rms_norm(x, x + 1, w, 1e-5)
    return *OPS.kron_quant(normed, *rest, 4), total, normed + 1


def norm_of_a_part(x, w, *rest):
    return OPS.kron_quant(NORMS.rms_norm(x, w, 1e-5, WIDTH // 2), *rest, 4)


def norm_without_weight(x, w, *rest):
    return OPS.kron_quant(NORMS.rms_norm(x, None, 1e-5) * w, *rest, 4)


def norm_with_wider_weight(x, w, *rest):
    return OPS.kron_quant(NORMS.rms_norm(x, w.float() + 1, 1e-5), *rest, 4)


def norm_of_heads(x, w, *rest):
    normed = NORMS.rms_norm(x.reshape(-1, 2, WIDTH // 2), w[: WIDTH // 2], 1e-5)
    return OPS.kron_quant(normed.reshape(-1, WIDTH), *rest, 4)


def norm_then_something(x, w, *rest):
    return OPS.kron_quant(NORMS.rms_norm(x, w, 1e-5) + 1, *rest, 4)


def residual_transformed(x, w, *rest):
    normed, total = NORMS.fused_add_rms_norm(x, x + 1, w, 1e-5)
    return *OPS.kron_quant(total, *rest, 4), normed


def factors_made_later(x, w, left, right, clip):
    normed = NORMS.rms_norm(x, w, 1e-5)
    return OPS.kron_quant(normed, left * 2, right, clip, 4)


def norm_before_blocks(x, w, left, right, clip):
    twice = left[:, :4, :4].repeat(2, 1, 1), right.repeat(2, 1, 1), clip.repeat(2)
    return OPS.kron_quant(NORMS.rms_norm(x, w, 1e-5), *twice, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function, transforms",
    [
        (norm_read_twice, 1),
        (norm_for_two_transforms, 2),
        (norm_with_residual_read_twice, 1),
        (norm_of_a_part, 1),
        (norm_without_weight, 1),
        (norm_of_heads, 1),
        (norm_then_something, 1),
        (residual_transformed, 1),
        (factors_made_later, 1),
        (norm_before_blocks, 1),
    ],
)
def test_norms_that_stay(function, transforms, dtype):
    x, _ = activations(dtype)
    found, before, after = fuse_and_run(function, x, weight(dtype), *factors(dtype))
    assert found == Fused(alone=transforms)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_norm_in_another_dtype_stays():
    x, _ = activations(torch.bfloat16)
    inputs = (x, weight(torch.bfloat16), *factors(torch.bfloat16))
    found, before, after = fuse_and_run(norm_with_wider_weight, *inputs)
    assert found == Fused(alone=1)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_norm_in_fp16_stays():
    """Before it is normed, this input times the weight is beyond what fp16 holds; after, it is small."""
    x, residual = activations(torch.float16)
    x[:, 7] = 4e4
    w = weight(torch.float16)
    w[7] = 3.0

    def alone(x, residual, w, left, right, clip):
        return OPS.kron_quant(NORMS.rms_norm(x, w, 1e-5), left, right, clip, 4)

    def added(x, residual, w, left, right, clip):
        normed, total = NORMS.fused_add_rms_norm(x, residual, w, 1e-5)
        return *OPS.kron_quant(normed, left, right, clip, 4), total

    for function in (alone, added):
        found, before, after = fuse_and_run(function, x, residual, w, *factors(torch.float16))
        assert after[1].isfinite().all()
        assert found == Fused(alone=1)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert rmsnorm_kron_quant_ref(x, None, w, 1e-5, *factors(torch.float16), 4)[1].isinf().all()


def gelu_mul(x):
    return F.gelu(x[..., :WIDTH]) * x[..., WIDTH:]


def halves_swapped(x):
    return F.silu(x[..., WIDTH:]) * x[..., :WIDTH]


def other_part(x):
    return F.silu(x[..., 1 : WIDTH + 1]) * x[..., WIDTH:]


def same_half(x):
    return F.silu(x[..., :WIDTH]) * x[..., :WIDTH]


def silu_alone(x):
    return F.silu(x[..., :WIDTH])


def silu_of_a_narrow_value(x):
    return F.silu(x[..., :WIDTH].to(torch.float8_e4m3fn).to(x.dtype)) * x[..., WIDTH:]


def almost_silu(x):
    gate = x[..., :WIDTH]
    return gate / (2 + torch.exp(-gate)) * x[..., WIDTH:]


def wrong_sign(x):
    gate = x[..., :WIDTH]
    return gate / (1 + torch.exp(gate)) * x[..., WIDTH:]


@pytest.mark.parametrize(
    "activation",
    [
        gelu_mul,
        halves_swapped,
        other_part,
        same_half,
        silu_alone,
        silu_of_a_narrow_value,
        almost_silu,
        wrong_sign,
    ],
)
def test_activations_that_stay(activation):
    x, _ = activations(torch.bfloat16, 2 * WIDTH)
    function = lambda x, *rest: OPS.kron_quant(activation(x), *rest, 4)
    found, before, after = fuse_and_run(function, x, *factors(torch.bfloat16))
    assert found == Fused(alone=1)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_activation_read_twice_stays():
    x, _ = activations(torch.bfloat16, 2 * WIDTH)

    def function(x, *rest):
        y = silu_mul(x)
        return *OPS.kron_quant(y, *rest, 4), y

    found, before, after = fuse_and_run(function, x, *factors(torch.bfloat16))
    assert found == Fused(alone=1)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_graph_without_transforms_is_left_as_it_is():
    module = trace(lambda x: silu_mul(x) + 1, torch.randn(2, 2 * WIDTH))
    code = module.code
    assert not fuse(module.graph)
    module.recompile()
    assert module.code == code


class Log:
    """Takes the place of a logger."""

    def __init__(self):
        self.lines = []

    def info(self, text, *arguments):
        self.lines.append(text % arguments)


def test_pieces_of_a_model_add_up_to_one_line(monkeypatch):
    log, tally = Log(), fusion._Tally()
    monkeypatch.setattr(fusion._compat, "logger", log)
    first, middle, last = object(), object(), object()
    for _ in range(2):  # a second model in the process starts from nothing
        tally.add(Fused(norms=1))
        tally.piece("1 to 8", first, True, False)
        tally.add(Fused(2, 1, 1))
        tally.piece("1 to 8", middle, False, False)
        tally.piece("1 to 8", middle, False, False)  # vLLM takes the piece that it has
        tally.add(Fused(1, 1, 1))
        tally.piece("1 to 8", last, False, True)
    line = (
        "FlatQuant fusion, 1 to 8 tokens: 6 RMSNorm and 3 SiLU*mul fused with the transform after them, "
        "3 transforms on their own"
    )
    assert log.lines == [line, line]


def test_pieces_from_the_compile_cache_are_told_apart(monkeypatch):
    log, tally = Log(), fusion._Tally()
    monkeypatch.setattr(fusion._compat, "logger", log)
    tally.piece("1 to 8", object(), True, True)
    tally.add(Fused(norms=1))
    tally.piece("1 to 8", object(), True, False)
    tally.piece("1 to 8", object(), False, True)
    tally.add(Fused())  # another model, without transforms
    tally.piece("1 to 8", object(), True, True)
    assert [line.partition(": ")[2][:40] for line in log.lines] == [
        "as in the compile cache",
        "1 RMSNorm and 0 SiLU*mul fused with the ",
    ]
    assert log.lines[1].endswith("(without the graphs from the compile cache)")


@pytest.mark.parametrize("site, runs", [("qkv", 2), ("gate_up", 1), ("down", 1), ("o", 0)])
def test_warm_up_runs_every_variant_once(monkeypatch, site, runs):
    from types import SimpleNamespace

    calls = []
    for name in ("rmsnorm_kron_quant", "silu_mul_kron_quant"):
        original = getattr(fusion, name)
        monkeypatch.setattr(
            fusion, name, lambda x, *rest, f=original: calls.append(x.shape) or f(x, *rest)
        )
    left, right, clip = factors(torch.bfloat16)
    layer = SimpleNamespace(
        transform_left=left,
        transform_right=right,
        transform_clip=clip,
        input_size_per_partition=WIDTH,
    )
    fusion.WarmUp(site, 4, torch.bfloat16, 300).run(layer)
    width = 2 * WIDTH if site == "down" else WIDTH
    assert calls == [(count, width) for count in warmup_tokens(300) for _ in range(runs)]
